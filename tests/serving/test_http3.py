"""HTTP/3: what it says beside, what clients do to a connection, and what a packet holds."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest

from labkit.errors import UserError
from labkit.serving import quic
from labkit.serving.http3 import listen_http3
from labkit.serving.options import ServerOptions
from labkit.serving.tls import Certificate
from labkit.traffic import client_http3
from labkit.traffic.answer import Record, StreamAnswer
from labkit.traffic.client import Client
from labkit.traffic.client_http3 import Http3Connection, Stream, connect, exchange, request_headers
from labkit.traffic.target import Target

CHAT = "/v1/chat/completions"
LONG = 1_500


@pytest.fixture
def served(helpers: Any, engine: Any, certificate: Certificate) -> Iterator[Target]:
    """A server whose every request streams for 30 s; afterwards it is up and has all of its blocks back."""
    engine.core.max_context = 10**6
    engine.pieces, engine.gap_s = ("word ",) * LONG, 0.02
    trusted = ssl.create_default_context(cafile=str(certificate.certificate))
    options = ServerOptions(model_name="tiny", send_timeout_s=0.5, max_body_bytes=100_000)
    with helpers.running(engine, options, "http/3", certificate) as url:
        yield Target.parse(url, transport="http/3", cafile=str(certificate.certificate))
        assert httpx.get(url + "/health", verify=trusted).status_code == 200
        assert helpers.eventually(
            lambda: httpx.get(url + "/stats", verify=trusted).json()["kv_blocks_used"] == 0, 5.0
        )  # fmt: skip


def question(helpers: Any, tokens: int = LONG) -> bytes:
    return json.dumps(helpers.chat(stream=True, max_tokens=tokens)).encode()


def chat(target: Target, body: bytes, index: int = 0) -> Stream:
    headers = request_headers(target, b"POST", CHAT, (b"content-type", b"application/json"))
    return Stream(headers, body, StreamAnswer(Record(index), asyncio.get_running_loop()))


async def until(condition: Callable[[], Any], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def others_go_on(target: Target, helpers: Any, act: Callable[[Http3Connection], Awaitable[None]]) -> None:
    """Runs ``act`` on a connection while another one streams: all of its tokens come."""

    async def main() -> None:
        client, record = Client(target), Record(0)
        other = asyncio.create_task(client.chat(question(helpers, 40), record, 20))
        connection = await connect(target)
        await act(connection)
        await other
        assert (record.failure, record.text) == ("", "word " * 40)
        connection.close()
        await client.close()

    asyncio.run(main())


def test_the_tcp_port_of_the_same_number_answers_too_and_says_where_http3_is(
    helpers: Any, engine: Any, certificate: Certificate
) -> None:
    trusted = ssl.create_default_context(cafile=str(certificate.certificate))
    with helpers.running(engine, None, "http/3", certificate) as url:
        port = url.rpartition(":")[2]
        for second, version in ((False, "HTTP/1.1"), (True, "HTTP/2")):
            with httpx.Client(http2=second, verify=trusted) as client:
                for path in ("/health", "/metrics"):
                    answer = client.get(url + path)
                    assert (answer.http_version, answer.status_code) == (version, 200)
                    assert answer.headers["alt-svc"] == f'h3=":{port}"; ma=3600'


@pytest.mark.parametrize("leaves", ["cancels", "says goodbye", "is gone", "does not read"])
def test_a_client_that_leaves_frees_what_it_held(
    served: Target, helpers: Any, engine: Any, leaves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if leaves == "does not read":  # its windows stay as they are, and hold little
        engine.pieces, engine.gap_s = ("x" * 500 + " ",) * LONG, 0.002
        monkeypatch.setattr(client_http3, "WINDOW_BYTES", 20_000)
        monkeypatch.setattr(quic.ManyStreams, "_write_stream_limits", lambda *_, **__: None)

    async def act(connection: Http3Connection) -> None:
        streams = [chat(served, question(helpers)) for _ in range(5)]
        for stream in streams:
            connection.send(stream)
        await until(lambda: all(stream.answer.record.chunks for stream in streams))
        if leaves == "cancels":
            for stream in streams[:3]:
                connection.cancel(stream)
            await until(lambda: engine.running <= 3)
            before = [len(stream.answer.record.chunks) for stream in streams]
            await until(lambda: all(len(streams[i].answer.record.chunks) > before[i] for i in (3, 4)))
            assert [len(stream.answer.record.chunks) for stream in streams[:3]] == before[:3]
            for stream in streams[3:]:
                connection.cancel(stream)
        elif leaves == "says goodbye":
            connection.close()
        elif leaves == "is gone":
            assert connection._port is not None
            connection._port.close()
        await until(lambda: engine.running <= 1, 8.0)

    if leaves == "is gone":
        # The server of the fixture runs already; what it holds a client for is the client's say as well.
        monkeypatch.setattr(quic, "IDLE_S", 0.5)
        monkeypatch.setattr(quic, "PING_S", 0.1)
    if leaves == "does not read":

        async def alone() -> None:
            await act(await connect(served))

        asyncio.run(alone())
        assert engine.produced < 5 * LONG
    else:
        others_go_on(served, helpers, act)


def test_a_long_silence_is_not_the_end(served: Target, helpers: Any, engine: Any, monkeypatch: Any) -> None:
    engine.pieces, engine.gap_s = ("a", "b"), 1.2
    monkeypatch.setattr(quic, "IDLE_S", 0.5)
    monkeypatch.setattr(quic, "PING_S", 0.15)

    async def main() -> Record:
        client, record = Client(served), Record(0)
        await client.chat(question(helpers, 2), record, 10)
        await client.close()
        return record

    assert asyncio.run(main()).text == "ab"


def test_what_is_too_large_is_refused_and_the_connection_goes_on(served: Target, helpers: Any) -> None:
    async def act(connection: Http3Connection) -> None:
        for size in (90_000, 3_000_000):
            stream = chat(served, json.dumps(helpers.chat("x" * size, max_tokens=1)).encode())
            await exchange(connection, stream, asyncio.get_running_loop().time() + 1000)
            assert stream.answer.status == (200 if size < 100_000 else 413)
        stream = chat(served, question(helpers, 3))
        await exchange(connection, stream, asyncio.get_running_loop().time() + 1000)
        assert stream.answer.record.text == "word word word " and connection.open

    others_go_on(served, helpers, act)


def test_a_header_without_end_ends_its_connection(served: Target, helpers: Any) -> None:
    async def act(connection: Http3Connection) -> None:
        stream = chat(served, b"{}")
        rng = random.Random(0)
        stream.headers += [(b"x-%d" % number, rng.randbytes(5_000).hex().encode()) for number in range(20)]
        await exchange(connection, stream, asyncio.get_running_loop().time() + 1000)
        assert stream.answer.record.failure == "protocol" and "EXCESSIVE_LOAD" in stream.answer.record.message

    others_go_on(served, helpers, act)


def test_datagrams_that_are_no_quic_are_passed_over(served: Target, helpers: Any) -> None:
    rng = random.Random(0)

    async def act(connection: Http3Connection) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            for size in (0, 1, 20, 1200, 1400):
                for first in (b"", b"\xc0\x00\x00\x00\x01\x08", b"\xc0\xba\xba\xba\xba\x08", b"\x40"):
                    stranger.sendto((first + rng.randbytes(size))[: max(size, 1)], (served.host, served.port))

    others_go_on(served, helpers, act)


def test_packets_are_full_and_fit_an_ethernet(served: Target, helpers: Any, engine: Any, monkeypatch: Any) -> None:
    engine.pieces, engine.gap_s = ("x" * 5_000,) * 20, 0.0
    sizes: list[int] = []
    received = Http3Connection.datagram_received

    def count(self: Http3Connection, data: bytes, address: Any) -> None:
        sizes.append(len(data))
        received(self, data, address)

    monkeypatch.setattr(Http3Connection, "datagram_received", count)

    async def main() -> None:
        client, record = Client(served), Record(0)
        await client.chat(question(helpers), record, 10)
        await client.close()
        assert record.text == "x" * 100_000

    asyncio.run(main())
    assert max(sizes) == quic.PACKET_BYTES <= 1500 - 40 - 8
    assert sorted(sizes)[len(sizes) // 2] > 1200


def test_a_udp_port_in_use_is_an_error() -> None:
    tcp, taken = listen_http3("127.0.0.1", 0)
    tcp.close()
    with taken:
        with pytest.raises(UserError, match="cannot listen on UDP"):
            listen_http3("127.0.0.1", taken.getsockname()[1])
