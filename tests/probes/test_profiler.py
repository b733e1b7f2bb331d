"""The profiler finds what was computed: known operators, known counts, shares that make up the whole."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from labkit.probes import profiler
from labkit.probes.profiler import by_group, group_of, operators


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


def test_what_an_operator_called_counts_as_its_own_in_total():
    table = operators(lambda: torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))).set_index("op")
    assert table["total_s"]["linear"] > table["self_s"]["linear"] > 0
    assert table["total_s"]["linear"] >= table["self_s"]["mm"] > 0
    assert (table["total_s"] >= table["self_s"]).all() and table["total_s"].max() <= table["self_s"].sum()


def test_a_kernel_whose_launch_loads_something_counts_once():
    def event(name, own, *inner):
        return SimpleNamespace(name=name, self_device_time_total=own, cpu_children=list(inner))

    gather = event("aten::gather", 3.0, event("aten::as_strided", 0.0), event("cudaLaunchKernel", 3.0))
    tree = event("aten::embedding", 0.0, event("aten::index_select", 0.0, gather))
    assert profiler._total_s(tree, "device") == pytest.approx(3e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_first_and_the_last_kernel_of_a_call_are_their_operators():
    weight, ids = torch.randn(1000, 64, device="cuda"), torch.arange(256, device="cuda")
    for _ in range(3):
        table = operators(lambda: torch.softmax(torch.nn.functional.embedding(ids, weight) @ weight.T, -1))
        total = table.set_index("op")["total_s"]
        assert total["embedding"] > 0 and total["matmul"] > 0 and total["softmax"] > 0
        assert total["embedding"] + total["matmul"] + total["softmax"] == pytest.approx(table["self_s"].sum())


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
