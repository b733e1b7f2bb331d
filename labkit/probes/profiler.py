"""Where the time of one call goes, operator by operator, through ``torch.profiler``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import torch
from torch.profiler import ProfilerActivity

GROUPS: Mapping[str, tuple[str, ...]] = {
    "attention products": ("bmm", "baddbmm", "einsum", "scaled_dot_product", "flash_attention", "efficient_attention"),
    "softmax": ("softmax",),
    "linear layers": ("linear", "addmm", "mm", "matmul"),
    "copies": ("copy_", "cat", "clone", "contiguous", "to", "stack", "repeat", "index_put"),
    "look-ups": ("embedding", "index", "gather", "select", "slice"),
    "norm, activation, masks": (
        "add", "mul", "sub", "div", "pow", "rsqrt", "mean", "silu", "gelu", "sigmoid", "neg", "cos", "sin", "where",
        "masked_fill", "fill_", "zero_", "tril", "triu", "layer_norm", "rms_norm", "bitwise", "eq", "ne", "le", "lt",
        "ge", "gt", "all", "any", "sum", "argmax", "cumsum", "clamp", "maximum", "minimum", "isin", "full", "zeros",
        "ones", "arange",
    ),
}  # fmt: skip
OTHER = "other"


def quiet() -> None:
    """Keeps the profiler, if nobody has used it yet, from printing two lines whenever it begins and ends."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def operators(call: Callable[[], object]) -> pd.DataFrame:
    """Runs ``call`` once under the profiler. One row an operator, the dearest first.

    Columns: op (str), group (a key of GROUPS, or "other"), calls (int64), self_s and total_s (float64: seconds in the
    operator itself, without and with those it called), share (of all self_s). On a machine with a GPU these are the
    GPU's seconds when ``call`` launched any kernel, the CPU's otherwise. Raises what ``call`` raises.
    """
    quiet()
    kinds = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    events = [event for event in profile.events() if event.name.startswith("aten::")]
    clock = "device" if any(event.self_device_time_total for event in events) else "cpu"
    rows = [(event.name.removeprefix("aten::"), 1, _self_s(event, clock), _total_s(event, clock)) for event in events]
    table = pd.DataFrame(rows, columns=["op", "calls", "self_s", "total_s"]).groupby("op", as_index=False).sum()
    table.insert(1, "group", table["op"].map(group_of))
    table["share"] = table["self_s"] / table["self_s"].sum()
    return table.sort_values("self_s", ascending=False, ignore_index=True)


def _self_s(event: Any, clock: str) -> float:
    return float(getattr(event, f"self_{clock}_time_total")) / 1e6


def _total_s(event: Any, clock: str) -> float:
    """Not the profiler's own total, in which a kernel is there twice when its launch made the driver load something."""
    inner = [child for child in event.cpu_children if child.name.startswith("aten::")]
    return _self_s(event, clock) + sum(_total_s(child, clock) for child in inner)


def by_group(table: pd.DataFrame, least: float = 0.01) -> pd.DataFrame:
    """The operators of ``operators`` summed by kind, the dearest first: group, calls, self_s, share.

    Kinds with less than the share ``least`` count as "other".
    """
    kinds = table["group"].where(table.groupby("group")["share"].transform("sum") >= least, OTHER)
    sums = table.groupby(kinds, sort=False)[["calls", "self_s", "share"]].sum()
    return sums.sort_values("self_s", ascending=False).reset_index()


def group_of(op: str) -> str:
    """The kind of an operator by its name (``aten::`` and underscores in front do not count)."""
    name = op.removeprefix("aten::").lstrip("_")
    for group, words in GROUPS.items():
        if any(name == word or name.startswith(f"{word}_") or name.rstrip("_") == word for word in words):
            return group
    inner = ("scaled_dot_product", "flash_attention", "efficient_attention")
    return "attention products" if any(word in name for word in inner) else OTHER
