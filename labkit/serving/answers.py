"""An answer on its way to the client: server-sent events or one JSON body, given up when nobody waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from contextlib import aclosing
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from starlette.types import Receive, Scope, Send

from labkit.serving.errors import as_api_error
from labkit.serving.intake import Service
from labkit.serving.pieces import Piece, Progress
from labkit.serving.prompts import Work
from labkit.serving.protocol import ChatRequest, CompletionRequest
from labkit.serving.streams import Choice, chat_logprobs, completion_logprobs
from labkit.serving.unread import Outbox, Unread

ENCODER = json.JSONEncoder(separators=(",", ":"))
SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
UNWRAPPED_SEND = "labkit.send"
"""The key of a scope under which the server's own ``send`` is."""
# The answer's status is known once the engine has taken the request; it is sent with the first token, so that what can
# still be refused (a full queue, a failed engine) is refused with a status and not inside a 200.


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
        self._progress = Progress(service, work, received, self._chat)
        self._choices = self._progress.choices
        self._outbox = Outbox(service.options.send_timeout_s)
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError for what is refused before the answer began."""
        metrics = self._service.metrics
        self._send_body = scope.get(UNWRAPPED_SEND, send)
        answer = asyncio.create_task(self._stream(send) if self._request.stream else self._whole(send))
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await self._outbox.first_of(answer, gone)
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
            await self._send(_event(refusal.body()), more=False)
        finally:
            answer.cancel()
            gone.cancel()

    async def _whole(self, send: Send) -> None:
        async with aclosing(self._progress.pieces()) as pieces:
            async for _ in pieces:
                pass
        body = {
            **self._head,
            "choices": [self._whole_choice(choice) for choice in self._choices],
            "usage": self._usage(),
        }
        await self._begin(send, [(b"content-type", b"application/json")])
        await self._send(json.dumps(body).encode(), more=False)

    async def _stream(self, send: Send) -> None:
        options = self._request.stream_options
        include = options.include_usage if options is not None else None
        continuous = bool(options and options.continuous_usage_stats)
        head = ENCODER.encode(self._head)[:-1]
        spoken: set[int] = set()
        finished = 0
        async with aclosing(self._progress.chunks()) as pieces:
            async for piece in pieces:
                finished += piece.finish_reason is not None
                index = piece.choice.index
                first = index not in spoken
                if not (first or piece.reasoning or piece.text or piece.finish_reason or piece.logprobs):
                    continue
                chunk = f'data: {head},"choices":[{self._chunk(piece, first)}]'
                if continuous or (include is None and finished == len(self._choices)):
                    chunk += f',"usage":{ENCODER.encode(self._usage())}'
                if not self._started:
                    await self._begin(send, SSE_HEADERS)
                await self._send(f"{chunk}}}\n\n".encode())
                spoken.add(index)
        last = b"data: [DONE]\n\n"
        if include:
            last = _event({**self._head, "choices": [], "usage": self._usage()}) + last
        await self._send(last, more=False)

    def _chunk(self, piece: Piece, first: bool) -> str:
        """A choice in JSON."""
        tokenizer = self._service.engine.tokenizer
        index, text, reason = piece.choice.index, piece.text, piece.finish_reason
        logprobs = list(piece.logprobs)
        if self._chat and text and not (first or piece.reasoning or logprobs or reason):
            # Most chunks are of this kind; written out, they cost a third.
            return f'{{"index":{index},"delta":{{"content":{quoted(text)}}},"logprobs":null,"finish_reason":null}}'
        if not self._chat:
            shown = completion_logprobs(tokenizer, logprobs, piece.offset) if logprobs else None
            return ENCODER.encode({"index": index, "text": text, "logprobs": shown, "finish_reason": reason})
        said: dict[str, str] = {}
        if first:
            said["role"] = "assistant"
        if piece.reasoning:
            said["reasoning_content"] = piece.reasoning
        if text or (first and not piece.reasoning):
            said["content"] = text
        shown = chat_logprobs(tokenizer, logprobs) if logprobs else None
        return ENCODER.encode({"index": index, "delta": said, "logprobs": shown, "finish_reason": reason})

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
        completion = self._progress.tokens
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

    async def _send(self, body: bytes, more: bool = True) -> None:
        await self._outbox.put(self._send_body({"type": "http.response.body", "body": body, "more_body": more}))


def _event(payload: dict[str, Any]) -> bytes:
    return b"data: " + ENCODER.encode(payload).encode() + b"\n\n"


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
