"""What the notebook on the framework shows: every way in its place, numbers with intervals, words that follow."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from labkit.experiments.intervals import percentile
from labkit.experiments.training_options import KEEPS, Choice, rate_names
from labkit.report import framework

ABSENT = "on CUDA only"


def contests(times: dict[tuple[str, int], float | str]) -> pd.DataFrame:
    """15 equal rounds: (way, x) -> seconds of a call, or why there are none."""
    rows = []
    for (way, x), found in times.items():
        if isinstance(found, str):
            rows.append((way, x, -1, math.nan, 0, found))
        else:
            rows += [(way, x, turn, found, 2**20, "") for turn in range(15)]
    return pd.DataFrame(rows, columns=["way", "x", "round", "seconds", "bytes", "note"])


NORMS = contests(
    {("compiled", 64): ABSENT, ("written out", 8): 0.001, ("written out", 64): 0.006, ("PyTorch", 64): 0.002}
)


def test_times_are_drawn_in_milliseconds() -> None:
    found = framework.times_frame(NORMS)
    assert found[["name", "x", "value"]].to_numpy().tolist() == [
        ["written out", 8, 1.0],
        ["written out", 64, 6.0],
        ["PyTorch", 64, 2.0],
    ]
    assert (found["low"] == found["value"]).all() and (found["high"] == found["value"]).all()


def test_a_table_of_ways_is_that_of_the_largest_size_and_ends_with_what_is_absent() -> None:
    table = framework.ways_table(NORMS, "this machine")
    assert [row[0] for row in table.rows] == ["written out", "PyTorch", "compiled"]
    first, second, absent = table.rows
    assert first[1].startswith("6.00\u00a0ms") and first[2] == "1.00\u00a0MiB" and first[3] == "1"
    assert second[3].startswith("3.00×") and absent[1] == f"not measured: {ABSENT}"
    assert table.caption == "this machine"


def test_a_policy_is_shown_with_what_it_frees_and_what_that_costs() -> None:
    found = [
        Choice(f"{policy} {micro}", policy, micro, percentile([seconds] * 15, 50, "s"), most, beaten)
        for policy, micro, seconds, most, beaten in (
            (KEEPS, 1, 1.0, 100, ""),
            (KEEPS, 2, 1.0, 200, ""),
            ("recomputes", 1, 1.3, 75, ""),
            ("recomputes", 2, 1.2, 120, f"{KEEPS} 1"),
        )
    ]
    rows = framework.policies_table(found, 1000, "here").rows
    assert [row[3] for row in rows] == ["–", "–", "25\u00a0%, for +30\u00a0%", "40\u00a0%, for +20\u00a0%"]
    assert [row[4] for row in rows] == ["nothing", "nothing", "nothing", f"{KEEPS} 1"]
    assert [row[5] for row in rows] == ["10", "10", "21", "21"]
    frame = framework.frontier_frame(found, 1000)
    assert frame["value"].tolist() == pytest.approx([1000, 1000, 1000 / 1.3, 1000 / 1.2])


def losses(article: float, ours: float) -> pd.DataFrame:
    rows = [
        (way, step, step * 1000, loss + step % 2)
        for way, loss in zip(rate_names(), (article, ours), strict=True)
        for step in range(9)
    ]
    return pd.DataFrame(rows, columns=["way", "step", "tokens", "loss"])


def test_losses_are_smoothed_each_by_itself() -> None:
    found = framework.losses_frame(losses(5.0, 2.0))
    article, ours = (found[found["name"] == name] for name in rate_names())
    assert article["value"].tolist()[:3] == [5.0, 5.5, pytest.approx(16 / 3)]
    assert ours["value"].iloc[0] == 2.0, "nothing of the line before"
    assert article["tokens"].tolist() == [*range(9)]


@pytest.mark.parametrize("seconds, words", [(0.5, "saves time here (2.00×"), (1.1, "alone costs time here (0.909×")])
def test_the_takeaway_follows_the_numbers(seconds: float, words: str) -> None:
    softmax = contests({("all scores", 512): 1.0, ("those in sight", 512): seconds})
    choice = Choice("keeps all activations, 1 at a time", KEEPS, 1, percentile([1.0] * 9, 50, "s"), 9)
    text = framework.framework_takeaway(softmax, NORMS, [choice], losses(5.0, 2.0))
    assert words in text and "it is 3.00× as fast as written out" in text
    assert "ends 3.00 nats a token above" in text and "pays nowhere" in text
