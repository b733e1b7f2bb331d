"""Chat requests over HTTP/3: many at a time over a connection of QUIC, on ``aioquic``."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from aioquic.h3.connection import ErrorCode, FrameType, H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, StreamReset

from labkit.serving.quic import BROKEN, WINDOW_BYTES, Http3End, ManyStreams, Port, quic_settings, reason
from labkit.traffic.answer import UNREADABLE, Record, StreamAnswer
from labkit.traffic.http2 import Header
from labkit.traffic.pool import TRIES, pool_of
from labkit.traffic.target import Target, tls_context


@dataclass(eq=False)
class Stream:
    headers: list[Header]
    body: bytes
    answer: StreamAnswer
    number: int | None = None
    """None until it is opened."""


class _Page(StreamAnswer):
    """What a GET asks for."""

    @property
    def whole(self) -> bytes:
        return bytes(self._body)

    def complete(self, now: float) -> None:
        self.end(now)


class _Http(H3Connection):
    """aioquic reads over a GOAWAY; here it is noted."""

    going_away = False

    def _check_control_frame_type(self, frame_type: int) -> None:
        super()._check_control_frame_type(frame_type)
        self.going_away = self.going_away or frame_type == FrameType.GOAWAY


class Http3Connection(Http3End):
    """One connection and its streams. ``open``: it takes new ones."""

    http_kind = _Http

    def __init__(self, quic: QuicConnection) -> None:
        super().__init__(quic)
        self.made: asyncio.Future[None] = self._loop.create_future()
        """Resolved when requests can be sent; OSError when there is no connection to be had."""
        self._port: Port | None = None
        self._streams: dict[int, Stream] = {}
        self._waiting: deque[Stream] = deque()

    @property
    def open(self) -> bool:
        return self.settled and self.end is None and not (isinstance(self.http, _Http) and self.http.going_away)

    def begin(self, port: Port, address: Any) -> None:
        self._port = port
        port.refused = self._refused
        self.connection_made(port)
        self.connect(address)

    def send(self, stream: Stream) -> None:
        """Sends a request now, or when the peer takes another stream."""
        self._waiting.append(stream)
        self._admit()

    def cancel(self, stream: Stream) -> None:
        """Nobody waits for this one any more; the others go on."""
        if stream in self._waiting:
            self._waiting.remove(stream)
        elif stream.number is not None and stream.number in self._streams and self.end is None:
            del self._streams[stream.number]
            with contextlib.suppress(ValueError):  # the library has forgotten it already
                self._quic.stop_stream(stream.number, ErrorCode.H3_REQUEST_CANCELLED)
            self.give_up(stream.number, ErrorCode.H3_REQUEST_CANCELLED)

    def close(self, error_code: int = ErrorCode.H3_NO_ERROR, reason_phrase: str = "") -> None:
        super().close(error_code, reason_phrase)
        self._look_for_the_end()
        if self._port is not None:
            self._port.close()

    def in_use(self) -> bool:
        """Kept for the next request as well: a server that takes it for idle forgets it without a word."""
        return self.open

    def acknowledged(self) -> None:
        if self.settled and not self.made.done():
            self.made.set_result(None)
        if self._waiting:
            self._admit()

    def happened(self, event: Any) -> None:
        if isinstance(event, (HeadersReceived, DataReceived)):
            if stream := self._streams.get(event.stream_id):
                if event.stream_ended:
                    del self._streams[event.stream_id]
                self._read(stream.answer, event)
        elif isinstance(event, StreamReset):
            if stream := self._streams.pop(event.stream_id, None):
                self._reset(stream.answer, event.error_code)

    def lost(self, end: ConnectionTerminated) -> None:
        words = reason(end)
        streams = [*self._streams.values(), *self._waiting]
        self._streams.clear()
        self._waiting.clear()
        now = time.perf_counter()
        for stream in streams:
            if end.error_code in BROKEN:
                begun = stream.answer.record.first_byte is not None
                where = "in the middle of the" if begun else "before any"
                stream.answer.broke(f"the connection was closed {where} answer ({words})", now)
            else:
                stream.answer.fail("protocol", words, now)
        if not self.made.done():
            hint = "; give the file of whoever signed it as --cafile" if "certificate" in words else ""
            self.made.set_exception(ConnectionError(f"no connection over QUIC: {words}{hint}"))
        if self._port is not None:  # what is still to be said goes out first
            self._loop.call_later(0.1, self._port.close)

    def _refused(self) -> None:
        """The kernel says so; believed only while nothing else has come from there."""
        if not self.made.done():
            self.made.set_exception(ConnectionRefusedError())

    def _read(self, answer: StreamAnswer, event: HeadersReceived | DataReceived) -> None:
        if answer.over.done():
            return
        try:
            if isinstance(event, DataReceived):
                answer.body(event.data, self.now)
            elif not answer.status:
                answer.began(self.now)
                headers = dict(event.headers)
                answer.started(int(headers[b":status"]), headers.get(b"content-type", b"").decode("latin-1"))
            if event.stream_ended and not answer.over.done():
                answer.complete(self.now)
        except UNREADABLE as error:
            answer.fail("protocol", str(error) or type(error).__name__, self.now)

    def _reset(self, answer: StreamAnswer, code: int) -> None:
        name = next((each.name for each in ErrorCode if each == code), f"error {code:#x}")
        if code in (ErrorCode.H3_REQUEST_REJECTED, ErrorCode.H3_EXCESSIVE_LOAD):
            answer.unseen = code == ErrorCode.H3_REQUEST_REJECTED
            answer.fail("shed", f"the server turned the stream away: {name}", self.now)
        else:
            answer.broke(f"the server reset the stream: {name}", self.now)

    def _admit(self) -> None:
        """aioquic would take more streams than the peer does and keep them back, but resets those too."""
        quic, http = self._quic, self.http
        while self._waiting and http is not None and self.end is None:
            number = quic.get_next_available_stream_id()
            if number // 4 >= quic._remote_max_streams_bidi:
                return
            stream = self._waiting.popleft()
            stream.number = number
            self._streams[number] = stream
            http.send_headers(number, stream.headers, end_stream=not stream.body)
            if stream.body:
                http.send_data(number, stream.body, end_stream=True)
            self.send_soon()


class Http3:
    """The HTTP/3 side of a client."""

    def __init__(self, target: Target) -> None:
        """Raises UserError when the target's ``cafile`` is not one."""
        tls_context(target)
        self._target = target
        self._pool = pool_of(target.shared_by, self._connect)

    async def chat(self, body: bytes, record: Record, deadline: float) -> None:
        target, loop = self._target, asyncio.get_running_loop()
        more = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers = request_headers(target, b"POST", "/v1/chat/completions", *more)
        headers.append((b"x-request-id", str(record.index).encode()))
        for left in reversed(range(TRIES)):
            connection, _ = await self._pool.take(deadline - time.perf_counter())
            stream = Stream(headers, body, StreamAnswer(record, loop))
            try:
                await exchange(connection, stream, deadline)
            finally:
                self._pool.give(connection)
            if not (stream.answer.unseen and left):
                return
            record.unsend()

    async def close(self) -> None:
        self._pool.close()

    async def _connect(self) -> Http3Connection:
        return await connect(self._target)


