"""How the golden server answers: what is scripted, on an absolute schedule, in the words of whichever transport."""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

FAULTS = ("", "reset", "4xx", "429", "503", "5xx", "truncate", "no finish", "data error", "stall", "garbage", "goaway")
"""reset: closed before any byte. truncate: closed after half of the tokens. no finish: a whole response whose stream
has neither finish reason nor ``[DONE]``. data error: an error after half of the tokens (``data: {"error": …}``, gRPC
INTERNAL). stall: silent after half of the tokens. garbage: bytes that are not the protocol. goaway (HTTP/2 and gRPC):
the request is not taken, those before it are. What closes a connection over HTTP/1.1 resets the stream over HTTP/2."""


@dataclass(frozen=True)
class Script:
    """How one request is answered; times in seconds after its last byte came in.

    Byte 0 of the answer (status and headers) goes out after ``headers_s``, token k after ``ttft_s + k * itl_s``, and
    the end with the last token. Token k reads `` {word}{k}``. ``reasoning`` of the tokens are sent as reasoning,
    ``tokens_per_chunk`` at a time.
    """

    ttft_s: float = 0.0
    itl_s: float = 0.0
    tokens: int = 8
    reasoning: int = 0
    tokens_per_chunk: int = 1
    headers_s: float = 0.0
    fault: str = ""
    word: str = "t"

    def __post_init__(self) -> None:
        if self.fault not in FAULTS:
            raise ValueError(f"fault must be one of {', '.join(map(repr, FAULTS))}; got {self.fault!r}")
        if self.tokens < 1 or self.tokens_per_chunk < 1 or not 0 <= self.reasoning < self.tokens:
            raise ValueError("tokens and tokens_per_chunk must be at least 1, reasoning below tokens")
        if min(self.ttft_s, self.itl_s, self.headers_s) < 0 or self.headers_s > self.ttft_s:
            raise ValueError("times must be at least 0, headers_s at most ttft_s")

    def due_s(self, token: int) -> float:
        """When token ``token`` is there, in seconds after the request."""
        return self.ttft_s + token * self.itl_s

    def text(self, first: int, last: int) -> str:
        """Tokens ``first`` to ``last``, both included."""
        return "".join(f" {self.word}{token}" for token in range(first, last + 1))

    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": 7, "completion_tokens": self.tokens, "total_tokens": 7 + self.tokens}


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


class Voice(ABC):
    """How one answer is said over a transport."""

    @abstractmethod
    def headers(self) -> None:
        """Status and headers of a streamed answer."""

    @abstractmethod
    def tokens(self, text: str, count: int, reasoning: bool) -> None: ...

    @abstractmethod
    def finish(self, usage: dict[str, int]) -> None:
        """Finish reason, usage and the end."""

    @abstractmethod
    def refuse(self, fault: str) -> None:
        """The status of ``4xx``, ``429``, ``503`` or ``5xx``."""

    @abstractmethod
    def error(self) -> None:
        """An error inside an answer that began."""

    @abstractmethod
    def end(self) -> None:
        """The end of a response whose answer has none."""

    @abstractmethod
    def cut(self) -> None:
        """Breaks the answer off."""

    @abstractmethod
    def garbage(self) -> None:
        """Bytes that are not the protocol."""

    @abstractmethod
    def go_away(self) -> None:
        """Takes neither this request nor any after it on this connection."""


class SseVoice(Voice):
    """The OpenAI protocol, streamed as server-sent events."""

    @abstractmethod
    def write(self, data: bytes) -> None: ...

    @abstractmethod
    def plain(self, status: int, answer: dict[str, Any]) -> None: ...

    def tokens(self, text: str, count: int, reasoning: bool) -> None:
        delta = {"reasoning_content" if reasoning else "content": text}
        self._event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})

    def finish(self, usage: dict[str, int]) -> None:
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        self._event({"choices": [], "usage": usage})
        self.write(b"data: [DONE]\n\n")
        self.end()

    def whole(self, reasoning: str, text: str, usage: dict[str, int]) -> None:
        """All of an answer that is not streamed."""
        message = {"role": "assistant", "content": text} | ({"reasoning_content": reasoning} if reasoning else {})
        self.plain(200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage})

    def refuse(self, fault: str) -> None:
        status = {"4xx": 400, "429": 429, "503": 503, "5xx": 500}[fault]
        self.plain(status, {"error": {"message": f"scripted {fault}"}})

    def error(self) -> None:
        self._event({"error": {"message": "scripted error", "type": "server_error"}})
        self.end()

    def _event(self, event: dict[str, Any]) -> None:
        self.write(b"data: " + json.dumps(event).encode() + b"\n\n")


