"""Seconds of one call of a kernel, with inputs that no cache holds."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

CACHE_BYTES = 256 * 2**20
"""Several times the L2 of the largest GPU: inputs that come to this much push each other out."""
MOST_SETS = 32
REPLAY_S = 1e-2
"""How long the calls of one graph take when launched singly: enough for starting it to cost nothing beside."""
LONG_S = 1e-3
"""A launch costs nothing beside a call of this length, and many in a row would heat the GPU out of its clock."""

Call = Callable[..., object]
Timer = Callable[[], float]
"""Seconds of one call, measured now."""


def input_sets(one_set_bytes: float) -> int:
    """How many sets of inputs to go round, so that none is still in the cache when its turn comes again."""
    return max(2, min(MOST_SETS, int(-(-CACHE_BYTES // max(1.0, one_set_bytes)))))


def rounds(device: torch.device) -> int:
    """How often a call is measured for the median: a round is some 10 ms on CUDA."""
    return 7 if device.type == "cuda" else 3


def seconds_a_call(call: Call, sets: Sequence[tuple[Any, ...]], device: torch.device) -> float:
    """Median time of ``call(*inputs)``, going round the sets."""
    measure = make_timer(call, sets, device)
    return median(measure() for _ in range(rounds(device)))


def make_timer(call: Call, sets: Sequence[tuple[Any, ...]], device: torch.device) -> Timer:
    """Warms ``call`` up; what is returned measures it anew each time: by graph replay on CUDA, by the clock on a CPU.

    A call that is long, or that cannot be captured, is timed between events instead, which adds what its launch costs.
    """
    for inputs in sets:
        call(*inputs)
    if device.type != "cuda":
        return lambda: _clocked(call, sets)
    torch.cuda.synchronize()
    once = median(_between_events(call, sets) for _ in range(3))
    if once > LONG_S:
        return lambda: _between_events(call, sets)
    calls = max(1, int(REPLAY_S / max(once * len(sets), 1e-7))) * len(sets)
    graph = torch.cuda.CUDAGraph()
    try:
        with _capture(graph):
            for i in range(calls):
                call(*sets[i % len(sets)])
    except RuntimeError:
        _forget_capture()
        return lambda: _between_events(call, sets)
    graph.replay()
    return lambda: _timed(graph.replay) / calls


def _forget_capture() -> None:
    """A capture that failed leaves the random generators in it, where they would refuse to work; one that ends frees
    them."""
    torch.cuda.synchronize()
    with _capture(torch.cuda.CUDAGraph()):
        pass


@contextmanager
def _capture(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """Without the warning that nothing was captured: of a call that cannot be, or on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
        with torch.cuda.graph(graph):
            yield


def _timed(work: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _between_events(call: Call, sets: Sequence[tuple[Any, ...]]) -> float:
    return median(_timed(lambda inputs=inputs: call(*inputs)) for inputs in sets)  # type: ignore[misc]


def _clocked(call: Call, sets: Sequence[tuple[Any, ...]]) -> float:
    times = []
    for inputs in sets:
        began = time.perf_counter()
        call(*inputs)
        times.append(time.perf_counter() - began)
    return median(times)
