"""What 4 bits cost: models that are asked the same problems, and the rule of C27."""

from __future__ import annotations

import pandas as pd
import pytest

from labkit.deployment import SHIPPED_MODEL
from labkit.experiments import weights
from labkit.experiments.weights import GPTQ, GPTQ_HEAD, ORIGINAL, RTN


def made_up(**right: str) -> pd.DataFrame:
    """original, rtn, gptq and head: a character a problem, 1 for right."""
    names = {"original": ORIGINAL, "rtn": RTN, "gptq": GPTQ, "head": GPTQ_HEAD}
    rows = [(names[name], "short", i, mark == "1") for name, marks in right.items() for i, mark in enumerate(marks)]
    return pd.DataFrame(rows, columns=["deployment", "bucket", "index", "right"])


def test_rounding_turns_one_knob_and_gptq_another_model() -> None:
    deployments = weights.in_four_bits(weights.original(SHIPPED_MODEL, "cuda"), "elsewhere")
    before = deployments[ORIGINAL]
    assert before.differs_in(deployments[RTN]) == {"quantization": ("none", "int4")}
    assert before.differs_in(deployments[GPTQ]) == {"model": (SHIPPED_MODEL, "elsewhere")}
    assert deployments[GPTQ].differs_in(deployments[GPTQ_HEAD]) == {"int8_head": (False, True)}
    assert GPTQ_HEAD not in weights.in_four_bits(weights.original(SHIPPED_MODEL, "cpu"), "elsewhere")


def test_the_shipped_model_answers_problems_of_each_bucket() -> None:
    said: list[str] = []
    answers = weights.ask({"shipped": weights.original(SHIPPED_MODEL, "cpu")}, {"short": 3}, say=said.append)
    assert answers[["deployment", "bucket", "index"]].values.tolist() == [["shipped", "short", i] for i in range(3)]
    # its card states 98 % and more of the short ones
    assert answers["right"].sum() >= 2 and said[0].startswith(f"shipped: {answers['right'].sum()} of 3 short")


@pytest.mark.parametrize(
    ("gptq", "outcome"),
    [
        ("1" * 997 + "0" * 3, "confirmed"),  # 0.3 points lost
        ("1" * 900 + "0" * 100, "refuted"),  # 10 points
        ("1" * 985 + "0" * 15, "no verdict"),  # 1.5 points: the interval holds 2
    ],
)
def test_the_interval_of_the_paired_loss_decides(gptq: str, outcome: str) -> None:
    verdict = weights.judge_accuracy(made_up(original="1" * 1000, rtn="1" * 990 + "0" * 10, gptq=gptq))
    assert verdict.outcome == outcome and f"{gptq.count('0')} were right before GPTQ alone" in verdict.reason
    lost, rounded = verdict.evidence
    assert lost.value == pytest.approx(gptq.count("0") / 10) and lost.low < lost.value < lost.high
    assert rounded.value == pytest.approx(1.0) and lost.unit == "%"


def test_a_head_of_8_bits_stands_beside_and_decides_nothing() -> None:
    ones = "1" * 1000
    verdict = weights.judge_accuracy(made_up(original=ones, gptq=ones, head="1" * 900 + "0" * 100))
    assert verdict.outcome == "confirmed" and [item.value for item in verdict.evidence] == [0, pytest.approx(10)]


def test_answers_that_change_both_ways_cost_nothing_but_widen_the_interval() -> None:
    same = weights.loss_of_accuracy(weights.pair(made_up(original="1100" * 50, gptq="1100" * 50), GPTQ))
    swapped = weights.loss_of_accuracy(weights.pair(made_up(original="1100" * 50, gptq="1010" * 50), GPTQ))
    assert same.value == swapped.value == 0
    assert swapped.high - swapped.low > 5 * (same.high - same.low)


def test_answers_to_other_problems_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different problems"):
        weights.pair(made_up(original="111", gptq="11"), GPTQ)
