"""A workload: what is sent, when, and for how long. The whole schedule follows from the seed."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from labkit.errors import UserError

ARTICLE_TIMEOUT_S = 5.0
"""The article's client gave up after 5 s. A longer timeout measures the same service without cutting its tail off;
what a limit of 5 s would have made of it can be computed afterwards (goodput under an SLO)."""

MIX_BLOCK = 20
"""Every so many requests in a row hold the mix's shares exactly (rounding carried on), in shuffled order."""


@dataclass(frozen=True)
class Workload:
    """Traffic to send at a deployment. A wrong value raises ValueError naming the field and what it may be.

    ``requests`` or ``duration_s`` (one of them; neither with a trace, which then runs to its end) is the measured
    part. It begins after ``ramp_s + warmup_s``; what is sent before that is not measured.
    """

    name: str = "workload"
    mix: tuple[tuple[str, float], ...] = (("short", 0.6), ("medium", 0.3), ("long", 0.1))
    """Shares of the prompt-length buckets; they sum to 1. A dict is taken as well."""
    arrivals: Literal["closed", "poisson", "constant", "bursty", "trace"] = "closed"
    """Closed: each user waits for the answer before asking again. Open (the others): requests come when they come."""
    users: int = 8
    """Closed loop: users at once."""
    think_s: float = 0.0
    """Closed loop: pause between an answer and the user's next request."""
    rate: float = 1.0
    """Open loop: requests per second."""
    cv: float = 3.0
    """Bursty arrivals: coefficient of variation of the (gamma distributed) gaps; 1 would be Poisson."""
    trace: str | None = None
    """A JSONL file; each line holds ``t`` (s, rising) and ``bucket``, or ``prompt`` with optional ``answer`` and
    ``max_tokens``."""
    requests: int | None = None
    duration_s: float | None = None
    ramp_s: float = 0.0
    """Users or rate rise linearly from nothing over this time."""
    warmup_s: float = 0.0
    timeout_s: float = 60.0
    """A request that has not ended after this time has failed."""
    max_tokens: int = 256
    stream: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            if getattr(hints[field.name], "__origin__", None) is Literal:
                _require(getattr(self, field.name) in get_args(hints[field.name]), field.name,
                         f"one of {', '.join(get_args(hints[field.name]))}", getattr(self, field.name))  # fmt: skip
        mix = self.mix.items() if isinstance(self.mix, dict) else self.mix
        object.__setattr__(self, "mix", tuple((str(bucket), float(share)) for bucket, share in mix))
        shares = [share for _, share in self.mix]
        _require(
            {bucket for bucket, _ in self.mix} <= {"short", "medium", "long"},
            "mix",
            "over short, medium, long",
            self.mix,
        )
        _require(all(s >= 0 for s in shares) and math.isclose(sum(shares), 1.0, abs_tol=1e-6),
                 "mix", "shares of at least 0 that sum to 1", self.mix)  # fmt: skip
        for name, least in (("users", 1), ("max_tokens", 1), ("requests", 1), ("seed", 0)):
            value = getattr(self, name)
            _require((value is None and name == "requests") or (_is_whole(value) and value >= least),
                     name, f"a whole number of at least {least}", value)  # fmt: skip
        for name in ("think_s", "ramp_s", "warmup_s"):
            _require(
                _is_number(getattr(self, name)) and getattr(self, name) >= 0, name, "at least 0", getattr(self, name)
            )
        for name in ("rate", "cv", "timeout_s", "duration_s"):
            value = getattr(self, name)
            _require(
                (value is None and name == "duration_s") or (_is_number(value) and value > 0), name, "above 0", value
            )
        _require((self.arrivals == "trace") == (self.trace is not None), "trace",
                 "a JSONL file exactly when arrivals is 'trace'", self.trace)  # fmt: skip
        bounds = (self.requests is not None) + (self.duration_s is not None)
        if bounds > 1 or (bounds == 0 and self.arrivals != "trace"):
            raise ValueError("a workload has either requests or duration_s: how much of it is measured")

    @classmethod
    def article(cls, **changes: Any) -> Workload:
        """The article's traffic: 60 % short prompts (< 512 tokens), 30 % medium, 10 % long (2048 or more)."""
        bounds: dict[str, Any] = {} if "duration_s" in changes or changes.get("trace") else {"requests": 40}
        return cls(**{"name": "article", **bounds, **changes})

    def but(self, **changes: Any) -> Workload:
        """The same workload with some fields changed."""
        return replace(self, **changes)

    @property
    def open_loop(self) -> bool:
        return self.arrivals != "closed"

    @property
    def measured_from_s(self) -> float:
        """When the measured part begins, in seconds after the start."""
        return self.ramp_s + self.warmup_s

    def to_json(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "mix": dict(self.mix)})

    @classmethod
    def from_json(cls, text: str) -> Workload:
        """Raises ValueError for text that is no JSON object or names a field that does not exist."""
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a workload is a JSON object; {error}") from error
        if not isinstance(fields, dict):
            raise ValueError("a workload is a JSON object of field: value")
        unknown = set(fields) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"no such field of a workload: {', '.join(sorted(unknown))}")
        return cls(**fields)


