"""Chat requests over HTTP/2, with TLS (ALPN) or without (prior knowledge): many at a time over a connection."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import ProtocolError

from labkit.traffic.answer import UNREADABLE, Record, StreamAnswer
from labkit.traffic.http2 import (
    DATA,
    HEADER_BYTES,
    WINDOW_BYTES,
    Frame,
    Header,
    Inbox,
    Outbox,
    not_http2,
    open_connection,
    take_frames,
    window_update,
)
from labkit.traffic.pool import TRIES, pool_of
from labkit.traffic.target import Target, tls_context

STREAMS_BEFORE_SETTINGS = 100
"""Streams at once before the peer has said how many it takes; RFC 9113 recommends no limit below this one."""


Headers = dict[bytes, bytes]


class Listener(Protocol):
    """Who reads the answer on one stream: an ``Answer`` of any kind. ``head``, ``body``, ``trailers`` and ``complete``
    may raise UNREADABLE for what is not as it should be, and are not called once the answer is ``over``."""

    record: Record
    over: asyncio.Future[None]
    unseen: bool
    """The peer says that it did not process the request."""

    def began(self, now: float) -> None: ...
    def head(self, headers: Headers, now: float) -> None: ...
    def body(self, data: bytes, now: float) -> None: ...
    def trailers(self, headers: Headers, now: float) -> None: ...
    def complete(self, now: float) -> None:
        """The peer closed the stream in the way that the protocol wants."""

    def broke(self, why: str, now: float) -> None: ...
    def fail(self, kind: str, message: str, now: float) -> None: ...


class Http2Answer(StreamAnswer):
    """An answer of the OpenAI protocol on a stream of HTTP/2."""

    def head(self, headers: Headers, now: float) -> None:
        self.started(int(headers[b":status"]), headers.get(b"content-type", b"").decode("latin-1"))

    def trailers(self, headers: Headers, now: float) -> None:
        """The protocol has none."""


@dataclass(eq=False)
class Stream:
    headers: list[Header]
    body: bytes
    answer: Listener
    number: int = 0
    """0 until it is opened."""
    plain: bool = False
    """Whether its data is handed on without h2: no length was promised that it would check."""
    early: bool = False
    """Whether it was opened before the peer had said how many streams it takes."""


class Http2Connection(asyncio.Protocol):
    """One connection and its streams. ``open``: it takes new ones. ``wrong``: why it is not HTTP/2, or empty."""

    def __init__(self) -> None:
        self.open = False
        self.transport: asyncio.Transport | None = None
        self._streams: dict[int, Stream] = {}
        self._waiting: deque[Stream] = deque()
        self._most = STREAMS_BEFORE_SETTINGS
        self._h2 = open_connection(client=True, ENABLE_PUSH=0)
        self._buffer, self._first = bytearray(), b""
        self._passed = 0
        self._settled = False
        self.wrong = ""
        self._inbox, self._outbox = Inbox(self._h2), Outbox(self._h2)

    def send(self, stream: Stream) -> None:
        """Sends a request now, or when the peer takes another stream."""
        self._waiting.append(stream)
        self._admit()
        self._flush()

    def cancel(self, stream: Stream) -> None:
        """Nobody waits for this one any more; the others go on."""
        if stream in self._waiting:
            self._waiting.remove(stream)
        elif stream.number in self._streams and self.transport is not None and not self.transport.is_closing():
            self._h2.reset_stream(stream.number, ErrorCodes.CANCEL)
            self._gone(stream.number)
            self._flush()

    def close(self) -> None:
        self.open = False
        if self.transport is not None:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.open = transport, True
        self._flush()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        try:
            self._check(data)
            self._buffer += data
            for frame in take_frames(self._buffer):
                self._received(frame, now)
        except ProtocolError as error:
            self._flush()
            self.wrong = str(error) or type(error).__name__
            for stream in self._forgotten():
                stream.answer.fail("protocol", self.wrong, now)
            self.close()
            return
        self._admit()
        self._flush()
        if not self.open and not self._streams and self.transport is not None:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        now = time.perf_counter()
        for stream in self._forgotten():
            begun = stream.answer.record.first_byte is not None
            where = "in the middle of the" if begun else "before any"
            stream.answer.broke(f"the connection was closed {where} answer", now)

    def _received(self, frame: Frame, now: float) -> None:
        """Data in mid-stream, nearly all of what comes, goes to its answer directly: h2 takes four times as long for it
        as everything else together, and only its windows and the ends of streams depend on it."""
        stream = self._streams.get(frame.stream)
        if frame.kind == DATA and not frame.flags and stream is not None and stream.plain:
            self._pass(len(frame.whole) - HEADER_BYTES)
            self._tell(stream, stream.answer.body, now, frame.whole[HEADER_BYTES:])
            return
        for event in self._h2.receive_data(frame.whole):
            self._happened(event, now)

    def _pass(self, size: int) -> None:
        """Opens the window again for data that h2 did not see."""
        self._passed += size
        if self._passed > WINDOW_BYTES // 2 and self.transport is not None:
            self.transport.write(window_update(self._passed))
            self._passed = 0

    def _check(self, data: bytes) -> None:
        if len(self._first) < 4:
            self._first += data
            if wrong := not_http2(self._first):
                raise ProtocolError(wrong)

    def _happened(self, event: Event, now: float) -> None:
        if isinstance(event, DataReceived):
            assert event.flow_controlled_length is not None
            self._inbox.took(event.flow_controlled_length)
            if stream := self._streams.get(event.stream_id):
                self._tell(stream, stream.answer.body, now, event.data or b"")
        elif isinstance(event, ResponseReceived):
            if stream := self._streams.get(event.stream_id):
                headers = dict(event.headers)
                stream.answer.began(now)
                stream.plain = b"content-length" not in headers
                self._tell(stream, stream.answer.head, now, headers)
        elif isinstance(event, TrailersReceived):
            if stream := self._streams.get(event.stream_id):
                self._tell(stream, stream.answer.trailers, now, dict(event.headers))
        elif isinstance(event, StreamEnded):
            if stream := self._gone(event.stream_id):
                self._tell(stream, stream.answer.complete, now)
        elif isinstance(event, StreamReset):
            if stream := self._gone(event.stream_id):
                self._reset(stream, event.error_code, now)
        elif isinstance(event, ConnectionTerminated):
            self._going_away(event, now)
        elif isinstance(event, RemoteSettingsChanged):
            self._settled, self._most = True, self._h2.remote_settings.max_concurrent_streams
            self._outbox.windows_opened()
        elif isinstance(event, WindowUpdated):
            self._outbox.windows_opened()

    @staticmethod
    def _tell(stream: Stream, hear: Callable[..., None], now: float, *what: Headers | bytes) -> None:
        if stream.answer.over.done():
            return
        try:
            hear(*what, now)
        except UNREADABLE as error:
            stream.answer.fail("protocol", str(error) or type(error).__name__, now)

    @staticmethod
    def _reset(stream: Stream, code: ErrorCodes | int | None, now: float) -> None:
        answer = stream.answer
        name = code.name if isinstance(code, ErrorCodes) else f"error {code}"
        if code in (ErrorCodes.REFUSED_STREAM, ErrorCodes.ENHANCE_YOUR_CALM):
            answer.unseen = code == ErrorCodes.REFUSED_STREAM and stream.early
            answer.fail("shed", f"the server turned the stream away: {name}", now)
        else:
            answer.broke(f"the server reset the stream: {name}", now)

    def _going_away(self, event: ConnectionTerminated, now: float) -> None:
        """Streams up to the last that the peer names go on here; it did not look at the others."""
        self.open = False
        last = event.last_stream_id or 0
        unseen = [stream for number, stream in self._streams.items() if number > last]
        for stream in unseen:
            self._gone(stream.number)
        unseen += self._waiting
        self._waiting.clear()
        for stream in unseen:
            stream.answer.unseen = True
            stream.answer.fail("connect", "the server goes away (GOAWAY) and did not take the request", now)

    def _admit(self) -> None:
        while self._waiting and self.open and len(self._streams) < self._most:
            stream = self._waiting.popleft()
            stream.early = not self._settled
            stream.number = self._h2.get_next_available_stream_id()
            self._streams[stream.number] = stream
            self._h2.send_headers(stream.number, stream.headers)
            self._outbox.put(stream.number, stream.body, end=True)

    def _gone(self, number: int | None) -> Stream | None:
        assert number is not None
        self._outbox.forget(number)
        return self._streams.pop(number, None)

    def _forgotten(self) -> list[Stream]:
        streams = [*self._streams.values(), *self._waiting]
        self._streams.clear()
        self._waiting.clear()
        return streams

    def _flush(self) -> None:
        data = self._h2.data_to_send()
        if data and self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)


class Http2:
    """The HTTP/2 side of a client; what is asked over it, and how the answer reads, a subclass may have otherwise."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._tls = tls_context(target, "h2") if target.tls else None
        self._pool = pool_of(target.shared_by, self._connect)

    async def chat(self, body: bytes, record: Record, deadline: float) -> None:
        for left in reversed(range(TRIES)):
            connection, _ = await self._pool.take(deadline - time.perf_counter())
            stream = self.request(body, record, deadline)
            await self._exchange(connection, stream, deadline)
            if not (stream.answer.unseen and left):
                return
            record.unsend()

    async def close(self) -> None:
        self._pool.close()

    def request(self, body: bytes, record: Record, deadline: float) -> Stream:
        """The stream that asks what ``body`` (JSON, of the OpenAI protocol) asks."""
        headers = self._headers(f"{self._target.base}/v1/chat/completions", b"application/json")
        headers += [
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", str(record.index).encode()),
        ]
        return Stream(headers, body, Http2Answer(record, asyncio.get_running_loop()))

    def _headers(self, path: str, content_type: bytes) -> list[Header]:
        target = self._target
        headers = [
            (b":method", b"POST"),
            (b":scheme", b"https" if target.tls else b"http"),
            (b":authority", target.authority.encode()),
            (b":path", path.encode()),
            (b"content-type", content_type),
        ]
        if target.api_key:
            headers.append((b"authorization", f"Bearer {target.api_key}".encode()))
        return headers

    async def _connect(self) -> Http2Connection:
        loop = asyncio.get_running_loop()
        transport, connection = await loop.create_connection(
            Http2Connection, self._target.host, self._target.port, ssl=self._tls
        )
        if self._tls is not None and transport.get_extra_info("ssl_object").selected_alpn_protocol() != "h2":
            connection.close()
            raise ConnectionError("the server does not speak HTTP/2 (ALPN)")
        return connection

    async def _exchange(self, connection: Http2Connection, stream: Stream, deadline: float) -> None:
        """Sends the request and waits until its answer is over."""
        answer = stream.answer
        timer = asyncio.get_running_loop().call_later(
            max(0.0, deadline - time.perf_counter()),
            lambda: answer.fail("timeout", "not ended in time", time.perf_counter()),
        )
        try:
            if connection.open:
                connection.send(stream)
            elif connection.wrong:
                answer.fail("protocol", connection.wrong, time.perf_counter())
            else:  # it was closed since it was taken
                answer.unseen = True
                answer.fail("connect", "the connection was closed before the request went out", time.perf_counter())
            await answer.over
        finally:
            timer.cancel()
            connection.cancel(stream)
            self._pool.give(connection)
