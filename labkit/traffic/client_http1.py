"""Chat requests over HTTP/1.1: a connection carries one at a time, and is kept for the next or closed after it."""

from __future__ import annotations

import asyncio
import time

from labkit.traffic.answer import UNREADABLE, HttpAnswer, Record
from labkit.traffic.http1 import ProtocolError, ResponseParser
from labkit.traffic.pool import OwnConnections
from labkit.traffic.target import Target, tls_context


class Http1Answer(HttpAnswer):
    """Reads one response from the bytes of its connection."""

    def __init__(self, record: Record, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(record, loop)
        self.parser = ResponseParser()

    def received(self, data: bytes, now: float) -> None:
        self.began(now)
        parser = self.parser
        try:
            body = parser.feed(data)
            if not self.status and parser.status:
                self.started(parser.status, parser.headers.get("content-type", ""))
            self.body(body, now)
            if parser.done and not self.over.done():
                self.complete(now)
        except (ProtocolError, *UNREADABLE) as error:
            self.fail("protocol", str(error) or type(error).__name__, now)

    def lost(self, now: float) -> None:
        """The connection is gone."""
        if self.over.done():
            return
        if self.parser.eof():
            try:
                self.complete(now)
            except UNREADABLE as error:
                self.fail("protocol", str(error) or type(error).__name__, now)
        else:
            begun = self.record.first_byte is not None
            self.broke(f"the connection was closed {'in the middle of the' if begun else 'before any'} answer", now)


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.answer: Http1Answer | None = None
        self.open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.open = transport, True

    def data_received(self, data: bytes) -> None:
        if self.answer is not None:
            self.answer.received(data, time.perf_counter())
        else:  # bytes that nobody asked for: this connection is of no further use
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self.answer is not None:
            self.answer.lost(time.perf_counter())

    def close(self) -> None:
        self.open = False
        if self.transport is not None:
            self.transport.abort()


class Http1:
    """The HTTP/1.1 side of a client."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._keep = target.transport != "http/1.1 close"
        self._tls = tls_context(target, "http/1.1") if target.tls else None
        self._pool = OwnConnections(target.shared_by, self._connect)

    async def chat(self, body: bytes, record: Record, deadline: float) -> None:
        payload = self._request_bytes(body, str(record.index))
        reused = True
        while reused:
            # An idle connection may have been closed by the peer as we wrote: such a request is sent once more.
            connection, reused = await self._pool.take(deadline - time.perf_counter())
            await self._exchange(connection, payload, record, deadline)
            reused = reused and record.failure == "connect"
            if reused:
                record.unsend()

    async def close(self) -> None:
        self._pool.close()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._target.host, self._target.port, ssl=self._tls)
        return connection

    async def _exchange(self, connection: _Connection, payload: bytes, record: Record, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        answer = Http1Answer(record, loop)
        connection.answer = answer
        assert connection.transport is not None
        connection.transport.write(payload)
        timer = loop.call_later(
            max(0.0, deadline - time.perf_counter()),
            lambda: answer.fail("timeout", "not ended in time", time.perf_counter()),
        )
        try:
            await answer.over
        finally:
            timer.cancel()
            connection.answer = None
            parser = answer.parser
            if not (self._keep and parser.done and parser.keep_alive and not parser.rest):
                connection.close()
            self._pool.give(connection)

    def _request_bytes(self, body: bytes, request_id: str) -> bytes:
        target = self._target
        lines = [
            f"POST {target.base}/v1/chat/completions HTTP/1.1",
            f"Host: {target.authority}",
            f"X-Request-Id: {request_id}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        ]
        if target.api_key:
            lines.append(f"Authorization: Bearer {target.api_key}")
        if not self._keep:
            lines.append("Connection: close")
        return "\r\n".join([*lines, "", ""]).encode() + body
