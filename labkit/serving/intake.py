"""What a request must pass, over whichever wire it came, before it reaches the engine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import ValidationError

from labkit.serving.errors import ApiError, from_validation
from labkit.serving.metrics import Metrics
from labkit.serving.options import ServerOptions, StreamingEngine
from labkit.serving.prompts import Work, chat_work, completion_work
from labkit.serving.protocol import ChatRequest, CompletionRequest

TOKENISER_THREADS = 2
LOADING_RETRY_S = "2"

Body = TypeVar("Body", ChatRequest, CompletionRequest)


@dataclass
class Service:
    """What all requests of one server share, whichever wire they come over."""

    engine: StreamingEngine
    options: ServerOptions
    metrics: Metrics
    pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(TOKENISER_THREADS, thread_name_prefix="tokenise")
    )
    draining: bool = False
    """True refuses new requests while running ones end."""

    @classmethod
    def of(cls, engine: StreamingEngine, options: ServerOptions) -> Service:
        return cls(engine, options, Metrics(engine))

    def require_ready(self) -> None:
        """Raises ApiError 503 while the engine loads, once it failed, and while the server stops."""
        retry = {"retry-after": LOADING_RETRY_S}
        if self.engine.failed is not None:
            raise ApiError(503, f"the engine failed: {self.engine.failed}", kind="engine", code="engine_failed")
        if self.draining:
            raise ApiError(503, "the server is stopping", kind="stopping", code="stopping", headers=retry)
        if not self.engine.ready:
            raise ApiError(
                503, "the model is still loading; try again later", kind="loading", code="loading", headers=retry
            )

    async def take(self, model: type[Body], body: bytes) -> tuple[Body, Work]:
        """A request body in JSON as what was asked and what the engine is to do. Raises ApiError 400 or 404."""
        try:
            asked = model.model_validate_json(body)
        except ValidationError as error:
            raise from_validation(error, body) from error
        names = (None, self.options.model_name, self.engine.deployment.model)
        if asked.model not in names:
            raise ApiError(
                404,
                f"model: there is no model {asked.model[:200]!r} here; this server serves {self.options.model_name!r}",
                param="model",
                code="model_not_found",
            )
        if isinstance(asked, ChatRequest):
            work = await chat_work(asked, self.engine, self.pool, self.options.default_temperature)
        else:
            work = await completion_work(asked, self.engine, self.pool, self.options.default_temperature)
        return asked, work

    def refused(self, refusal: ApiError) -> None:
        """Counts a request that was not answered whole."""
        self.metrics.ended("failed" if refusal.kind in ("engine", "internal") else "refused", refusal.kind)
