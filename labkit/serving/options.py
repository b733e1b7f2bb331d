"""What the server is told, apart from the deployment it serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from labkit.deployment import Deployment
from labkit.request import EngineStats, SamplingParams


class StreamingEngine(Protocol):
    """What the server needs of an engine (``labkit.engine.AsyncEngine``)."""

    tokenizer: Any
    deployment: Deployment

    ready: bool
    failed: str | None
    core: Any
    """Has ``max_context``; None until the model is loaded."""

    def stream(self, prompt_ids: list[int], sampling: SamplingParams) -> Any: ...
    def stats(self) -> EngineStats: ...


@dataclass(frozen=True)
class ServerOptions:
    """``model_name`` is what clients call the model. Times in seconds."""

    model_name: str = "model"
    api_key: str | None = None
    max_body_bytes: int = 4 << 20
    default_temperature: float = 1.0
    """For requests that give none: OpenAI's 1.0, or 0 where the model's generation_config.json says not to sample."""
    body_timeout_s: float = 30.0
    """How long a client may take to send a request's body."""
    send_timeout_s: float = 30.0
    """How long a client may leave what was sent to it unread before its request is cancelled."""
    drain_s: float = 3.0
    """How long running requests may go on once the server is told to stop."""
