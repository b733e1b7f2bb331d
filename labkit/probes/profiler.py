"""Where the time of one call goes, operator by operator, through ``torch.profiler``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd
import torch

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
    """Runs ``call`` under the profiler, with a GPU once more before. One row an operator, the dearest first.

    Columns: op (str), group (a key of GROUPS, or "other"), calls (int64), self_s (float64: seconds in the operator
    itself, without those it called), share (of all self_s). On a machine with a GPU these are the GPU's seconds when
    ``call`` launched any kernel, the CPU's otherwise. Raises what ``call`` raises.
    """
    events = [event for event in profiled(call, torch.cuda.is_available()) if event.key.startswith("aten::")]
    device = [float(getattr(event, "self_device_time_total", 0.0)) for event in events]
    times = device if sum(device) > 0 else [float(event.self_cpu_time_total) for event in events]
    rows = [
        (event.key.removeprefix("aten::"), group_of(event.key), int(event.count), time_us / 1e6)
        for event, time_us in zip(events, times, strict=True)
    ]
    table = pd.DataFrame(rows, columns=["op", "group", "calls", "self_s"])
    table["share"] = table["self_s"] / table["self_s"].sum()
    return table.sort_values("self_s", ascending=False, ignore_index=True)


def profiled(call: Callable[[], object], warm: bool) -> Iterable[Any]:
    """The profiler's averages by name of one run of ``call``; with ``warm`` it is run before, under the profiler too.

    A session of the profiler loses the first kernels of a GPU: https://github.com/pytorch/pytorch/issues/192021.
    """
    quiet()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    plan = torch.profiler.schedule(wait=0, warmup=1, active=1) if warm else None
    with torch.profiler.profile(activities=kinds, acc_events=True, schedule=plan) as profile:
        if warm:
            call()
            _until_done()
            profile.step()
        call()
        _until_done()
    return profile.key_averages()


def _until_done() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
