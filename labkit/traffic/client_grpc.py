"""Chat requests over gRPC, with its own Python library: a request is one server-streaming call on a channel."""

from __future__ import annotations

import asyncio
import json
import time

import grpc

from labkit.traffic.answer import Answer, Record
from labkit.traffic.pool import pool_of
from labkit.traffic.target import Target
from labkit.wire.generation_pb2 import GenerateChunk, GenerateRequest, Message

METHOD = "/labkit.v1.Generation/Generate"

OPTIONS = (
    # Without it all channels to one server share a connection, however many there are.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A server that was gone is tried again as the generator sends, not after gRPC's own growing pauses.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)

TURNED_AWAY = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
REQUEST_AT_FAULT = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.UNIMPLEMENTED,
)

BROKEN = ("socket closed", "connection reset", "broken pipe", "goaway", "rst_stream", "stream removed", "recvmsg",
          "failed to connect", "endpoint closing", "connection attempt timed out", "transport closed")  # fmt: skip
"""gRPC gives a broken connection a status as if the server had answered; only its words tell the two apart."""


def to_request(body: bytes, request_id: str) -> GenerateRequest:
    """The gRPC request that asks what a body of the OpenAI protocol asks."""
    asked = json.loads(body)
    request = GenerateRequest(
        messages=[Message(role=each["role"], content=each["content"]) for each in asked.get("messages", ())],
        max_tokens=asked.get("max_tokens", 0),
        model=asked.get("model", ""),
        request_id=request_id,
    )
    if asked.get("temperature") is not None:
        request.temperature = asked["temperature"]
    return request


class GrpcAnswer(Answer):
    """An answer from the chunks of a call, each of which says how many tokens it carries."""

    def __init__(self, record: Record, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(record, loop)
        self._tokens: list[int] = []

    def chunk(self, chunk: GenerateChunk, now: float) -> None:
        before = len(self.record.chunks)
        self.content(chunk.reasoning, chunk.text, now)
        if pieces := len(self.record.chunks) - before:
            self._tokens += [1] * (pieces - 1) + [max(1, chunk.tokens - (pieces - 1))]
        if chunk.finish_reason:
            self.record.finish_reason = chunk.finish_reason
        if chunk.HasField("usage"):
            self.record.prompt_tokens = chunk.usage.prompt_tokens
            self.record.completion_tokens = chunk.usage.completion_tokens

    def complete(self, now: float) -> None:
        finish = self.record.finish_reason
        if finish == "error":
            self.fail("stream_error", "the server ended the answer with finish_reason 'error'", now)
        elif not finish:
            self.fail("truncated", "the stream ended without a finish_reason", now)
        else:
            self.end(now)

    def refused(self, code: grpc.StatusCode, words: str, now: float) -> None:
        """The call ended with a status other than OK."""
        message = f"{code.name}: {words}"
        begun = bool(self.record.chunks)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            self.fail("timeout", message, now)
        elif "connection refused" in words.lower():
            self.fail("refused", "connection refused: no server listens there", now)
        elif "failed parsing http/2" in words.lower():
            self.fail("protocol", message, now)
        elif code is grpc.StatusCode.CANCELLED or any(word in words.lower() for word in BROKEN):
            self.fail("truncated" if begun else "connect", message, now)
        elif begun:
            self.fail("stream_error", message, now)
        elif code in TURNED_AWAY:
            self.fail("shed", message, now)
        else:
            self.fail("4xx" if code in REQUEST_AT_FAULT else "5xx", message, now)

    def end(self, now: float) -> None:
        super().end(now)
        told = zip(self.record.chunks, self._tokens, strict=True)
        self.record.chunks = [(t, tokens, part) for (t, _, part), tokens in told]


class _Channel:
    """A channel connects by itself, again if need be, and so is always open."""

    open = True

    def __init__(self, target: Target) -> None:
        self.channel = grpc.aio.insecure_channel(target.authority, options=OPTIONS)
        self.call = self.channel.unary_stream(
            METHOD,
            request_serializer=GenerateRequest.SerializeToString,
            response_deserializer=GenerateChunk.FromString,
        )
        self._closing: asyncio.Task[None] | None = None

    def close(self) -> None:
        self._closing = asyncio.ensure_future(self.channel.close())


class Grpc:
    """The gRPC side of a client."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._metadata = (("authorization", f"Bearer {target.api_key}"),) if target.api_key else ()
        self._channels: list[_Channel] = []
        self._pool = pool_of(target.shared_by, self._connect)

    async def chat(self, body: bytes, record: Record, deadline: float) -> None:
        request = to_request(body, str(record.index))
        channel, _ = await self._pool.take(deadline - time.perf_counter())
        answer = GrpcAnswer(record, asyncio.get_running_loop())
        call = channel.call(request, timeout=max(0.0, deadline - time.perf_counter()), metadata=self._metadata)
        try:
            await call.initial_metadata()
            answer.began(time.perf_counter())
            while (chunk := await call.read()) is not grpc.aio.EOF:
                answer.chunk(chunk, time.perf_counter())
            now = time.perf_counter()
            code = await call.code()
            if code is grpc.StatusCode.OK:
                answer.complete(now)
            else:
                answer.refused(code, await call.details(), now)
        except grpc.aio.AioRpcError as error:
            answer.refused(error.code(), error.details() or "", time.perf_counter())
        finally:
            call.cancel()
            self._pool.give(channel)

    async def close(self) -> None:
        self._pool.close()
        for channel in self._channels:
            await channel.channel.close()

    async def _connect(self) -> _Channel:
        self._channels.append(_Channel(self._target))
        return self._channels[-1]
