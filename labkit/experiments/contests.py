"""Several ways of computing the same thing: equal results first, then time to and fro, and the memory each needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from labkit.bench.timing import make_timer
from labkit.experiments.claims import NO_GAIN
from labkit.experiments.intervals import Estimate, percentile
from labkit.probes.profiler import quiet

Inputs = tuple[Any, ...]
Way = Callable[..., Tensor]
ROUNDS = 15
"""Rounds of timing: enough for a 95 % interval of a median."""


@dataclass(frozen=True)
class Contest:
    """``ways`` by name, each a call of the same inputs or the reason why it cannot run; the first one defines what is
    right. ``x`` says how large this contest is, in the unit of its series (tokens, say)."""

    x: int
    inputs: Inputs
    ways: Mapping[str, Way | str]
    tolerance: float = 2e-2
    """Most by which a result may differ from the first one's, relative to its norm."""


@torch.inference_mode()
def run_contests(contests: Sequence[Contest], device: torch.device, rounds: int = ROUNDS) -> pd.DataFrame:
    """One row a way, size and round: way (str), x (int), round (int), seconds (float; of one call), bytes (int; the
    most that was allocated at once during a call, its result included), note (str: why there is no time).

    All ways of a contest are timed once a round, in turn and in alternating order, so that a machine that grows slow
    does so for all alike. A way that fails, or whose result is another than the first one's, gets one row with a note.
    """
    rows: list[dict[str, Any]] = []
    for contest in contests:
        rows += _run(contest, device, rounds)
    return pd.DataFrame(rows, columns=["way", "x", "round", "seconds", "bytes", "note"])


def median_seconds(table: pd.DataFrame, way: str, x: int) -> Estimate:
    """Median time of one way at one size, with its interval; NaN where it has none."""
    return percentile(_times(table, way, x), 50, "s")


def gain(table: pd.DataFrame, before: str, after: str, x: int) -> Estimate:
    """How many times faster ``after`` is: the median of the quotients round by round, with its interval."""
    slow, fast = _times(table, before, x), _times(table, after, x)
    if len(slow) != len(fast) or slow.empty:
        return percentile([], 50, "×")
    return percentile((slow.to_numpy() / fast.to_numpy()).tolist(), 50, "×")


def is_faster(gained: Estimate) -> bool | None:
    """Whether a way is faster, by its ``gain``: yes if the interval lies above 1, no if it leaves room for no more than
    5 %, and None where it holds both or nothing was measured."""
    if gained.low > 1:
        return True
    return False if gained.high <= NO_GAIN else None


def peak_bytes(table: pd.DataFrame, way: str, x: int) -> int | None:
    """The most memory that one call took at once; None where it did not run."""
    found = table[(table["way"] == way) & (table["x"] == x) & (table["note"] == "")]["bytes"]
    return None if found.empty else int(found.iloc[0])


def _times(table: pd.DataFrame, way: str, x: int) -> pd.Series:
    found = table[(table["way"] == way) & (table["x"] == x) & (table["note"] == "")]
    return found.sort_values("round")["seconds"]


def _run(contest: Contest, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    right: Tensor | None = None
    notes: dict[str, str] = {}
    for name, way in contest.ways.items():
        if isinstance(way, str):
            notes[name] = way
            continue
        try:
            found = way(*contest.inputs).float()
        except Exception as failure:  # a compiler, a shape or the memory: the other ways still have their turn
            notes[name] = (str(failure).strip().splitlines() or [type(failure).__name__])[0][:160]
            continue
        right = found if right is None else right
        apart = float(torch.linalg.vector_norm(found - right) / torch.linalg.vector_norm(right))
        if not apart <= contest.tolerance:
            notes[name] = f"its result differs by {apart:.2g} of the norm"
    running = {name: way for name, way in contest.ways.items() if name not in notes and not isinstance(way, str)}
    memory = {name: allocated(lambda way=way: way(*contest.inputs), device) for name, way in running.items()}  # type: ignore[misc]
    timers = {name: make_timer(way, [contest.inputs] * 2, device) for name, way in running.items()}
    rows = [_row(name, contest.x, note=note) for name, note in notes.items()]
    for turn in range(rounds):
        for name in list(timers)[:: -1 if turn % 2 else 1]:
            rows.append(_row(name, contest.x, turn, timers[name](), memory[name]))
    return rows


def _row(
    way: str, x: int, turn: int = -1, seconds: float = math.nan, most_bytes: int = 0, note: str = ""
) -> dict[str, Any]:
    return {"way": way, "x": x, "round": turn, "seconds": seconds, "bytes": most_bytes, "note": note}


def allocated(call: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors that ``call`` made and that lived at once, at their most.

    By the allocator's own count on CUDA; on the CPU, which has none, by the profiler's record of every allocation.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    quiet()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    # The profiler's own events leave out what is freed inside an operator; the record beneath has every change.
    record = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in record if event.name() == "[memory]")
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
