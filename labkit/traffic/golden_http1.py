"""The golden server over HTTP/1.1."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from labkit.traffic.golden_play import Play, SseVoice, Voice

Begin = Callable[[str, float, Voice], Play]
"""From a request's id, the time when it was in, and who answers, to the play of its script."""


class Http1Voice(SseVoice):
    """``keep``: the connection takes another request afterwards."""

    def __init__(self, transport: asyncio.Transport, keep: bool) -> None:
        self._transport, self._keep = transport, keep
        self._began = False

    def headers(self) -> None:
        self._began = True
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
        self._transport.write(head + self._ending())

    def write(self, data: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def end(self) -> None:
        self._transport.write(b"0\r\n\r\n")
        self._close()

    def cut(self) -> None:
        if self._began:
            self._transport.close()
        else:
            self._transport.abort()

    def garbage(self) -> None:
        self._transport.write(b"220 smtp ready\r\n")

    def go_away(self) -> None:
        """HTTP/1.1 has only the end of the connection."""
        self._transport.abort()

    def plain(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        head = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % (status, len(body))
        self._transport.write(head + self._ending() + body)
        self._close()

    def _ending(self) -> bytes:
        return b"\r\n" if self._keep else b"Connection: close\r\n\r\n"

    def _close(self) -> None:
        if not self._keep:
            self._transport.close()


class Http1Peer(asyncio.Protocol):
    def __init__(self, begin: Begin) -> None:
        self._begin = begin
        self._buffer = b""
        self._plays: list[Play] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        for play in self._plays:
            play.stop()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
            length = int(headers.get("content-length", 0))
            if len(self._buffer) < end + 4 + length:
                return
            body, self._buffer = self._buffer[end + 4 : end + 4 + length], self._buffer[end + 4 + length :]
            self._answer(head[0].split(" ")[1], headers, body, now)

    def _answer(self, path: str, headers: dict[str, str], body: bytes, now: float) -> None:
        voice = Http1Voice(self._transport, headers.get("connection", "").lower() != "close")
        if path != "/v1/chat/completions":
            voice.plain(*page(path))
            return
        play = self._begin(headers.get("x-request-id", ""), now, voice)
        self._plays = [play]  # a connection carries one request at a time
        play.start(bool(json.loads(body).get("stream")))


def page(path: str) -> tuple[int, dict[str, Any]]:
    """Status and body of what is asked besides chats."""
    if path == "/v1/models":
        return 200, {"object": "list", "data": [{"id": "golden", "object": "model"}]}
    return (200 if path in ("/health", "/stats") else 404), {}
