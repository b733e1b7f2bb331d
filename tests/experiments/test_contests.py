"""Contests between ways of computing the same: who may take part, what is timed, and the memory of a call."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from labkit.bench import timing
from labkit.experiments.contests import Contest, allocated, gain, is_faster, median_seconds, peak_bytes, run_contests
from labkit.experiments.intervals import Estimate

CPU = torch.device("cpu")
MEGA = 1000 * 1000


def quick(x: Tensor) -> Tensor:
    return x + x


def test_a_way_that_is_four_times_as_fast_is_found_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the calls move; all of them are slower by half for a while, and one call stands still."""
    calls, clock = 0, 0.0

    def taking(seconds: float) -> Callable[[Tensor], Tensor]:
        def way(x: Tensor) -> Tensor:
            nonlocal calls, clock
            calls += 1
            clock += 1.0 if calls == 20 else 1.5 * seconds if calls > 60 else seconds
            return 2 * x

        return way

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock))
    table = run_contests([Contest(3, (torch.ones(3),), {"slow": taking(0.004), "quick": taking(0.001)})], CPU)
    found = gain(table, "slow", "quick", 3)
    assert (found.low, found.value, found.high) == pytest.approx((4, 4, 4)) and found.n == 15
    assert 0.004 <= median_seconds(table, "slow", 3).value <= 0.006
    assert set(table["round"]) == set(range(15)) and calls > 60


@pytest.mark.parametrize(
    ("low", "high", "faster"), [(1.01, 3, True), (0.5, 1.04, False), (0.9, 1.2, None), (math.nan, math.nan, None)]
)
def test_faster_is_what_the_interval_leaves_no_doubt_of(low: float, high: float, faster: bool | None) -> None:
    assert is_faster(Estimate(1.0, low, high, 15, "×")) is faster


def test_wrong_results_failures_and_absences_are_notes_and_have_no_time() -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("no kernel\nfor this")

    ways = {"right": quick, "wrong": lambda x: x, "fails": fails, "absent": "on CUDA only"}
    table = run_contests([Contest(1, (torch.ones(4),), ways)], CPU, rounds=2)
    notes = dict(table[table["note"] != ""][["way", "note"]].to_numpy())
    assert notes == {"wrong": "its result differs by 0.5 of the norm", "fails": "no kernel", "absent": "on CUDA only"}
    assert math.isnan(gain(table, "right", "wrong", 1).value) and peak_bytes(table, "fails", 1) is None
    assert len(table[table["way"] == "right"]) == 2


@pytest.mark.parametrize(
    ("call", "megabytes"),
    [
        (lambda: torch.zeros(MEGA), 4),
        (lambda: torch.zeros(MEGA) + 1, 8),
        (lambda: [torch.zeros(MEGA) for _ in range(5)][0], 20),
        (lambda: [torch.zeros(MEGA).sum() for _ in range(5)], 4),
        (lambda: None, 0),
    ],
)
def test_memory_is_what_lived_at_once(call: object, megabytes: int) -> None:
    assert allocated(call, CPU) == pytest.approx(megabytes * MEGA, abs=1000)  # type: ignore[arg-type]
