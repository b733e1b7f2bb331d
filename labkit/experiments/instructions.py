"""What a CPU gains from the instructions of its generation: one product, by oneDNN held to SSE4.1 and by all it knows.

The CPU's counterpart to kernels made for a generation of GPUs. oneDNN reads its limit once in a process, so the old
instructions have a process of their own; this file is what it runs, and imports torch alone, to be there soon.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import pandas as pd
import torch
import torch.nn.functional as F

from labkit.errors import UserError

OLD, NEW = "SSE4.1 alone", "all instructions"
SIZE = 512
"""Rows and columns of both matrices."""
_APART = 1e-4
"""Most by which a product in float32 may differ from that in float64, relative to its norm."""


def instruction_rounds(rounds: int = 15) -> pd.DataFrame:
    """Times of a float32 product [512, 512] x [512, 512] on one core, in the columns of ``contests.run_contests``
    (``x`` is 512, bytes 0); two rows with a note where oneDNN cannot be held back.

    The two take turns, so that a machine that grows slow does so for both. Raises UserError if the second process
    fails.
    """
    rows: list[tuple[str, int, int, float, int, str]] = []
    if torch.backends.cpu.get_cpu_capability().startswith("AVX") and torch.backends.mkldnn.is_available():
        times = _take_turns(rounds)
        rows += [(way, SIZE, turn, seconds, 0, "") for way in times for turn, seconds in enumerate(times[way])]
    else:
        rows += [(way, SIZE, -1, math.nan, 0, "on x86 CPUs only") for way in (OLD, NEW)]
    return pd.DataFrame(rows, columns=["way", "x", "round", "seconds", "bytes", "note"])


def _take_turns(rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, one that warms up left out."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", __name__]
    threads = torch.get_num_threads()
    times: dict[str, list[float]] = {OLD: [], NEW: []}
    with _worker(command, environment) as other:
        torch.set_num_threads(1)
        try:
            here = _product()
            for _ in range(rounds + 1):
                times[OLD].append(_ask(other))
                times[NEW].append(here())
        finally:
            torch.set_num_threads(threads)
    return {way: seconds[1:] for way, seconds in times.items()}


def _worker(command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Without buffers: what it could not be told any more would be an error of its own when it is left."""
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)


def _ask(worker: subprocess.Popen[bytes]) -> float:
    assert worker.stdin and worker.stdout
    try:
        worker.stdin.write(b"\n")
        return float(worker.stdout.readline())
    except (BrokenPipeError, ValueError) as error:
        raise UserError("the process that multiplies with SSE4.1 alone has failed; see what it printed") from error


def _product() -> Callable[[], float]:
    """Checks the product; what is returned works it out again and says how many seconds that took."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SIZE, SIZE, generator=generator) for _ in range(2))
    x, weight, bias = a.to_mkldnn(), b.to_mkldnn(), torch.zeros(SIZE).to_mkldnn()
    right = a.double() @ b.double().T
    apart = float(torch.linalg.vector_norm(F.linear(x, weight, bias).to_dense() - right) / right.norm())
    if not apart <= _APART:
        raise UserError(f"oneDNN's product differs from the right one by {apart:.2g} of its norm")

    def timed() -> float:
        began = time.perf_counter()
        F.linear(x, weight, bias)
        return time.perf_counter() - began

    return timed


if __name__ == "__main__":
    again = _product()
    for _ in sys.stdin:
        print(again(), flush=True)
