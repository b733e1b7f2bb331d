"""One answer as a client sees it, whatever it came over: read into a record, every failure named."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from labkit.traffic.http1 import SseParser

FAILURES = ("refused", "connect", "timeout", "4xx", "shed", "5xx", "truncated", "stream_error", "protocol")
"""refused: nobody listens. connect: no connection, or it broke before the first byte. timeout: not ended in time.
shed: 429 or 503, gRPC's RESOURCE_EXHAUSTED or UNAVAILABLE, HTTP/2's REFUSED_STREAM. 4xx, 5xx: other statuses.
truncated: the answer began and did not end whole (no finish reason, no ``[DONE]``, no last chunk). stream_error: an
error inside an answer that began. protocol: not the protocol agreed on, or not the JSON it should be."""

MESSAGE_CHARACTERS = 300
TEXTLESS_TOKENS = 3


@dataclass
class Record:
    """What happened to one request; times in seconds of ``time.perf_counter``, None where it did not come to it."""

    index: int
    bucket: str = ""
    family: str = ""
    scheduled: float = 0.0
    sent: float | None = None
    """When it was handed to the client; a wait for a free connection comes after it."""
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

    def unsend(self) -> None:
        """Forgets a try that came to nothing; the request goes out once more."""
        self.failure, self.message, self.end = "", "", None


class Answer:
    """One request on its way: what comes goes into the record, and ``over`` is resolved when it ended."""

    def __init__(self, record: Record, loop: asyncio.AbstractEventLoop) -> None:
        self.record = record
        self.over: asyncio.Future[None] = loop.create_future()
        self.lengths: list[int] = []

    def began(self, now: float) -> None:
        if self.record.first_byte is None:
            self.record.first_byte = now

    def content(self, reasoning: str | None, text: str | None, now: float) -> None:
        """One token each until the end tells how many there were."""
        record = self.record
        if reasoning:
            record.reasoning += reasoning
            record.chunks.append((now, 1, "reasoning"))
            self.lengths.append(len(reasoning))
        if text:
            record.text += text
            record.chunks.append((now, 1, "answer"))
            self.lengths.append(len(text))

    def broke(self, why: str, now: float) -> None:
        """The connection or the stream is gone before its end."""
        self.fail("connect" if self.record.first_byte is None else "truncated", why, now)

    def fail(self, kind: str, message: str, now: float) -> None:
        if not self.over.done():
            self.record.failure, self.record.message = kind, message[:MESSAGE_CHARACTERS]
            self.end(now)

    def end(self, now: float) -> None:
        """No more comes; of a whole answer, the tokens are shared out over its chunks."""
        record = self.record
        record.end = now
        counts = tokens_by_chunk(record.completion_tokens, self.lengths)
        record.chunks = [(t, n, part) for (t, _, part), n in zip(record.chunks, counts, strict=True)]
        record.completion_tokens = record.completion_tokens or sum(counts)
        self.over.set_result(None)


class HttpAnswer(Answer):
    """An answer of the OpenAI protocol, streamed or whole. Whoever reads the wire calls ``started``, ``body`` and
    ``complete``, and may see ValueError, KeyError, TypeError, AttributeError or IndexError (UNREADABLE) of an answer
    that is not what it should be."""

    def __init__(self, record: Record, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(record, loop)
        self.status = 0
        self._sse: SseParser | None = None
        self._body = bytearray()
        self._saw_done = False

    def started(self, status: int, content_type: str) -> None:
        self.status = status
        if status == 200 and content_type.startswith("text/event-stream"):
            self._sse = SseParser()

    def body(self, data: bytes, now: float) -> None:
        if self._sse is None:
            self._body += data
            return
        for payload in self._sse.feed(data):
            self._event(payload, now)
            if self.over.done():
                return

    def complete(self, now: float) -> None:
        """The HTTP response is complete; whether the answer is, shows here."""
        record = self.record
        if self.status != 200:
            self._refused(now)
            return
        if self._sse is None:
            answer = json.loads(self._body)
            if answer.get("error"):
                self.fail("stream_error", error_message(answer), now)
                return
            self._usage(answer.get("usage"))
            message = answer["choices"][0]["message"]
            self.content(message.get("reasoning_content"), message.get("content"), now)
            record.finish_reason = answer["choices"][0].get("finish_reason") or ""
            self._saw_done = True
        if record.finish_reason == "error":
            self.fail("stream_error", "the server ended the answer with finish_reason 'error'", now)
        elif not self._saw_done or not record.finish_reason:
            missing = "[DONE]" if record.finish_reason else "a finish_reason"
            self.fail("truncated", f"the stream ended without {missing}", now)
        else:
            self.end(now)

    def _refused(self, now: float) -> None:
        try:
            message = error_message(json.loads(self._body))
        except ValueError:
            message = self._body.decode("utf-8", "replace")
        self.fail(kind_of_status(self.status), f"{self.status}: {message}", now)

    def _event(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            self._saw_done = True
            return
        event = json.loads(payload)
        if event.get("error"):
            self.fail("stream_error", error_message(event), now)
            return
        self._usage(event.get("usage"))
        for choice in event.get("choices", ()):
            delta = choice.get("delta") or {}
            self.content(delta.get("reasoning_content"), delta.get("content"), now)
            self.record.finish_reason = choice.get("finish_reason") or self.record.finish_reason

    def _usage(self, usage: dict[str, Any] | None) -> None:
        if usage:
            self.record.prompt_tokens = int(usage.get("prompt_tokens") or 0)
            self.record.completion_tokens = int(usage.get("completion_tokens") or 0)


UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, IndexError)


class StreamAnswer(HttpAnswer):
    """An answer on one stream of several. ``unseen``: the peer says that it did not process the request."""

    unseen = False


def kind_of_status(status: int) -> str:
    if status in (429, 503):
        return "shed"
    return "4xx" if 400 <= status < 500 else "5xx" if status >= 500 else "protocol"


def error_message(answer: Any) -> str:
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


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
