from __future__ import annotations

import asyncio
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.traffic.answer import Record, tokens_by_chunk
from labkit.traffic.client import Client
from labkit.traffic.golden import Golden, Script
from labkit.traffic.target import Target

BODY = b'{"model": "golden", "stream": true, "messages": []}'
PLAIN = b'{"model": "golden", "messages": []}'


def ask(url: str, bodies: list[bytes], timeout_s: float = 5.0) -> list[Record]:
    """One after the other over one client."""

    async def all_of_them():
        client = Client(Target.parse(url))
        records = [Record(index) for index in range(len(bodies))]
        for record, body in zip(records, bodies, strict=True):
            await client.chat(body, record, timeout_s)
        await client.close()
        return records

    return asyncio.run(all_of_them())


def test_times_lie_between_the_servers_sends_and_shortly_after():
    with Golden([Script(ttft_s=0.05, itl_s=0.02, tokens=10, reasoning=4, headers_s=0.03)]) as golden:
        [record] = ask(golden.url, [BODY])
        [answered] = golden.answered
    assert record.failure == "" and record.finish_reason == "stop"
    assert (record.prompt_tokens, record.completion_tokens) == (7, 10)
    assert record.reasoning == " t0 t1 t2 t3" and record.text == " t4 t5 t6 t7 t8 t9"
    assert [part for _, _, part in record.chunks] == ["reasoning"] * 4 + ["answer"] * 6
    assert record.sent <= answered.received
    late = [seen - sent for (seen, _, _), (_, sent) in zip(record.chunks, answered.sends, strict=True)]
    late.append(record.first_byte - answered.headers_sent)
    assert min(late) >= 0 and sorted(late)[len(late) // 2] < 0.01 and max(late) < 0.25
    for number, (due, sent) in enumerate(answered.sends):
        assert due == pytest.approx(answered.received + 0.05 + number * 0.02, abs=1e-9)
        assert -1e-4 <= sent - due < 0.25


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("reset", "connect"), ("4xx", "4xx"), ("429", "shed"), ("503", "shed"), ("5xx", "5xx"),
        ("truncate", "truncated"),
        ("no finish", "truncated"), ("data error", "stream_error"), ("stall", "timeout"), ("garbage", "protocol"),
    ],
)  # fmt: skip
def test_every_failure_is_named_and_the_next_request_works(fault, kind):
    with Golden([Script(fault=fault), Script()]) as golden:
        failed, whole = ask(golden.url, [BODY, BODY], timeout_s=0.5)
    assert (failed.failure, whole.failure) == (kind, "")
    assert failed.message and failed.end is not None
    if kind in ("truncated", "stream_error", "timeout"):
        assert len(failed.chunks) == 4


def test_nobody_listens():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        [record] = ask(f"http://127.0.0.1:{unused.getsockname()[1]}", [BODY])
    assert record.failure == "refused" and record.sent is not None


def test_an_answer_that_is_not_streamed_is_one_chunk():
    with Golden([Script(tokens=9, reasoning=2, itl_s=0.005)]) as golden:
        [record] = ask(golden.url, [PLAIN])
    assert record.failure == "" and record.text == " t2 t3 t4 t5 t6 t7 t8"
    assert sum(tokens for _, tokens, _ in record.chunks) == 9
    assert len({t for t, _, _ in record.chunks}) == 1


def test_chunks_of_several_tokens_share_the_total():
    with Golden([Script(tokens=8, tokens_per_chunk=4)]) as golden:
        [record] = ask(golden.url, [BODY])
    assert [tokens for _, tokens, _ in record.chunks] == [4, 4]


def test_a_connection_is_kept_and_a_stale_one_replaced():
    async def talk():
        connections = 0

        async def serve(reader, writer):
            nonlocal connections
            connections += 1
            for _ in range(2 if connections == 1 else 9):
                if not await reader.readuntil(b"}"):
                    break
                body = b'{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}'
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            await asyncio.sleep(0.05)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = Client(Target("127.0.0.1", server.sockets[0].getsockname()[1]))
        records = [Record(index) for index in range(3)]
        for record in records[:2]:
            await client.chat(b"{}", record, 5.0)
        # The server never answers a third request on the first connection; it closes it as (or before) we write.
        await client.chat(b"{}", records[2], 5.0)
        await client.close()
        server.close()
        return connections, [record.failure for record in records]

    assert asyncio.run(talk()) == (2, ["", "", ""])


@given(st.integers(0, 400), st.lists(st.integers(1, 30), max_size=20))
def test_tokens_are_shared_out_whole(tokens, lengths):
    counts = tokens_by_chunk(tokens, lengths)
    assert len(counts) == len(lengths) and all(count >= 1 for count in counts)
    if lengths and tokens > len(lengths) + 3:
        assert sum(counts) == tokens
