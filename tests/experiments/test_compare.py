from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from labkit.experiments import metrics
from labkit.experiments.compare import compare, ratio_of_estimates, ratio_of_medians, same_work
from labkit.experiments.intervals import Estimate
from labkit.experiments.store import Run
from labkit.traffic.events import events_table


def run(texts, latency=1.0, valid=True, seed=0):
    records = [
        {
            "index": i, "bucket": "short", "family": "", "scheduled": 0.0, "sent": 0.0, "first_byte": 0.1,
            "chunks": [(latency, 2, "answer")], "end": latency, "failure": "" if text else "timeout", "message": "",
            "finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 2, "reasoning": "", "text": text,
            "correct": None,
        }
        for i, text in enumerate(texts)
    ]  # fmt: skip
    made = Run(Path("x"), {"window": [0.0, 10.0], "valid": valid, "workload": {"seed": seed}})
    vars(made)["events"] = events_table(records)
    return made


def p50(one):
    return metrics.latency(one.requests, one.window, 50)


def test_the_same_work_is_recognised():
    work = same_work(run(["a", "b", "c"]), run(["a", "b", ""]))
    assert work.same and (work.common, work.only_here, work.only_there) == (2, 1, 0)
    assert "2 answers alike, 1 requests" in str(work)


def test_other_answers_are_found():
    work = same_work(run(["a", "b", "c"]), run(["a", "x", "c"]))
    assert not work.same and work.different == (1,) and str(work) == "1 of 3 answers differ"
    assert not same_work(run([""]), run(["a"])).same


def test_a_comparison_says_whether_it_is_fair():
    here, there = [run("ab", t) for t in (1.0, 1.1, 0.9)], [run("ab", t) for t in (2.0, 2.2, 1.9)]
    found = compare(here, there, p50)
    assert found.here == (1.0, 1.1, 0.9) and found.ratio.value == pytest.approx(2.0) and found.fair
    assert found.ratio.low == pytest.approx(1.9 / 1.1) and found.ratio.high == pytest.approx(2.2 / 0.9)
    assert found.ratio.confidence == pytest.approx(0.9)  # 1 - 2 / C(6, 3)
    assert not compare(here, [run("ax")] * 3, p50).fair
    unsure = compare(here, [run("ab", valid=False)], p50)
    assert not unsure.fair and unsure.invalid == ("x",)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="both sides"):
        compare([], [run("a")], p50)
    with pytest.raises(ValueError, match="same workload"):
        compare([run("a")], [run("a", seed=1)], p50)


def test_the_confidence_attained_is_that_of_all_orders():
    """Four and four values: over all orders of 8 the range of the ratios misses 1 in two of C(8, 4) = 70."""
    found = ratio_of_medians([1, 2, 3, 4], [5, 6, 7, 8])
    misses = 0
    for chosen in combinations(range(8), 4):
        rest = [k for k in range(8) if k not in chosen]
        misses += min(chosen) > max(rest) or max(chosen) < min(rest)
    assert found.confidence == pytest.approx(1 - misses / 70)
    assert (found.low, found.high) == (5 / 4, 8.0)


def test_the_interval_covers_the_true_ratio_as_often_as_it_says():
    rng = np.random.default_rng(2)
    hits, attained = 0, set()
    for _ in range(2000):
        found = ratio_of_medians(rng.lognormal(0, 0.3, 6), 3 * rng.lognormal(0, 0.3, 6))
        hits += found.low <= 3 <= found.high
        attained.add(found.confidence)
    [confidence] = attained
    assert confidence >= 0.95
    assert hits / 2000 == pytest.approx(confidence, abs=0.012)


def test_numbers_without_a_ratio_have_no_interval():
    assert math.isnan(ratio_of_medians([0.0], [1.0]).value)
    assert math.isnan(ratio_of_medians([1.0, math.inf], [1.0, 2.0]).low)


def test_one_run_a_side_takes_the_intervals_within_the_runs():
    found = ratio_of_estimates(Estimate(2.0, 1.0, 4.0, 10), Estimate(6.0, 5.0, 8.0, 12))
    assert (found.value, found.low, found.high, found.n) == (3.0, 1.25, 8.0, 22)
    assert found.confidence == pytest.approx(0.9) and str(found) == "3.00 x [1.25, 8.00] at 90%"
    assert ratio_of_estimates(Estimate(2.0, -math.inf, math.inf, 3), Estimate(6.0, 5.0, math.inf, 3)).low == 0.0
    assert math.isnan(ratio_of_estimates(Estimate(0.0, 0.0, 1.0, 3), Estimate(6.0, 5.0, 8.0, 3)).value)
    compared = compare([run("ab")], [run("ab", 2.0)], p50)
    assert compared.ratio.value == 2.0 and compared.ratio.confidence == pytest.approx(0.9)
