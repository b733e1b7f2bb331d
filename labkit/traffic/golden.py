"""The golden server: a chat server whose every send is scripted, happens on an absolute schedule, and is written down.

What a client reports about it can be checked exactly, and how much time a client adds can be told from the server's.
``python -m labkit.traffic.golden --port 0`` runs it in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

FAULTS = ("", "reset", "4xx", "429", "503", "5xx", "truncate", "no finish", "data error", "stall", "garbage")
"""reset: closed before any byte. truncate: closed after half of the tokens. no finish: a whole HTTP response whose
stream has neither finish reason nor ``[DONE]``. data error: ``data: {"error": …}`` after half of the tokens. stall:
silent after half of the tokens. garbage: bytes that are not HTTP."""


@dataclass(frozen=True)
class Script:
    """How one request is answered; times in seconds after its last byte came in.

    Byte 0 of the answer (status and headers) goes out after ``headers_s``, token k after ``ttft_s + k * itl_s``, and
    the end with the last token. ``reasoning`` of the tokens are sent as ``reasoning_content``, ``tokens_per_chunk``
    at a time.
    """

    ttft_s: float = 0.0
    itl_s: float = 0.0
    tokens: int = 8
    reasoning: int = 0
    tokens_per_chunk: int = 1
    headers_s: float = 0.0
    fault: str = ""

    def __post_init__(self) -> None:
        if self.fault not in FAULTS:
            raise ValueError(f"fault must be one of {', '.join(map(repr, FAULTS))}; got {self.fault!r}")
        if self.tokens < 1 or self.tokens_per_chunk < 1 or not 0 <= self.reasoning < self.tokens:
            raise ValueError("tokens and tokens_per_chunk must be at least 1, reasoning below tokens")
        if min(self.ttft_s, self.itl_s, self.headers_s) < 0 or self.headers_s > self.ttft_s:
            raise ValueError("times must be at least 0, headers_s at most ttft_s")


@dataclass
class Answered:
    """What the server did for one request. Times are ``time.perf_counter``, ``sends`` one (due, done) for each token
    chunk."""

    request_id: str
    received: float
    fault: str = ""
    headers_sent: float | None = None
    sends: list[tuple[float, float]] = field(default_factory=list)
    ended: float | None = None


class _Peer(asyncio.Protocol):
    def __init__(self, server: Golden) -> None:
        self.server = server
        self.buffer = b""
        self.timers: list[asyncio.TimerHandle] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in self.timers:
            timer.cancel()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
            length = int(headers.get("content-length", 0))
            if len(self.buffer) < end + 4 + length:
                return
            body, self.buffer = self.buffer[end + 4 : end + 4 + length], self.buffer[end + 4 + length :]
            self._answer(head[0].split(" ")[1], headers.get("x-request-id", ""), body, now)

    def _answer(self, path: str, request_id: str, body: bytes, now: float) -> None:
        if path == "/v1/models":
            self._plain(200, {"object": "list", "data": [{"id": "golden", "object": "model"}]})
        elif path != "/v1/chat/completions":
            self._plain(200 if path in ("/health", "/stats") else 404, {})
        else:
            request = json.loads(body)
            script = self.server.script_for(request_id)
            answered = Answered(request_id, now, script.fault)
            self.server.answered.append(answered)
            self._play(script, answered, bool(request.get("stream")))

    def _play(self, script: Script, answered: Answered, stream: bool) -> None:
        refusals = {"4xx": 400, "429": 429, "503": 503, "5xx": 500}
        if script.fault == "reset":
            self.transport.abort()
        elif script.fault == "garbage":
            self.transport.write(b"220 smtp ready\r\n")
        elif script.fault in refusals:
            self._plain(refusals[script.fault], {"error": {"message": f"scripted {script.fault}"}})
        elif stream:
            self._at(answered.received + script.headers_s, lambda: self._headers(answered))
            self._step(script, answered, 0)
        else:
            due = answered.received + script.ttft_s + (script.tokens - 1) * script.itl_s
            self._at(due, lambda: self._whole(script, answered, due))

    def _step(self, script: Script, answered: Answered, first: int) -> None:
        if first >= script.tokens:
            return
        last = min(first + script.tokens_per_chunk, script.tokens) - 1
        due = answered.received + script.ttft_s + last * script.itl_s
        self._at(due, lambda: self._tokens(script, answered, first, last, due))

    def _tokens(self, script: Script, answered: Answered, first: int, last: int, due: float) -> None:
        if script.fault and first >= max(1, script.tokens // 2):
            if script.fault == "truncate":
                self.transport.close()
            elif script.fault == "data error":
                self._chunk({"error": {"message": "scripted error", "type": "server_error"}})
                self.transport.write(b"0\r\n\r\n")
            elif script.fault == "no finish":
                self.transport.write(b"0\r\n\r\n")
            answered.ended = time.perf_counter()
            return
        part = "reasoning_content" if first < script.reasoning else "content"
        delta = {part: "".join(f" t{position}" for position in range(first, last + 1))}
        answered.sends.append((due, time.perf_counter()))
        self._chunk({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        if last + 1 == script.tokens:
            self._chunk({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            self._chunk({"choices": [], "usage": _usage(script)})
            answered.ended = time.perf_counter()
            self.transport.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        else:
            self._step(script, answered, last + 1)

    def _whole(self, script: Script, answered: Answered, due: float) -> None:
        answered.sends.append((due, time.perf_counter()))
        parts = [f" t{position}" for position in range(script.tokens)]
        message = {"role": "assistant", "content": "".join(parts[script.reasoning :])}
        if script.reasoning:
            message["reasoning_content"] = "".join(parts[: script.reasoning])
        answered.headers_sent = answered.ended = answered.sends[0][1]
        self._plain(
            200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": _usage(script)}
        )

    def _headers(self, answered: Answered) -> None:
        answered.headers_sent = time.perf_counter()
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )

    def _chunk(self, event: dict[str, Any]) -> None:
        data = b"data: " + json.dumps(event).encode() + b"\n\n"
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _plain(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.transport.write(
            b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
            + body
        )

    def _at(self, due: float, action: Callable[[], None]) -> None:
        """Runs ``action`` at ``due``, an absolute time, so that lateness does not add up."""
        loop = asyncio.get_running_loop()
        self.timers = [timer for timer in self.timers if timer.when() > loop.time()]
        self.timers.append(loop.call_later(max(0.0, due - time.perf_counter()), action))


class Golden:
    """The server in a thread of its own: ``with Golden(scripts) as golden: … golden.url``.

    Request with ``X-Request-Id: n`` (or else the n-th request) is played script ``n % len(scripts)``.
    """

    def __init__(self, scripts: Sequence[Script] = (Script(),), port: int = 0) -> None:
        self.scripts = tuple(scripts)
        self.answered: list[Answered] = []
        self.port = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="golden", daemon=True)

    def script_for(self, request_id: str) -> Script:
        number = int(request_id) if request_id.isdigit() else len(self.answered)
        return self.scripts[number % len(self.scripts)]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Golden:
        self._thread.start()
        starting = self._loop.create_server(lambda: _Peer(self), "127.0.0.1", self.port, backlog=4096)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result()
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def write_log(self, out: TextIO) -> None:
        """One line of JSON for every request answered."""
        for answered in self.answered:
            out.write(json.dumps(asdict(answered)) + "\n")


def _usage(script: Script) -> dict[str, int]:
    return {"prompt_tokens": 7, "completion_tokens": script.tokens, "total_tokens": 7 + script.tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description="A chat server whose every send is scripted and written down.")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument(
        "--script", default="[{}]", help="JSON list of scripts: ttft_s, itl_s, tokens, reasoning, fault …"
    )
    parser.add_argument("--log", type=Path, help="where to write what was sent when, as JSONL, on end of input")
    options = parser.parse_args()
    try:
        scripts = [Script(**script) for script in json.loads(options.script)]
    except (ValueError, TypeError) as error:
        parser.error(f"--script: {error}")
    gc.disable()
    with Golden(scripts, options.port) as golden:
        print(f"ready on {golden.url}", flush=True)
        sys.stdin.read()
        if options.log:
            with open(options.log, "w") as out:
                golden.write_log(out)


if __name__ == "__main__":
    main()
