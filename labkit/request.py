"""The vocabulary that the engine, the server and the clients share: what is asked of a model and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when a request ends.

    ``temperature == 0`` is greedy. ``top_k == 0``, ``top_p == 1`` and ``min_p == 0`` switch those filters off; they
    apply in the order temperature, top-k, top-p, min-p. ``seed`` makes one request reproducible whatever it is batched
    with. ``logprobs`` is None for none, 0 for the chosen token's, k for the chosen and the k likeliest.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError naming the field and its limits."""
        _require(self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
        _require(0.0 <= self.temperature <= 100.0, "temperature", "between 0 and 100", self.temperature)
        _require(self.top_k >= 0, "top_k", "at least 0 (0 switches it off)", self.top_k)
        _require(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1", self.top_p)
        _require(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1", self.min_p)
        _require(self.seed is None or 0 <= self.seed < 2**63, "seed", "between 0 and 2**63 - 1", self.seed)
        _require(self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs", "between 0 and 20", self.logprobs)
        _require(len(self.stop) <= 16 and all(self.stop), "stop", "at most 16 strings, none empty", self.stop)


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (natural log, before temperature and filters) of a generated token, and of its rivals."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenOutput:
    """What one engine step adds to one request. The last one of a request carries ``finish_reason``."""

    request_id: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass(frozen=True)
class Delta:
    """What came of one answer since the last delta; the last one carries ``finish_reason``. ``text`` may be empty."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None


class QueueFull(Exception):
    """As many requests wait as the deployment allows; the caller may try again later."""


class EngineFailed(Exception):
    """The engine is not there: still loading, stopped, or failed for the reason given."""


@dataclass(frozen=True)
class EngineStats:
    """A reading of the engine, cheap enough to take many times a second. Counters only ever grow."""

    waiting: int = 0
    running: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache had, and that were not computed."""
    busy_s: float = 0.0

    @property
    def kv_use(self) -> float:
        """Fraction of the KV blocks in use, 0 to 1."""
        return self.kv_blocks_used / self.kv_blocks_total if self.kv_blocks_total else 0.0


def _require(ok: bool, field: str, limit: str, value: object) -> None:
    if not ok:
        raise ValueError(f"{field} must be {limit}, got {value!r}")