@dataclass(frozen=True)
class Arrival:
    """One intended request. ``t_s`` is when it is to be sent (s after the start; None in a closed loop: when a user
    is free)."""

    index: int
    t_s: float | None
    bucket: str
    prompt: str | None = None
    answer: str | None = None
    max_tokens: int | None = None


def schedule(workload: Workload) -> Iterator[Arrival]:
    """The intended requests in order; endless in a closed loop, which ends by the clock or by the count of requests.

    Several client processes share one schedule (each takes every n-th request), so that their union is this schedule
    and not a superposition of processes that happen to draw the same numbers. Raises UserError for a bad trace.
    """
    if workload.arrivals == "trace":
        yield from _trace(workload)
        return
    buckets = _buckets(workload)
    if workload.arrivals == "closed":
        for index, bucket in enumerate(buckets):
            yield Arrival(index, None, bucket)
    measured = 0
    for index, (t_s, bucket) in enumerate(zip(_times(workload), buckets, strict=False)):
        if workload.duration_s is not None and t_s >= workload.measured_from_s + workload.duration_s:
            return
        measured += t_s >= workload.measured_from_s
        yield Arrival(index, t_s, bucket)
        if workload.requests is not None and measured >= workload.requests:
            return


def parse_mix(text: str) -> tuple[tuple[str, float], ...]:
    """``60/30/10``: percent of short, medium and long prompts. Raises ValueError."""
    try:
        shares = [float(part) / 100 for part in text.split("/")]
    except ValueError:
        shares = []
    if len(shares) != 3:
        raise ValueError(f"mix must be percentages of short/medium/long prompts such as 60/30/10; got {text!r}")
    return tuple(zip(("short", "medium", "long"), shares, strict=True))


def _times(workload: Workload) -> Iterator[float]:
    """Endless arrival times: gaps of mean 1 in operational time, stretched so that the rate follows the ramp."""
    rng = random.Random(f"arrivals/{workload.seed}")
    shape = 1.0 / workload.cv**2
    passed = 0.0
    ramp_work = workload.rate * workload.ramp_s / 2
    while True:
        if workload.arrivals == "poisson":
            passed += rng.expovariate(1.0)
        elif workload.arrivals == "bursty":
            passed += rng.gammavariate(shape, 1.0 / shape)
        else:
            passed += 1.0
        if passed < ramp_work:
            yield math.sqrt(2 * passed * workload.ramp_s / workload.rate)
        else:
            yield workload.ramp_s + (passed - ramp_work) / workload.rate


def _buckets(workload: Workload) -> Iterator[str]:
    rng = random.Random(f"buckets/{workload.seed}")
    names = [bucket for bucket, _ in workload.mix]
    edges = [0.0]
    for _, share in workload.mix:
        edges.append(edges[-1] + share)
    edges[-1] = 1.0
    drawn = 0
    while True:
        before = [math.floor(edge * drawn + 0.5) for edge in edges]
        drawn += MIX_BLOCK
        after = [math.floor(edge * drawn + 0.5) for edge in edges]
        counts = [(after[i + 1] - after[i]) - (before[i + 1] - before[i]) for i in range(len(names))]
        block = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
        rng.shuffle(block)
        yield from block


def _trace(workload: Workload) -> Iterator[Arrival]:
    assert workload.trace is not None
    try:
        lines = Path(workload.trace).read_text().splitlines()
    except OSError as error:
        raise UserError(f"the trace {workload.trace} cannot be read: {error.strerror or error}") from error
    last = 0.0
    for index, line in enumerate(islice((line for line in lines if line.strip()), workload.requests)):
        where = f"line {index + 1} of the trace {workload.trace}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict) or not _is_number(row.get("t")) or row["t"] < last:
            raise UserError(f"{where} needs 't', the time in seconds, rising from 0")
        if ("prompt" in row) == ("bucket" in row) or row.get("bucket", "short") not in ("short", "medium", "long"):
            raise UserError(f"{where} needs either 'prompt' or 'bucket' (short, medium or long)")
        last = float(row["t"])
        if workload.duration_s is not None and last >= workload.measured_from_s + workload.duration_s:
            return
        yield Arrival(index, last, row.get("bucket", ""), row.get("prompt"), row.get("answer"), row.get("max_tokens"))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(ok: bool, field: str, limit: str, value: object) -> None:
    if not ok:
        raise ValueError(f"{field} must be {limit}; got {value!r}")
