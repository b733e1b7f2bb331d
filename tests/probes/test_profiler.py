"""The profiler finds what was computed: known operators, known counts, shares that make up the whole."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from labkit.probes.profiler import by_group, group_of, operators, profiled


def test_a_call_is_taken_apart_into_its_operators():
    a, b = torch.randn(64, 64), torch.randn(8, 64, 64)

    def call() -> None:
        for _ in range(3):
            torch.softmax(torch.bmm(b, b), -1)
        for _ in range(2):
            torch.mm(a, a)

    table = operators(call)
    calls = dict(zip(table["op"], table["calls"], strict=True))
    assert (calls["bmm"], calls["mm"], calls["_softmax"]) == (3, 2, 3)
    assert table["share"].sum() == pytest.approx(1) and (table["self_s"] >= 0).all()
    assert table["self_s"].is_monotonic_decreasing
    groups = by_group(table, least=0.0)
    assert groups["share"].sum() == pytest.approx(1)
    assert groups.set_index("group")["calls"]["attention products"] == 3
    assert set(groups["group"]) >= {"attention products", "softmax", "linear layers"}


@pytest.mark.parametrize("warm", [False, True])
def test_a_run_before_that_warms_the_profiler_up_is_not_counted(warm):
    runs = []

    def call():
        runs.append(torch.mm(torch.ones(64, 64), torch.ones(64, 64)))

    events = {event.key: event.count for event in profiled(call, warm)}
    assert events["aten::mm"] == 1 and len(runs) == 1 + warm


def test_kinds_too_small_to_see_count_as_other():
    table = pd.DataFrame(
        {"group": ["softmax", "copies", "other"], "calls": [1, 2, 3], "self_s": [9.9, 0.05, 0.05],
         "share": [0.99, 0.005, 0.005]}
    )  # fmt: skip
    groups = by_group(table)
    assert groups["group"].tolist() == ["softmax", "other"] and groups["calls"].tolist() == [1, 5]
    assert by_group(table, least=0.0)["group"].tolist() == ["softmax", "copies", "other"]


def test_the_larger_product_takes_the_larger_share():
    small, large = torch.randn(16, 16), torch.randn(4, 512, 512)
    found = operators(lambda: (torch.mm(small, small), torch.bmm(large, large)))
    groups = by_group(found, least=0.0).set_index("group")
    assert groups["share"]["attention products"] > groups["share"]["linear layers"]


@pytest.mark.parametrize(
    ("op", "group"),
    [
        ("aten::bmm", "attention products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention products"),
        ("aten::_softmax", "softmax"),
        ("aten::addmm", "linear layers"),
        ("aten::mm", "linear layers"),
        ("aten::copy_", "copies"),
        ("aten::_to_copy", "copies"),
        ("aten::add_", "norm, activation, masks"),
        ("aten::embedding", "look-ups"),
        ("aten::some_new_operator", "other"),
    ],
)
def test_operators_are_named_by_kind(op, group):
    assert group_of(op) == group


def test_what_the_call_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        operators(lambda: 1 / 0)
