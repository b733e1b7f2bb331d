"""Where the time of one call goes: the dearest kernels and how long the device had any, or the dearest functions."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

TOP = 15


def device_profile(call: Callable[[], object]) -> str:
    """A table of the dearest kernels of ``call`` (the dearest operators where there is no GPU) by their own time, and
    the share of the wall time in which the GPU ran at least one kernel."""
    cuda = torch.cuda.is_available()
    kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind], acc_events=True) as profile:
        began = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        wall_s = time.perf_counter() - began
    if not cuda:
        own = [(event.key, event.count, event.self_cpu_time_total / 1e3) for event in profile.key_averages()]
        return kernel_table(own, wall_s)
    kernels: dict[str, tuple[int, float]] = {}
    spans = []
    for event in profile.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA and event.time_range.elapsed_us() > 0:
            calls, total = kernels.get(event.name, (0, 0.0))
            kernels[event.name] = (calls + 1, total + event.time_range.elapsed_us() / 1e3)
            spans.append((event.time_range.start, event.time_range.end))
    busy_s = union_length(spans) / 1e6
    text = kernel_table([(name, *figures) for name, figures in kernels.items()], wall_s)
    return f"{text}\nGPU busy {busy_s / wall_s:.1%} of {wall_s:.3f} s (under the profiler)"


def host_profile(call: Callable[[], object]) -> str:
    """A table of the dearest Python functions of ``call`` by their own time. Tracing makes short functions look dearer
    than they are."""
    profiler = cProfile.Profile()
    began = time.perf_counter()
    profiler.runcall(call)
    wall_s = time.perf_counter() - began
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    own = [
        (f"{Path(file).name}:{line} {name}" if line else name, calls, own_s * 1e3)
        for (file, line, name), (_, calls, own_s, _, _) in stats.items()
    ]
    return kernel_table(own, wall_s)


def kernel_table(rows: Iterable[tuple[str, int, float]], wall_s: float) -> str:
    """The TOP rows by total milliseconds: name, calls, total, share of the wall time."""
    ordered = sorted(rows, key=lambda row: -row[2])
    lines = [f"{'calls':>9}  {'total ms':>10}  {'share':>6}  where"]
    lines += [
        f"{calls:>9,}  {total_ms:>10.2f}  {total_ms / wall_s / 1e3:>6.1%}  {_short(name)}"
        for name, calls, total_ms in ordered[:TOP]
    ]
    if rest := ordered[TOP:]:
        rest_ms = sum(row[2] for row in rest)
        lines.append(
            f"{sum(row[1] for row in rest):>9,}  {rest_ms:>10.2f}  {rest_ms / wall_s / 1e3:>6.1%}  {len(rest)} others"
        )
    return "\n".join(lines)


def union_length(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals (begin, end)."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _short(name: str) -> str:
    name = " ".join(name.removeprefix("void ").split())
    return name if len(name) <= 76 else f"{name[:60]}…{name[-15:]}"
