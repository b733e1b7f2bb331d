"""The client: chat requests over kept-alive HTTP/1.1 connections, every event timed, every failure named.

Written on ``asyncio.Protocol`` because the client must not be what is measured: bytes are timed where they arrive, and
nothing is parsed beyond what the metrics need. Times are ``time.perf_counter`` (CLOCK_MONOTONIC on Linux: one clock for
all processes of the machine).
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from labkit.errors import UserError
from labkit.traffic.http1 import ProtocolError, ResponseParser, SseParser

FAILURES = ("refused", "connect", "timeout", "4xx", "shed", "5xx", "truncated", "stream_error", "protocol")
"""refused: nobody listens. connect: no connection, or it broke before the first byte. timeout: not ended in time.
shed: 429 or 503. 4xx, 5xx: other statuses. truncated: the answer began and did not end whole (no finish reason, no
``[DONE]``, no last chunk). stream_error: an error inside a 200. protocol: not HTTP, or not the JSON it should be."""

CONNECT_TIMEOUT_S = 10.0
MESSAGE_CHARACTERS = 300
TEXTLESS_TOKENS = 3


@dataclass(frozen=True)
class Target:
    """Where requests go. ``base`` is the path before ``/v1``."""

    host: str
    port: int
    tls: bool = False
    base: str = ""
    api_key: str | None = None

    @classmethod
    def parse(cls, url: str, api_key: str | None = None) -> Target:
        """Takes ``http://host:port``, also with a path or a trailing ``/v1``. Raises UserError for anything else."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise UserError(f"{url!r} is not an address: {error}; give it as http://127.0.0.1:8000") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{url!r} is not an address; give it as http://127.0.0.1:8000")
        tls = parts.scheme == "https"
        base = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if tls else 80), tls, base, api_key)

    def request_bytes(self, method: str, path: str, body: bytes, request_id: str) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {self.base}{path} HTTP/1.1", f"Host: {host}:{self.port}", f"X-Request-Id: {request_id}"]
        if self.api_key:
            lines.append(f"Authorization: Bearer {self.api_key}")
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass
class Record:
    """What happened to one request; times in seconds of ``time.perf_counter``, None where it did not come to it."""

    index: int
    bucket: str = ""
    family: str = ""
    scheduled: float = 0.0
    sent: float | None = None
    first_byte: float | None = None
    chunks: list[tuple[float, int, str]] = field(default_factory=list)
    """(time, tokens, "reasoning" or "answer"), one for each piece of content as it came."""
    end: float | None = None
    failure: str = ""
    """One of FAILURES, or empty for a whole answer."""
    message: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning: str = ""
    text: str = ""
    correct: bool | None = None


