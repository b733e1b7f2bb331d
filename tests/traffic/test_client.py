from __future__ import annotations

import asyncio
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.traffic.answer import Record, tokens_by_chunk
from labkit.traffic.client import Client
from labkit.traffic.golden import Script
from labkit.traffic.target import TRANSPORTS, Target

BODY = b'{"model": "golden", "stream": true, "messages": [{"role": "user", "content": "?"}]}'
PLAIN = b'{"model": "golden", "messages": []}'
MULTIPLEXED = ("http/2", "http/2 tls", "http/3", "grpc")


@pytest.mark.clock
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_times_lie_between_the_servers_sends_and_shortly_after(asked, transport):
    server = asked([Script(ttft_s=0.05, itl_s=0.02, tokens=10, reasoning=4, headers_s=0.03)], transport)
    [record] = server.in_turn([BODY])
    [answered] = server.golden.answered
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
    ("transport", "connections", "opened"),
    [("http/1.1", None, 300), ("http/1.1 close", None, 300), ("http/2", None, 1), ("http/2", 4, 4),
     ("http/2", "each", 300), ("http/2 tls", None, 1), ("http/3", None, 1), ("http/3", 4, 4), ("grpc", None, 1),
     ("grpc", 4, 4)],
)  # fmt: skip
def test_of_300_streams_at_once_nothing_is_lost_mixed_up_or_changed(asked, transport, connections, opened):
    scripts = [Script(0.05, 0.02, tokens=12 + i % 7, reasoning=3, word=f"w{i}-") for i in range(300)]
    server = asked(scripts, transport, connections)
    for record, script in zip(server.together(300, timeout_s=30.0), scripts, strict=True):
        assert record.failure == "" and record.completion_tokens == script.tokens
        assert record.reasoning == script.text(0, 2) and record.text == script.text(3, script.tokens - 1)
        times, tokens, _ = zip(*record.chunks, strict=True)
        assert tokens == (1,) * script.tokens and list(times) == sorted(times)
    assert server.golden.connections == opened and len(server.golden.answered) == 300


KINDS = {
    "reset": "connect", "4xx": "4xx", "429": "shed", "503": "shed", "5xx": "5xx", "truncate": "truncated",
    "no finish": "truncated", "data error": "stream_error", "stall": "timeout", "garbage": "protocol",
}  # fmt: skip


@pytest.mark.parametrize(
    ("transport", "fault", "kind"),
    [
        (transport, fault, kind)
        for transport in ("http/1.1", "http/2", "http/3", "grpc")
        for fault, kind in KINDS.items()
    ],
)
def test_every_failure_is_named_and_the_next_request_works(asked, transport, fault, kind):
    failed, whole = asked([Script(0.03, 0.01, fault=fault), Script()], transport).in_turn([BODY, BODY], 0.5)
    assert (failed.failure, whole.failure) == (kind, ""), failed.message
    assert failed.message and failed.end is not None
    if kind in ("truncated", "stream_error", "timeout"):
        assert len(failed.chunks) == 4


@pytest.mark.parametrize("transport", MULTIPLEXED)
def test_of_a_server_that_goes_away_the_streams_go_on_and_the_request_is_sent_again(asked, transport):
    server = asked([Script(ttft_s=0.1, itl_s=0.02, tokens=10), Script(fault="goaway")], transport)
    first, second = server.together(2, apart_s=0.05)
    assert (first.failure, second.failure) == ("", "") and first.text == Script().text(0, 9)
    assert server.golden.connections == 2
    assert [one.request_id for one in server.golden.answered] == ["0", "1", "1"]


@pytest.mark.parametrize("transport", MULTIPLEXED)
def test_a_stream_that_fails_leaves_the_others_of_its_connection_alone(asked, transport):
    scripts = [Script(ttft_s=0.05, itl_s=0.05, tokens=8), Script(fault="truncate", itl_s=0.01), Script(fault="reset")]
    server = asked([*scripts, Script(fault="stall")], transport)
    kinds = [record.failure for record in server.together(4, timeout_s=0.8)]
    assert kinds == ["", "truncated", "connect", "timeout"] and server.golden.connections == 1


@pytest.mark.parametrize("transport", ["http/2", "http/3", "grpc"])
def test_no_more_streams_are_open_than_the_server_takes(asked, transport):
    server = asked([Script(ttft_s=0.15, tokens=1)], transport, most_streams=3)
    assert {record.failure for record in server.together(9, apart_s=0.01)} == {""}
    spans = [(one.received, one.ended) for one in server.golden.answered]
    assert max(sum(begin <= at < end for begin, end in spans) for at, _ in spans) == 3
    assert server.golden.connections == 1


def test_fewer_http1_connections_than_streams_make_them_wait(asked):
    server = asked([Script(ttft_s=0.1, tokens=1)], connections=2)
    records = server.together(6)
    assert server.golden.connections == 2 and {record.failure for record in records} == {""}
    assert max(record.end - record.sent for record in records) > 0.29
    late = server.together(4, timeout_s=0.15)
    assert sorted(record.failure for record in late) == ["", "", "timeout", "timeout"]


@pytest.mark.parametrize(
    ("transport", "opened"),
    [("http/1.1", 1), ("http/1.1 close", 3), ("http/2", 1), ("http/3", 1), ("grpc", 1)],
)
def test_connections_are_kept_unless_each_request_is_to_have_its_own(asked, transport, opened):
    server = asked([Script()], transport, "each")
    assert [record.failure for record in server.in_turn([BODY] * 3)] == [""] * 3
    assert server.golden.connections == opened


@pytest.mark.parametrize(("scheme", "transport"), [("http", None), ("h2c", None), ("https", "http/3"), ("grpc", None)])
def test_nobody_listens(on_loop, scheme, transport):
    """Of UDP, the kernel of this machine tells."""

    async def ask(url):
        client, record = Client(Target.parse(url, transport=transport)), Record(0)
        await client.chat(BODY, record, 5.0)
        await client.close()
        return record

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # a TCP port that does not listen, and a UDP port that is not there
        record = on_loop(ask(f"{scheme}://127.0.0.1:{unused.getsockname()[1]}"))
    assert record.failure == "refused" and record.sent is not None


def test_an_answer_that_is_not_streamed_is_one_chunk(asked):
    for transport in ("http/1.1", "http/2", "http/3"):
        [record] = asked([Script(tokens=9, reasoning=2, itl_s=0.005)], transport).in_turn([PLAIN])
        assert record.failure == "" and record.text == " t2 t3 t4 t5 t6 t7 t8"
        assert sum(tokens for _, tokens, _ in record.chunks) == 9
        assert len({t for t, _, _ in record.chunks}) == 1


@pytest.mark.parametrize("transport", ["http/1.1", "http/2", "http/3", "grpc"])
def test_chunks_of_several_tokens_share_the_total(asked, transport):
    [record] = asked([Script(tokens=8, tokens_per_chunk=4)], transport).in_turn([BODY])
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
