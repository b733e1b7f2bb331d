"""The routes of the server, and what a request must pass before it reaches the engine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from labkit.serving.answers import UNWRAPPED_SEND, Answer
from labkit.serving.errors import ApiError, as_api_error
from labkit.serving.intake import LOADING_RETRY_S, Service
from labkit.serving.metrics import CONTENT_TYPE
from labkit.serving.openapi import document
from labkit.serving.options import ServerOptions
from labkit.serving.protocol import ChatRequest, CompletionRequest

Body = TypeVar("Body", ChatRequest, CompletionRequest)


class _App(Starlette):
    """Starlette wraps ``send`` three times to learn that an answer began; a stream's tokens need not pass there."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[UNWRAPPED_SEND] = send
        await super().__call__(scope, receive, send)


def create_app(service: Service) -> Starlette:
    """The ASGI application. The engine is started and stopped by the caller; until it is ready, requests get a 503."""
    engine, options = service.engine, service.options
    created = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        service.pool.shutdown(wait=False, cancel_futures=True)

    def completions(model: type[Body]) -> Callable[[Request], Awaitable[Answer]]:
        async def endpoint(request: Request) -> Answer:
            service.require_ready()
            body = await _read_body(request, options)
            received = time.monotonic()
            asked, work = await service.take(model, body)
            return Answer(service, asked, work, received)

        return endpoint

    async def models(request: Request) -> Response:
        entry: dict[str, Any] = {"id": options.model_name, "object": "model", "created": created, "owned_by": "labkit"}
        if engine.ready:
            entry["max_model_len"] = engine.core.max_context
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(request: Request) -> Response:
        if engine.failed is not None:
            return JSONResponse({"status": "failed", "reason": engine.failed}, 503)
        if not engine.ready:
            return JSONResponse({"status": "loading"}, 503, {"retry-after": LOADING_RETRY_S})
        return JSONResponse({"status": "ok"})

    async def stats(request: Request) -> Response:
        reading = engine.stats()
        return JSONResponse({**dataclasses.asdict(reading), "kv_use": reading.kv_use})

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def openapi(request: Request) -> Response:
        return JSONResponse(document(options))

    def refuse(request: Request, error: Exception) -> Response:
        refusal = _http_error(error, request) if isinstance(error, HTTPException) else as_api_error(error)
        if request.url.path in COMPLETIONS:
            service.refused(refusal)
        return JSONResponse(refusal.body(), refusal.status, refusal.headers)

    def client_left(request: Request, error: Exception) -> Response:
        service.metrics.ended("cancelled", "client_gone")
        return Response(status_code=499)

    app = _App(
        routes=[
            Route("/v1/chat/completions", completions(ChatRequest), methods=["POST"]),
            Route("/v1/completions", completions(CompletionRequest), methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/stats", stats),
            Route("/openapi.json", openapi),
        ],
        middleware=[Middleware(_ApiKey, options.api_key)] if options.api_key else [],
        exception_handlers={
            ApiError: refuse,
            HTTPException: refuse,
            ClientDisconnect: client_left,
            Exception: refuse,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


COMPLETIONS = ("/v1/chat/completions", "/v1/completions")


class _ApiKey:
    """Everything under /v1/ needs the key; health, metrics and counters tell nothing about requests and stay open."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(given, self._expected):
                refusal = ApiError(
                    401, "no valid API key; send it as 'Authorization: Bearer KEY'", code="invalid_api_key"
                )
                answer = JSONResponse(refusal.body(), refusal.status, {"www-authenticate": "Bearer"})
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _read_body(request: Request, options: ServerOptions) -> bytes:
    """Raises ApiError 408, 413 or 415, and ClientDisconnect; reads no more than the limit and one chunk."""
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json":
        # Anything else would also let a page in a browser post here without asking first.
        raise ApiError(
            415, f"content-type: should be application/json; got {content_type[:100]!r}", kind="content_type"
        )
    limit = options.max_body_bytes
    too_large = ApiError(
        413,
        f"the body is over the limit of {limit} bytes",
        kind="too_large",
        code="body_too_large",
        headers={"connection": "close"},
    )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(options.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError as error:
        message = f"the body did not come within {options.body_timeout_s:g} s"
        raise ApiError(408, message, kind="slow_body", headers={"connection": "close"}) from error
    return bytes(body)


def _http_error(error: HTTPException, request: Request) -> ApiError:
    path = json.dumps(request.url.path[:200])
    if error.status_code == 404:
        return ApiError(404, f"there is no {path} here; see /openapi.json", kind="not_found", code="not_found")
    if error.status_code == 405:
        headers = dict(error.headers or {})
        allowed = headers.get("Allow", "another method")
        message = f"{path} takes {allowed}, not {request.method[:20]}"
        return ApiError(405, message, kind="method", code="method_not_allowed", headers=headers)
    return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