class _Exchange:
    """One request on its way: reads the response into the record and resolves ``over`` when it ended."""

    def __init__(self, record: Record, loop: asyncio.AbstractEventLoop) -> None:
        self.record = record
        self.over: asyncio.Future[None] = loop.create_future()
        self.parser = ResponseParser()
        self._sse: SseParser | None = None
        self._body = bytearray()
        self._saw_done = False
        self._lengths: list[int] = []

    def received(self, data: bytes, now: float) -> None:
        record = self.record
        if record.first_byte is None:
            record.first_byte = now
        try:
            streaming = self._sse is not None
            body = self.parser.feed(data)
            if not streaming and self.parser.status == 200:
                if self.parser.headers.get("content-type", "").startswith("text/event-stream"):
                    self._sse = SseParser()
            if self._sse is not None:
                for payload in self._sse.feed(body):
                    self._event(payload, now)
                    if self.over.done():
                        return
            else:
                self._body += body
            if self.parser.done:
                self._whole(now)
        except (ProtocolError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            self.fail("protocol", str(error) or type(error).__name__, now)

    def lost(self, now: float) -> None:
        """The connection is gone."""
        if self.over.done():
            return
        if self.parser.eof():
            self._whole(now)
        elif self.record.first_byte is None:
            self.fail("connect", "the connection was closed before any answer", now)
        else:
            self.fail("truncated", "the connection was closed in the middle of the answer", now)

    def fail(self, kind: str, message: str, now: float) -> None:
        if not self.over.done():
            self.record.failure, self.record.message = kind, message[:MESSAGE_CHARACTERS]
            self._end(now)

    def _event(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            self._saw_done = True
            return
        event = json.loads(payload)
        if event.get("error"):
            self.fail("stream_error", _error_message(event), now)
            return
        self._usage(event.get("usage"))
        for choice in event.get("choices", ()):
            delta = choice.get("delta") or {}
            self._content(delta.get("reasoning_content"), delta.get("content"), now)
            self.record.finish_reason = choice.get("finish_reason") or self.record.finish_reason

    def _content(self, reasoning: str | None, text: str | None, now: float) -> None:
        if reasoning:
            self.record.reasoning += reasoning
            self.record.chunks.append((now, 1, "reasoning"))
            self._lengths.append(len(reasoning))
        if text:
            self.record.text += text
            self.record.chunks.append((now, 1, "answer"))
            self._lengths.append(len(text))

    def _usage(self, usage: dict[str, Any] | None) -> None:
        if usage:
            self.record.prompt_tokens = int(usage.get("prompt_tokens") or 0)
            self.record.completion_tokens = int(usage.get("completion_tokens") or 0)

    def _whole(self, now: float) -> None:
        """The HTTP response is complete; whether the answer is, shows here."""
        status, record = self.parser.status, self.record
        if status != 200:
            kind = (
                "shed"
                if status in (429, 503)
                else "4xx"
                if 400 <= status < 500
                else "5xx"
                if status >= 500
                else "protocol"
            )
            try:
                message = _error_message(json.loads(self._body))
            except ValueError:
                message = self._body.decode("utf-8", "replace")
            self.fail(kind, f"{status}: {message}", now)
            return
        if self._sse is None:
            answer = json.loads(self._body)
            if answer.get("error"):
                self.fail("stream_error", _error_message(answer), now)
                return
            self._usage(answer.get("usage"))
            message = answer["choices"][0]["message"]
            self._content(message.get("reasoning_content"), message.get("content"), now)
            record.finish_reason = answer["choices"][0].get("finish_reason") or ""
            self._saw_done = True
        if record.finish_reason == "error":
            self.fail("stream_error", "the server ended the answer with finish_reason 'error'", now)
        elif not self._saw_done or not record.finish_reason:
            self.fail(
                "truncated",
                "the stream ended without " + ("[DONE]" if record.finish_reason else "a finish_reason"),
                now,
            )
        else:
            self._end(now)

    def _end(self, now: float) -> None:
        record = self.record
        record.end = now
        counts = tokens_by_chunk(record.completion_tokens, self._lengths)
        record.chunks = [(t, n, part) for (t, _, part), n in zip(record.chunks, counts, strict=True)]
        record.completion_tokens = record.completion_tokens or sum(counts)
        self.over.set_result(None)


def tokens_by_chunk(tokens: int, lengths: list[int]) -> list[int]:
    """How many tokens each chunk carried, from the total that ``usage`` gives and the characters of each chunk.

    The protocol does not say it. One a chunk where the numbers agree or no total is known; ``<think>``, ``</think>``
    and the end of the sequence are tokens without text, so up to three more agree too. What is over goes to the
    chunks in proportion to their length.
    """
    counts = [1] * len(lengths)
    spare = tokens - len(lengths)
    if spare <= (TEXTLESS_TOKENS if len(lengths) > TEXTLESS_TOKENS else 0) or not lengths:
        return counts
    total, given = sum(lengths), 0
    passed = 0
    for position, length in enumerate(lengths):
        passed += length
        share = spare * passed // total - given
        counts[position] += share
        given += share
    return counts


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.exchange: _Exchange | None = None
        self.open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.open = transport, True

    def data_received(self, data: bytes) -> None:
        if self.exchange is not None:
            self.exchange.received(data, time.perf_counter())
        else:  # bytes that nobody asked for: this connection is of no further use
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self.exchange is not None:
            self.exchange.lost(time.perf_counter())

    def close(self) -> None:
        self.open = False
        if self.transport is not None:
            self.transport.abort()


class Client:
    """Sends chat requests to one target over as many connections as are needed at once, and keeps them for reuse."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._idle: list[_Connection] = []
        self._tls = ssl.create_default_context() if target.tls else None

    async def chat(self, body: bytes, record: Record, timeout_s: float) -> None:
        """POSTs ``body`` to ``/v1/chat/completions`` and fills ``record`` in; it never raises for what the peer
        does."""
        payload = self._target.request_bytes("POST", "/v1/chat/completions", body, str(record.index))
        record.sent = time.perf_counter()
        reused = True
        while reused:
            # An idle connection may have been closed by the peer as we wrote: such a request is sent once more.
            try:
                connection, reused = await self._connection(timeout_s)
            except ConnectionRefusedError:
                self._never_connected(record, "refused", "connection refused: no server listens there")
                return
            except (OSError, TimeoutError) as error:
                self._never_connected(record, "connect", str(error) or "no connection in time")
                return
            await self._exchange(connection, payload, record, record.sent + timeout_s)
            reused = reused and record.failure == "connect"
            if reused:
                record.failure, record.message, record.end = "", "", None

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _connection(self, timeout_s: float) -> tuple[_Connection, bool]:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection, True
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(min(CONNECT_TIMEOUT_S, timeout_s)):
            _, connection = await loop.create_connection(
                _Connection, self._target.host, self._target.port, ssl=self._tls
            )
        return connection, False

    async def _exchange(self, connection: _Connection, payload: bytes, record: Record, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        exchange = _Exchange(record, loop)
        connection.exchange = exchange
        assert connection.transport is not None
        connection.transport.write(payload)
        timer = loop.call_later(
            max(0.0, deadline - time.perf_counter()),
            lambda: exchange.fail("timeout", "not ended in time", time.perf_counter()),
        )
        try:
            await exchange.over
        finally:
            timer.cancel()
            connection.exchange = None
            parser = exchange.parser
            if connection.open and parser.done and parser.keep_alive and not parser.rest:
                self._idle.append(connection)
            else:
                connection.close()

    @staticmethod
    def _never_connected(record: Record, kind: str, message: str) -> None:
        record.failure, record.message, record.end = kind, message[:MESSAGE_CHARACTERS], time.perf_counter()


def _error_message(answer: Any) -> str:
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
