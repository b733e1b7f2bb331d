"""A student against its teacher, and the rule of C41."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from labkit.errors import UserError
from labkit.experiments import student
from labkit.experiments.intervals import Estimate
from labkit.experiments.student import STUDENT, TEACHER
from labkit.experiments.weights import GPTQ, ORIGINAL


def answers(name: str, marks: str) -> pd.DataFrame:
    """A character a problem, 1 for right; half of them short, half medium."""
    rows = [(name, "short" if i % 2 else "medium", i // 2, mark == "1") for i, mark in enumerate(marks)]
    return pd.DataFrame(rows, columns=["deployment", "bucket", "index", "right"])


def kept_of(teacher: str, taught: str) -> Estimate:
    others = pd.concat([answers(ORIGINAL, teacher), answers(GPTQ, "0" * len(teacher))])
    return student.accuracy_kept(student.with_teacher(others, answers(STUDENT, taught)))


def speeds(times: dict[int, float]) -> pd.DataFrame:
    """Batch -> how many times as fast the student is."""
    rows = [
        (way, x, turn, faster if way == TEACHER else 1.0, 0, "")
        for x, faster in times.items()
        for way in (TEACHER, STUDENT)
        for turn in range(6)
    ]
    return pd.DataFrame(rows, columns=["way", "x", "round", "seconds", "bytes", "note"])


def test_what_is_kept_is_a_ratio_of_right_answers_with_a_paired_interval() -> None:
    half = kept_of("11110000" * 50, "11000000" * 50)
    assert half.value == 0.5 and half.n == 400 and 0.4 < half.low < 0.5 < half.high < 0.6
    few, many = kept_of("10" * 6, "10" * 6), kept_of("10" * 500, "10" * 500)
    assert few.value == many.value == 1 and few.low < 0.9 < 0.99 < many.low < 1 < many.high < 1.01
    assert math.isnan(kept_of("0000", "1100").value)


def test_the_interval_of_a_ratio_agrees_with_a_bootstrap_where_pairs_are_many() -> None:
    found = student.ratio_of_pairs(2933, 7, 43)
    chance = np.random.default_rng(0)
    cells = chance.multinomial(3000, np.array([2933, 7, 43, 17]) / 3000, size=20_000)
    low, high = np.quantile((cells[:, 0] + cells[:, 1]) / (cells[:, 0] + cells[:, 2]), [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=3e-4) and found.high == pytest.approx(high, abs=3e-4)


@pytest.mark.parametrize("cells", [(0.85, 0.03, 0.08, 0.04), (0.5, 0.1, 0.2, 0.2), (0.97, 0.01, 0.01, 0.01)])
@pytest.mark.parametrize("n", [12, 40])
def test_the_interval_of_a_ratio_holds_the_truth_as_often_as_it_says(cells: tuple[float, ...], n: int) -> None:
    truth = (cells[0] + cells[1]) / (cells[0] + cells[2])
    drawn = np.random.default_rng(1).multinomial(n, cells, size=2000)
    found = [student.ratio_of_pairs(*(int(cell) for cell in row[:3])) for row in drawn if row[0] + row[2]]
    assert sum(each.low <= truth <= each.high for each in found) / len(found) > 0.94


@pytest.mark.parametrize(
    ("taught", "faster", "outcome"),
    [
        ("1" * 99 + "0", 5.0, "confirmed"),
        ("1" * 99 + "0", 3.0, "partly"),
        ("1" * 30 + "0" * 70, 5.0, "partly"),
        ("1" * 30 + "0" * 70, 3.0, "refuted"),
        ("1" * 91 + "0" * 9, 5.0, "no verdict"),
    ],
)
def test_both_limits_decide(taught: str, faster: float, outcome: str) -> None:
    verdict = student.judge_student(kept_of("1" * 100, taught), speeds({1: 9.0, 32: faster}))
    assert verdict.outcome == outcome
    assert [item.value for item in verdict.evidence] == pytest.approx([taught.count("1"), faster, 9.0])


def test_models_that_answer_nothing_decide_nothing() -> None:
    verdict = student.judge_student(kept_of("1" * 100, "1" * 100), speeds({32: 1.1}), speeds({32: 5.0}))
    assert verdict.outcome == "partly" and "of 32: no" in verdict.reason
    assert [item.value for item in verdict.evidence] == pytest.approx([100.0, 1.1, 5.0])
    assert "random weights" in verdict.evidence[-1].label


def test_published_shapes_take_turns_with_random_weights() -> None:
    pair = student.of_shapes(["deepseek-r1-distill-qwen-7b", "deepseek-r1-distill-qwen-1.5b"], "cpu")
    assert list(pair) == [TEACHER, STUDENT] and all(each.random_weights for each in pair.values())
    assert "1.5b" in pair[STUDENT].model and "7b" in pair[TEACHER].model
    with pytest.raises(UserError, match="no-shape"):
        student.of_shapes(["no-shape", "no-shape"], "cpu")


def test_too_few_repeats_and_a_teacher_that_knows_nothing_decide_nothing() -> None:
    few = speeds({32: 5.0}).query("round < 3")
    assert student.judge_student(kept_of("1" * 100, "1" * 100), few).outcome == "no verdict"
    assert student.judge_student(kept_of("0" * 100, "1" * 100), speeds({32: 5.0})).outcome == "no verdict"


def test_a_student_that_is_not_there_leaves_the_claim_open(tmp_path: Path) -> None:
    assert student.find_student("mini", tmp_path) is None
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "config.json").write_text("{}")
    assert student.find_student("mini", tmp_path) == tmp_path / "mini"
    verdict = student.no_student("data/models/mini")
    assert verdict.outcome == "not testable here" and "labkit distill" in verdict.reason
