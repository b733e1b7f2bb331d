"""An answer on its way to the client: server-sent events or one JSON body, given up when nobody waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope, Send

from labkit.engine import Delta, EngineFailed, QueueFull
from labkit.serving.errors import ApiError
from labkit.serving.metrics import Metrics
from labkit.serving.options import ServerOptions, StreamingEngine
from labkit.serving.prompts import Work
from labkit.serving.protocol import ChatRequest, CompletionRequest
from labkit.serving.streams import Choice, ReasoningSplitter, chat_logprobs, completion_logprobs, deltas

logger = logging.getLogger(__name__)
RETRY_AFTER_S = "1"
ENCODER = json.JSONEncoder(separators=(",", ":"))
SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
# The answer's status is known once the engine has taken the request; it is sent with the first token, so that what can
# still be refused (a full queue, a failed engine) is refused with a status and not inside a 200.


@dataclass(frozen=True)
class Service:
    """What all requests of one server share."""

    engine: StreamingEngine
    options: ServerOptions
    metrics: Metrics


class Unread(Exception):
    """The client leaves what was sent to it unread."""


class Answer:
    """An ASGI response: runs the request on the engine and sends what comes. One instance answers one request."""

    def __init__(self, service: Service, request: ChatRequest | CompletionRequest, work: Work, received: float) -> None:
        self._service, self._request, self._work = service, request, work
        self._received = received
        self._chat = isinstance(request, ChatRequest)
        prefix, name = ("chatcmpl", "chat.completion") if self._chat else ("cmpl", "text_completion")
        if self._chat and request.stream:
            name += ".chunk"
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": name,
            "created": int(time.time()),
            "model": service.options.model_name,
        }
        think_end = _single_token(service.engine.tokenizer, "</think>") if self._chat else None
        self._choices = [
            Choice(job.index, ReasoningSplitter(work.opened_think) if self._chat else None, think_end)
            for job in work.jobs
        ]
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError for what is refused before the answer began."""
        metrics = self._service.metrics
        answer = asyncio.create_task(self._stream(send) if self._request.stream else self._whole(send))
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                answer.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await answer
                metrics.ended("cancelled", "client_gone")
                return
            answer.result()
            metrics.completed(time.monotonic() - self._received)
        except Unread:
            metrics.ended("cancelled", "client_not_reading")
        except ConnectionError:
            metrics.ended("cancelled", "client_gone")
        except Exception as error:
            refusal = as_api_error(error)
            if not self._started:
                raise refusal from error
            metrics.ended("failed", refusal.kind)
            await self._send(send, _event(refusal.body()), more=False)
        finally:
            answer.cancel()
            gone.cancel()

    async def _whole(self, send: Send) -> None:
        async for choice, delta in self._timed_deltas():
            choice.add(delta)
        body = {
            **self._head,
            "choices": [self._whole_choice(choice) for choice in self._choices],
            "usage": self._usage(),
        }
        await self._begin(send, [(b"content-type", b"application/json")])
        await self._send(send, json.dumps(body).encode(), more=False)

    async def _stream(self, send: Send) -> None:
        options = self._request.stream_options
        include = options.include_usage if options is not None else None
        continuous = bool(options and options.continuous_usage_stats)
        spoken: set[int] = set()
        finished = 0
        async for choice, delta in self._timed_deltas():
            offset = len(choice.text) if delta.logprobs else 0
            reasoning, text = choice.add(delta)
            finished += delta.finish_reason is not None
            first = choice.index not in spoken
            if not (first or reasoning or text or delta.finish_reason or delta.logprobs):
                continue
            chunk: dict[str, Any] = {
                **self._head,
                "choices": [self._chunk(choice, delta, reasoning, text, first, offset)],
            }
            if continuous or (include is None and finished == len(self._choices)):
                chunk["usage"] = self._usage()
            if not self._started:
                await self._begin(send, SSE_HEADERS)
            await self._send(send, _event(chunk))
            spoken.add(choice.index)
        last = b"data: [DONE]\n\n"
        if include:
            last = _event({**self._head, "choices": [], "usage": self._usage()}) + last
        await self._send(send, last, more=False)

    async def _timed_deltas(self) -> Any:
        """Deltas with their choices; a request that the engine gave up raises EngineFailed."""
        metrics = self._service.metrics
        times = [0.0] * len(self._choices)
        async with aclosing(deltas(self._service.engine, self._work.jobs)) as stream:  # type: ignore[type-var]
            async for index, delta in stream:
                now = time.monotonic()
                if times[index]:
                    metrics.itl.observe(now - times[index])
                else:
                    metrics.ttft.observe(now - self._received)
                times[index] = now
                if delta.finish_reason in ("error", "cancelled"):
                    raise EngineFailed("the engine gave this request up")
                yield self._choices[index], delta
        if any(choice.finish_reason is None for choice in self._choices):
            raise EngineFailed("the engine ended this request without a reason")

    def _chunk(
        self, choice: Choice, delta: Delta, reasoning: str, text: str, first: bool, offset: int
    ) -> dict[str, Any]:
        tokenizer = self._service.engine.tokenizer
        logprobs = list(delta.logprobs or ())
        if not self._chat:
            shown = completion_logprobs(tokenizer, logprobs, offset) if logprobs else None
            return {"index": choice.index, "text": text, "logprobs": shown, "finish_reason": delta.finish_reason}
        said: dict[str, str] = {}
        if first:
            said["role"] = "assistant"
        if reasoning:
            said["reasoning_content"] = reasoning
        if text or (first and not reasoning):
            said["content"] = text
        shown = chat_logprobs(tokenizer, logprobs) if logprobs else None
        return {"index": choice.index, "delta": said, "logprobs": shown, "finish_reason": delta.finish_reason}

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        tokenizer = self._service.engine.tokenizer
        if not self._chat:
            shown = completion_logprobs(tokenizer, choice.logprobs, 0) if choice.logprobs else None
            return {
                "index": choice.index,
                "text": choice.text,
                "logprobs": shown,
                "finish_reason": choice.finish_reason,
            }
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        if choice.reasoning_tokens:
            message["reasoning_content"] = choice.reasoning
        shown = chat_logprobs(tokenizer, choice.logprobs) if choice.logprobs else None
        return {"index": choice.index, "message": message, "logprobs": shown, "finish_reason": choice.finish_reason}

    def _usage(self) -> dict[str, Any]:
        completion = sum(choice.tokens for choice in self._choices)
        usage: dict[str, Any] = {
            "prompt_tokens": self._work.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._work.prompt_tokens + completion,
        }
        if self._chat:
            thought = sum(choice.reasoning_tokens for choice in self._choices)
            usage["completion_tokens_details"] = {"reasoning_tokens": thought}
        return usage

    async def _begin(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._started = True

    async def _send(self, send: Send, body: bytes, more: bool = True) -> None:
        """Waits while the client's and the server's buffers are full; raises Unread when that takes too long."""
        try:
            async with asyncio.timeout(self._service.options.send_timeout_s):
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError as error:
            raise Unread from error


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about an error; the details of one that nobody foresaw go to the log only."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        message = str(error) or "the queue is full; try again later"
        return ApiError(429, message, kind="queue_full", code="queue_full", headers={"retry-after": RETRY_AFTER_S})
    if isinstance(error, EngineFailed):
        return ApiError(503, f"the engine failed: {error}", kind="engine", code="engine_failed")
    if isinstance(error, ValueError):
        return ApiError(400, str(error))
    logger.error("a request failed in a way nobody foresaw", exc_info=error)
    return ApiError(500, "an internal error; the server's log has the details", kind="internal", code="internal_error")


def _event(payload: dict[str, Any]) -> bytes:
    return b"data: " + ENCODER.encode(payload).encode() + b"\n\n"


def _single_token(tokenizer: Any, text: str) -> int | None:
    token = tokenizer.convert_tokens_to_ids(text)
    return token if isinstance(token, int) and token != tokenizer.unk_token_id else None


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
