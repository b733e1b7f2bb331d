"""The gRPC server: the service of ``labkit/wire/generation.proto``, on the same path to the engine as HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from contextlib import aclosing
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from labkit.errors import UserError
from labkit.serving.errors import ApiError, as_api_error, invalid
from labkit.serving.http import MOST_STREAMS
from labkit.serving.intake import Service
from labkit.serving.pieces import Piece, Progress, joined_while_busy
from labkit.serving.prompts import Work
from labkit.serving.protocol import ChatRequest, CompletionRequest
from labkit.serving.unread import Outbox, Unread
from labkit.wire import generation_pb2, generation_pb2_grpc

SERVICE: str = generation_pb2.DESCRIPTOR.services_by_name["Generation"].full_name
HEALTH_POLL_S = 0.05
STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
}


class Generation(generation_pb2_grpc.GenerationServicer):
    """The handlers; one instance answers all requests of a server."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Generate(self, request: Any, context: Any) -> None:
        """Streams the chunks. A client that leaves, or whose deadline passes, cancels its request on the engine."""
        metrics = self._service.metrics
        received = time.monotonic()
        try:
            self._require_key(context)
            self._service.require_ready()
            chat = bool(request.messages)
            body = _as_json(request)
            take = self._service.take
            _, work = await (take(ChatRequest, body) if chat else take(CompletionRequest, body))
            if request.request_id:
                await context.send_initial_metadata((("x-request-id", request.request_id),))
            await self._answer(Progress(self._service, work, received, chat), work, context)
            metrics.completed(time.monotonic() - received)
        except asyncio.CancelledError:
            # Also when its deadline passed: that the client says by leaving, or else this server's clock does it, which
            # starts later by the time the request was on its way. Which comes first is chance.
            metrics.ended("cancelled", "client_gone")
            raise
        except Unread:
            metrics.ended("cancelled", "client_not_reading")
            await context.abort(grpc.StatusCode.ABORTED, "what was sent was not read")
        except Exception as error:
            refusal = as_api_error(error)
            self._service.refused(refusal)
            await context.abort(STATUS.get(refusal.status, grpc.StatusCode.UNKNOWN), refusal.message)

    async def _answer(self, progress: Progress, work: Work, context: Any) -> None:
        """A message costs this server and most clients more than a token does: tokens that come while one is being
        written share the next. Raises Unread, and what the engine raises."""
        outbox = Outbox(self._service.options.send_timeout_s)

        async def write() -> None:
            unsaid = 0
            async with aclosing(joined_while_busy(progress.chunks())) as pieces:
                async for piece in pieces:
                    unsaid += piece.tokens
                    if piece.reasoning or piece.text or piece.finish_reason:
                        await outbox.put(context.write(_message(piece, unsaid, progress, work)))
                        unsaid = 0

        writing = asyncio.create_task(write())
        try:
            await outbox.first_of(writing)
            writing.result()
        finally:
            if not writing.done():
                writing.cancel()
                await asyncio.wait((writing,))

    def _require_key(self, context: Any) -> None:
        expected = self._service.options.api_key
        given = next((value for name, value in context.invocation_metadata() if name == "authorization"), "")
        if expected and not hmac.compare_digest(str(given).encode(), f"Bearer {expected}".encode()):
            raise ApiError(
                401, "no valid API key; send it as metadata 'authorization: Bearer KEY'", kind="key", code="key"
            )


def _as_json(request: Any) -> bytes:
    """The request as the HTTP API would have it, so that one set of rules checks both."""
    if request.messages and request.prompt:
        raise invalid("prompt", "should be empty when there are messages")
    if not request.messages and not request.prompt:
        raise invalid("messages", "this field is required, or else a prompt")
    body: dict[str, Any] = {"stream": True, "ignore_eos": request.ignore_eos}
    if request.messages:
        body["messages"] = [{"role": each.role, "content": each.content} for each in request.messages]
    else:
        body["prompt"] = request.prompt
    if request.max_tokens:
        body["max_tokens"] = request.max_tokens
    if request.HasField("temperature"):
        body["temperature"] = request.temperature
    if request.model:
        body["model"] = request.model
    return json.dumps(body).encode()


def _message(piece: Piece, tokens: int, progress: Progress, work: Work) -> Any:
    message = generation_pb2.GenerateChunk(reasoning=piece.reasoning, text=piece.text, tokens=tokens)
    if piece.finish_reason is not None:
        message.finish_reason = piece.finish_reason
        message.usage.prompt_tokens = work.prompt_tokens
        message.usage.completion_tokens = progress.tokens
    return message


class GrpcServer:
    """A ``grpc.aio`` server with the health service and reflection, for the event loop that it is made in."""

    def __init__(self, service: Service, host: str, port: int) -> None:
        """Binds the address; ``port`` 0 takes a free one. Raises UserError when the address cannot be had."""
        self._service = service
        self._server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),  # a second server on a port in use must fail, not share its connections
                ("grpc.max_receive_message_length", service.options.max_body_bytes),
                ("grpc.max_concurrent_streams", MOST_STREAMS),
                ("grpc.max_metadata_size", 64 * 1024),
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 20_000),
            ]
        )
        generation_pb2_grpc.add_GenerationServicer_to_server(Generation(service), self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port: int = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise UserError(
                f"cannot listen on {address}: {error}; choose another --port (0: a free one) or --host"
            ) from error

    async def serve(self, stop: asyncio.Event) -> None:
        """Serves until ``stop``, then lets running requests end for as long as the options say."""
        await self._server.start()
        watch = asyncio.create_task(self._tell_health())
        try:
            await stop.wait()
        finally:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch
            await self._health.enter_graceful_shutdown()
            await self._server.stop(self._service.options.drain_s)

    async def _tell_health(self) -> None:
        told = None
        while True:
            engine = self._service.engine
            serving = engine.ready and engine.failed is None and not self._service.draining
            if serving is not told:
                told = serving
                kind = health_pb2.HealthCheckResponse
                for name in ("", SERVICE):
                    await self._health.set(name, kind.SERVING if serving else kind.NOT_SERVING)
            await asyncio.sleep(HEALTH_POLL_S)
