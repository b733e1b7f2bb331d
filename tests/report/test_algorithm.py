"""Tables, frames and sentences of the algorithm layer, from tables made by hand."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from labkit.experiments.decode_speed import FIRST
from labkit.experiments.intervals import Estimate
from labkit.experiments.operators import ARTICLE, PYTORCH, SDPA
from labkit.experiments.student import STUDENT, TEACHER
from labkit.experiments.weights import GPTQ, GPTQ_HEAD, ORIGINAL, RTN
from labkit.report import algorithm


def contest(times: dict[tuple[str, int], tuple[float, int]], notes: dict[tuple[str, int], str] | None = None):
    rows = [(way, x, turn, *found, "") for (way, x), found in times.items() for turn in range(6)]
    rows += [(way, x, -1, math.nan, 0, note) for (way, x), note in (notes or {}).items()]
    return pd.DataFrame(rows, columns=["way", "x", "round", "seconds", "bytes", "note"])


ATTENTION = contest(
    {(SDPA, 1024): (0.001, 2**20), (ARTICLE, 1024): (0.004, 2**20), (SDPA, 2048): (0.004, 2**21),
     (ARTICLE, 2048): (0.02, 2**22), (SDPA, 4096): (0.016, 2**22)},
    {(ARTICLE, 4096): "its mask is too small"},
)  # fmt: skip
CACHE = contest({(PYTORCH, 8): (0.001, 0), ("lru_cache", 8): (0.05, 0)})
ANSWERS = pd.DataFrame(
    [(name, "short", i, i >= wrong) for name, wrong in ((ORIGINAL, 0), (RTN, 20), (GPTQ, 3), (STUDENT, 10))
     for i in range(100)], columns=["deployment", "bucket", "index", "right"],
)  # fmt: skip
WORSE = ANSWERS["right"] & ~((ANSWERS["deployment"] == GPTQ) & (ANSWERS["index"] < 20))
SPEED = contest({(FIRST, 1): (8.0, 400), (ORIGINAL, 1): (2.0, 400), (GPTQ, 1): (1.0, 100), (ORIGINAL, 4): (4.0, 400),
                 (GPTQ, 4): (4.0, 100)})  # fmt: skip


def test_a_way_that_did_not_run_says_why_in_its_place() -> None:
    times, memory = algorithm.times_table(ATTENTION, "tokens"), algorithm.memory_table(ATTENTION, "tokens")
    assert times.columns == ("", SDPA, ARTICLE) and [row[0] for row in times.rows][-1] == "4096\u00a0tokens"
    assert times.rows[-1][2] == memory.rows[-1][2] == "its mask is too small"
    assert times.rows[1][1].startswith("4.00\u00a0ms") and memory.rows[1][2] == "4.00\u00a0MiB"
    frame = algorithm.times_frame(ATTENTION, "tokens")
    assert len(frame) == 5 and frame["value"].max() == pytest.approx(20)
    assert algorithm.memory_frame(ATTENTION, "tokens")["value"].max() == 4


def test_errors_of_a_layer_are_shares_of_its_output() -> None:
    lines = [
        {"layer": 0, "rtn_error": 0.0004, "gptq_error": 0.0001}, {"layer": 0, "rtn_error": 0.0016, "gptq_error": None},
    ]  # fmt: skip
    frame = algorithm.layers_frame(lines)
    assert frame.round(6).values.tolist() == [[0, "round to nearest", 3.0, 2.0, 4.0], [0, "GPTQ", 1.0, 1.0, 1.0]]


def test_accuracy_is_compared_problem_by_problem() -> None:
    table = algorithm.accuracy_table(ANSWERS)
    assert [row[0] for row in table.rows] == [ORIGINAL, RTN, GPTQ]
    gptq = dict(zip(table.columns, table.rows[2], strict=True))
    assert gptq["short\u00a0(100)"].startswith("97.0") and gptq["points lost"].startswith("3.00\n")
    assert (gptq[f"right: {ORIGINAL} only"], gptq["right: this one only"], gptq["McNemar p"]) == ("3", "0", "0.25")
    head = ANSWERS[ANSWERS["deployment"] == GPTQ].assign(deployment=GPTQ_HEAD)
    assert algorithm.accuracy_table(pd.concat([ANSWERS, head])).rows[3][0] == GPTQ_HEAD
    assert algorithm.lost_frame(ANSWERS)["value"].tolist() == pytest.approx([20, 3])


def test_speed_is_shown_against_both_baselines() -> None:
    table = algorithm.speed_table(SPEED, 10, "a shape")
    gains = algorithm.gain_table(SPEED)
    one = dict(zip(table.columns + gains.columns, table.rows[0] + gains.rows[0], strict=True))
    assert one[f"{GPTQ} against {ORIGINAL}"].startswith("2.00×") and one[f"{GPTQ} against {FIRST}"].startswith("8.00×")
    assert one[GPTQ].startswith("10.0\u00a0tokens/s")
    four = dict(zip(table.columns + gains.columns, table.rows[1] + gains.rows[1], strict=True))
    assert four[FIRST] == four[f"{GPTQ} against {FIRST}"] == "–"
    head = SPEED[SPEED["way"] == GPTQ].assign(way=GPTQ_HEAD)
    both = pd.concat([SPEED, head])
    assert GPTQ_HEAD in algorithm.speed_table(both, 10).columns and GPTQ_HEAD not in table.columns
    assert f"{GPTQ_HEAD} against {ORIGINAL}" in algorithm.gain_table(both).columns
    rivals = algorithm.student_table(contest({(TEACHER, 1): (4.0, 8), (STUDENT, 1): (1.0, 2)}), 10)
    assert rivals.columns[-1] == "student against teacher" and rivals.rows[0][-1].startswith("4.00×")
    large = algorithm.student_table(contest({(TEACHER, 1): (4.0, 8), (STUDENT, 1): (2.0, 2)}), 10, ("large", "small"))
    assert "random weights of the shapes of large and small" in large.caption and "lab" not in large.caption
    assert table.rows[2][0] == "weights" and "random weights of the shape of a shape" in table.caption


def test_the_takeaway_is_computed() -> None:
    text = algorithm.algorithm_takeaway(ATTENTION, CACHE, [0.01] * 3, ANSWERS, SPEED)
    assert "at 2048 tokens" in text and "5.00× as fast as the article's code" in text and "50.0× slower" in text
    assert "cost no accuracy that 100 problems could show (3.00 points, 95 % interval −0.859 to 6.74)" in text
    assert "2.00× as fast in the same engine, 8.00× as fast" in text
    worse = algorithm.algorithm_takeaway(ATTENTION, CACHE, [0.01] * 3, ANSWERS.assign(right=WORSE), SPEED)
    assert "cost 20.0 points of accuracy (95 % interval 1" in worse and "100 problems)" in worse
    assert "student" not in text and "no kernel" not in text
    multiplied_out = algorithm.algorithm_takeaway(ATTENTION, CACHE, [0.01] * 3, ANSWERS, SPEED.assign(bytes=400))
    assert "in the same engine (no kernel reads 4 bits on this device)" in multiplied_out
    student = contest({(TEACHER, 32): (6.0, 0), (STUDENT, 32): (2.0, 0)})
    measured = (ATTENTION, CACHE, [0.01] * 3, ANSWERS, SPEED, "a shape", Estimate(0.9, 0.8, 1.0, 100, "share"), student)
    taught = algorithm.algorithm_takeaway(*measured)
    assert "(random weights of the shape of a shape)" in taught
    assert "keeps 90.0\u00a0% of its teacher's right answers (95 % interval 80.0 to 100)" in taught
    assert "3.00× its speed at a batch of 32" in taught and "in use" not in taught
    large = contest({(TEACHER, 32): (8.0, 0), (STUDENT, 32): (2.0, 0)})
    assert "of the sizes that are in use it is 4.00×" in algorithm.algorithm_takeaway(*measured, large)