async def get(target: Target, path: str, timeout_s: float) -> tuple[int, bytes]:
    """Status and body of a page. Raises OSError or TimeoutError."""
    async with asyncio.timeout(timeout_s):
        connection = await connect(target)
    try:
        answer = _Page(Record(0), asyncio.get_running_loop())
        stream = Stream(request_headers(target, b"GET", path), b"", answer)
        await exchange(connection, stream, time.perf_counter() + timeout_s)
        if answer.record.failure:
            raise ConnectionError(answer.record.message)
        return answer.status, answer.whole
    finally:
        connection.close()


async def exchange(connection: Http3Connection, stream: Stream, deadline: float) -> None:
    """Until the answer of ``stream`` is over, at ``deadline`` (``time.perf_counter``) at the latest."""
    answer = stream.answer
    timer = asyncio.get_running_loop().call_later(
        max(0.0, deadline - time.perf_counter()),
        lambda: answer.fail("timeout", "not ended in time", time.perf_counter()),
    )
    try:
        if connection.open:
            connection.send(stream)
        else:  # it was closed since it was taken
            answer.unseen = True
            answer.fail("connect", "the connection was closed before the request went out", time.perf_counter())
        await answer.over
    finally:
        timer.cancel()
        connection.cancel(stream)


async def connect(target: Target) -> Http3Connection:
    """A connection that takes requests. Raises OSError when there is none to be had; it waits for ever where nothing
    answers and nothing says that nobody is there."""
    loop = asyncio.get_running_loop()
    infos = await loop.getaddrinfo(target.host, target.port, type=socket.SOCK_DGRAM)
    family, kind, proto, _, address = infos[0]
    trusted = ssl.get_default_verify_paths()
    settings = quic_settings(
        client=True, server_name=target.host, max_data=WINDOW_BYTES, max_stream_data=WINDOW_BYTES
    )  # fmt: skip
    settings.load_verify_locations(target.cafile or trusted.cafile, trusted.capath)
    connection = Http3Connection(ManyStreams(configuration=settings))
    udp = socket.socket(family, kind, proto)
    try:
        udp.connect(address)
    except OSError:
        udp.close()
        raise
    port = Port(udp, connection.datagram_received, address)
    try:
        connection.begin(port, address)
        await connection.made
    except BaseException:
        connection.close()
        raise
    return connection


def request_headers(target: Target, method: bytes, path: str, *more: Header) -> list[Header]:
    """What a request begins with."""
    headers = [
        (b":method", method),
        (b":scheme", b"https"),
        (b":authority", target.authority.encode()),
        (b":path", f"{target.base}{path}".encode()),
        *more,
    ]
    if target.api_key:
        headers.append((b"authorization", f"Bearer {target.api_key}".encode()))
    return headers
