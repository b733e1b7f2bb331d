"""Seconds of one call of a kernel, with inputs that no cache holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

CACHE_BYTES = 256 * 2**20
"""Several times the L2 of the largest GPU: inputs that come to this much push each other out."""
MOST_SETS = 32
REPLAYS = 7
REPLAY_S = 1e-2
"""How long the calls of one graph take when launched singly: enough for starting it to cost nothing beside."""
LONG_S = 1e-3
"""A launch costs nothing beside a call of this length, and many in a row would heat the GPU out of its clock."""

Call = Callable[..., object]


def input_sets(one_set_bytes: float) -> int:
    """How many sets of inputs to go round, so that none is still in the cache when its turn comes again."""
    return max(2, min(MOST_SETS, int(-(-CACHE_BYTES // max(1.0, one_set_bytes)))))


def seconds_a_call(call: Call, sets: Sequence[tuple[Any, ...]], device: torch.device) -> float:
    """Median time of ``call(*inputs)``, going round the sets: by graph replay on CUDA, by the clock on a CPU.

    A call that is long, or that cannot be captured, is timed between events instead, which adds what its launch costs.
    """
    for inputs in sets:
        call(*inputs)
    if device.type != "cuda":
        return _clocked(call, sets)
    torch.cuda.synchronize()
    try:
        return _replayed(call, sets)
    except RuntimeError:
        torch.cuda.synchronize()
        return _between_events(call, sets)


def _replayed(call: Call, sets: Sequence[tuple[Any, ...]]) -> float:
    once = _between_events(call, sets)
    if once > LONG_S:
        return once
    rounds = max(1, int(REPLAY_S / max(once * len(sets), 1e-7)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for inputs in sets:
                call(*inputs)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return median(times) / (rounds * len(sets))


def _between_events(call: Call, sets: Sequence[tuple[Any, ...]]) -> float:
    times = []
    for _ in range(5):
        for inputs in sets:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call(*inputs)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
    return median(times)


def _clocked(call: Call, sets: Sequence[tuple[Any, ...]]) -> float:
    times = []
    for _ in range(3):
        for inputs in sets:
            began = time.perf_counter()
            call(*inputs)
            times.append(time.perf_counter() - began)
    return median(times)
