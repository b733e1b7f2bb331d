"""Chat requests over gRPC, on our own connections of HTTP/2: what gRPC's Python library takes for a message would be
taken for the server's. Requests and answers are as gRPC's PROTOCOL-HTTP2.md has them, uncompressed."""

from __future__ import annotations

import asyncio
import json
import math
import time
from enum import IntEnum
from urllib.parse import unquote

from google.protobuf.message import DecodeError

from labkit.traffic.answer import Answer, Record
from labkit.traffic.client_http2 import Headers, Http2, Stream
from labkit.traffic.grpc_messages import METHOD, framed, take_messages
from labkit.wire.generation_pb2 import GenerateChunk, GenerateRequest, Message

MOST_TIMEOUT_MS = 10**8 - 1
"""``grpc-timeout`` has eight digits."""


class Status(IntEnum):
    """The statuses of gRPC, by the numbers that they have in ``grpc-status``."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16

    @classmethod
    def _missing_(cls, value: object) -> Status:
        return cls.UNKNOWN


TURNED_AWAY = (Status.RESOURCE_EXHAUSTED, Status.UNAVAILABLE)
REQUEST_AT_FAULT = (
    Status.INVALID_ARGUMENT,
    Status.NOT_FOUND,
    Status.ALREADY_EXISTS,
    Status.PERMISSION_DENIED,
    Status.UNAUTHENTICATED,
    Status.FAILED_PRECONDITION,
    Status.OUT_OF_RANGE,
    Status.UNIMPLEMENTED,
)
OF_HTTP = {
    400: Status.INTERNAL,
    401: Status.UNAUTHENTICATED,
    403: Status.PERMISSION_DENIED,
    404: Status.UNIMPLEMENTED,
    429: Status.UNAVAILABLE,
    502: Status.UNAVAILABLE,
    503: Status.UNAVAILABLE,
    504: Status.UNAVAILABLE,
}
"""What a status of HTTP other than 200 means, from something between that does not speak gRPC
(http-grpc-status-mapping.md); UNKNOWN where it is not here."""


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
    """An answer from the chunks of a call, each of which says how many tokens it carries. ``head``, ``body`` and
    ``trailers`` raise ValueError for what is not gRPC. ``unseen``: the peer says that it did not process the request.
    """

    unseen = False

    def __init__(self, record: Record, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(record, loop)
        self._tokens: list[int] = []
        self._buffer = bytearray()
        self._code: Status | None = None
        self._words = ""

    def head(self, headers: Headers, now: float) -> None:
        self.trailers(headers, now)  # an answer that is nothing but a status has it here
        status = int(headers[b":status"])
        if self._code is not None:
            return
        if status != 200:
            self.refused(OF_HTTP.get(status, Status.UNKNOWN), f"HTTP status {status}", now)
        elif not (kind := headers.get(b"content-type", b"")).startswith(b"application/grpc"):
            raise ValueError(f"the server does not speak gRPC; it answers with {kind.decode('latin-1')!r}")

    def body(self, data: bytes, now: float) -> None:
        self._buffer += data
        try:
            for message in take_messages(self._buffer):
                self.chunk(GenerateChunk.FromString(message), now)
        except DecodeError as error:
            raise ValueError(f"a message that is no GenerateChunk: {error}") from error

    def trailers(self, headers: Headers, now: float) -> None:
        if (number := headers.get(b"grpc-status")) is not None:
            self._code = Status(int(number))
            self._words = unquote(headers.get(b"grpc-message", b"").decode("utf-8", "replace"))

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
        """The server closed the stream; whether the answer is whole, its status and its last chunk tell."""
        finish = self.record.finish_reason
        if self._code is None:
            self.broke("the stream ended without a grpc-status", now)
        elif self._code is not Status.OK:
            self.refused(self._code, self._words, now)
        elif self._buffer:
            self.fail("truncated", "the stream ended inside a message", now)
        elif finish == "error":
            self.fail("stream_error", "the server ended the answer with finish_reason 'error'", now)
        elif not finish:
            self.fail("truncated", "the stream ended without a finish_reason", now)
        else:
            self.end(now)

    def refused(self, code: Status, words: str, now: float) -> None:
        """The call ended with a status other than OK."""
        message = f"{code.name}: {words}"
        if code is Status.DEADLINE_EXCEEDED:
            self.fail("timeout", message, now)
        elif code is Status.CANCELLED:
            self.broke(message, now)
        elif self.record.chunks:
            self.fail("stream_error", message, now)
        elif code in TURNED_AWAY:
            self.fail("shed", message, now)
        else:
            self.fail("4xx" if code in REQUEST_AT_FAULT else "5xx", message, now)

    def broke(self, why: str, now: float) -> None:
        """The headers of a call say nothing yet (a server may send them before it looks at the request): an answer
        begins with its first chunk."""
        self.fail("truncated" if self.record.chunks else "connect", why, now)

    def end(self, now: float) -> None:
        super().end(now)
        told = zip(self.record.chunks, self._tokens, strict=True)
        self.record.chunks = [(t, tokens, part) for (t, _, part), tokens in told]


class Grpc(Http2):
    """The gRPC side of a client."""

    def request(self, body: bytes, record: Record, deadline: float) -> Stream:
        """The call that asks what ``body`` (JSON, of the OpenAI protocol) asks."""
        left_ms = math.ceil(max(0.0, deadline - time.perf_counter()) * 1e3)
        headers = self._headers(METHOD, b"application/grpc")
        headers += [(b"te", b"trailers"), (b"grpc-timeout", b"%dm" % min(left_ms, MOST_TIMEOUT_MS))]
        message = to_request(body, str(record.index)).SerializeToString()
        return Stream(headers, framed(message), GrpcAnswer(record, asyncio.get_running_loop()))
