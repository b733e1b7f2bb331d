from __future__ import annotations

import dataclasses

import pytest
import torch

from labkit.bench import attention, elementwise, linear
from labkit.bench.ceilings import Ceilings
from labkit.bench.operators import Case, run_case
from labkit.bench.rows import Row

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e10, 1e11, "")


class Rows(list):
    add = list.append


def rows_of(case: Case) -> list[Row]:
    book = Rows()
    run_case(case, CPU, CEILINGS, book, lambda line: None)
    return book


def case(**contestants) -> Case:
    return Case(
        "square",
        "4 x 4",
        lambda seed: (torch.full((4, 4), seed + 2.0),),
        torch.square,
        contestants,
        bytes=128,
        flops=16,
    )


def test_a_right_answer_gets_a_speed_and_a_wrong_one_does_not():
    right, wrong, broken, absent = rows_of(
        case(
            right=lambda x: x * x,
            wrong=lambda x: x * x * torch.tensor([1.0, 1.0, 1.0, 1.1]),
            broken=lambda x: 1 / 0,
            absent="not installed",
        )
    )
    us = right.figures["us"]
    assert right.figures["TB/s"] == pytest.approx(128 / us * 1e-6) and right.figures["of copy"] == pytest.approx(
        128 / us * 1e6 / 1e10
    )
    assert right.figures["TFLOP/s"] == pytest.approx(16 / us * 1e-6)
    assert wrong.note == "WRONG: a row differs from the reference by 0.05" and not wrong.figures
    assert broken.note == "failed: division by zero" and absent.note == "skipped: not installed"


def test_a_nan_is_wrong_and_inputs_that_are_written_to_are_copies():
    nan, in_place, after = rows_of(
        case(nan=lambda x: x * torch.nan, in_place=lambda x: x.square_(), after=lambda x: x * x)
    )
    assert nan.note.startswith("WRONG") and in_place.figures and after.figures


def test_who_is_known_to_round_more_may():
    rough = dataclasses.replace(case(rough=lambda x: x * x * 1.04, exact=torch.square), tolerances={"rough": 0.05})
    assert all(row.figures for row in rows_of(rough))


@pytest.mark.parametrize("cases", [attention.cases, elementwise.cases, linear.cases])
def test_the_kernels_agree_with_their_references(cases):
    """In the small sizes of a CPU, where the kernels' own references stand in for them."""
    for each in cases(CPU, torch.float32):
        rows = rows_of(each)
        assert any(row.figures for row in rows), each
        assert not [row for row in rows if "WRONG" in row.note or "failed" in row.note]