class Streams(Protocol):
    """A connection of many streams, by number: HTTP/2's or HTTP/3's."""

    def headers(self, number: int, headers: list[tuple[bytes, bytes]]) -> None: ...
    def data(self, number: int, data: bytes, end: bool = False) -> None: ...
    def reset(self, number: int) -> None: ...
    def go_away(self, number: int) -> None: ...


P = TypeVar("P", bound=Streams)


class StreamVoice(SseVoice, Generic[P]):
    """On one stream of several; what is garbage there differs."""

    def __init__(self, peer: P, number: int) -> None:
        self._peer, self._number = peer, number

    def headers(self) -> None:
        self._peer.headers(self._number, [(b":status", b"200"), (b"content-type", b"text/event-stream")])

    def write(self, data: bytes) -> None:
        self._peer.data(self._number, data)

    def end(self) -> None:
        self._peer.data(self._number, b"", end=True)

    def cut(self) -> None:
        self._peer.reset(self._number)

    def go_away(self) -> None:
        self._peer.go_away(self._number)

    def plain(self, status: int, answer: dict[str, Any]) -> None:
        self._peer.headers(
            self._number, [(b":status", str(status).encode()), (b"content-type", b"application/json")]
        )  # fmt: skip
        self._peer.data(self._number, json.dumps(answer).encode(), end=True)


class Play:
    """Plays a script to one request."""

    def __init__(self, script: Script, answered: Answered, voice: Voice) -> None:
        self.script, self.answered, self.voice = script, answered, voice
        self._stopped = False

    def start(self, stream: bool) -> None:
        fault, voice = self.script.fault, self.voice
        if fault == "reset":
            voice.cut()
        elif fault == "goaway":
            voice.go_away()
        elif fault == "garbage":
            self._at(self.answered.received + self.script.ttft_s, voice.garbage)
        elif fault in ("4xx", "429", "503", "5xx"):
            voice.refuse(fault)
        elif stream:
            self._at(self.answered.received + self.script.headers_s, self._headers)
            self._step(0)
        else:
            due = self.answered.received + self.script.due_s(self.script.tokens - 1)
            self._at(due, lambda: self._whole(due))

    def stop(self) -> None:
        """Nobody listens any more."""
        self._stopped = True

    def _headers(self) -> None:
        self.answered.headers_sent = time.perf_counter()
        self.voice.headers()

    def _step(self, first: int) -> None:
        last = min(first + self.script.tokens_per_chunk, self.script.tokens) - 1
        due = self.answered.received + self.script.due_s(last)
        self._at(due, lambda: self._tokens(first, last, due))

    def _tokens(self, first: int, last: int, due: float) -> None:
        script, answered, voice = self.script, self.answered, self.voice
        if script.fault and first >= max(1, script.tokens // 2):
            broken = {"truncate": voice.cut, "data error": voice.error, "no finish": voice.end}
            if script.fault in broken:
                broken[script.fault]()
            answered.ended = time.perf_counter()
            return
        answered.sends.append((due, time.perf_counter()))
        voice.tokens(script.text(first, last), last + 1 - first, first < script.reasoning)
        if last + 1 == script.tokens:
            answered.ended = time.perf_counter()
            voice.finish(script.usage())
        else:
            self._step(last + 1)

    def _whole(self, due: float) -> None:
        script, answered = self.script, self.answered
        now = time.perf_counter()
        answered.sends.append((due, now))
        answered.headers_sent = answered.ended = now
        reasoning, text = script.text(0, script.reasoning - 1), script.text(script.reasoning, script.tokens - 1)
        assert isinstance(self.voice, SseVoice), "gRPC streams every answer"
        self.voice.whole(reasoning, text, script.usage())

    def _at(self, due: float, action: Callable[[], None]) -> None:
        """Runs ``action`` at ``due``, an absolute time, so that lateness does not add up."""
        asyncio.get_running_loop().call_later(max(0.0, due - time.perf_counter()), self._run, action)

    def _run(self, action: Callable[[], None]) -> None:
        if not self._stopped:
            action()
