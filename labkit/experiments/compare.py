"""Comparing two deployments over repeated, interleaved runs: is the work the same, and what is the ratio?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from labkit.experiments.intervals import Estimate
from labkit.experiments.metrics import measured
from labkit.experiments.store import Run


@dataclass(frozen=True)
class SameWork:
    """Whether two runs did the same work, so that their speeds may be compared."""

    common: int
    """Requests measured and answered in both."""
    only_here: int
    only_there: int
    different: tuple[int, ...]
    """Requests answered with different text."""

    @property
    def same(self) -> bool:
        return self.common > 0 and not self.different

    def __str__(self) -> str:
        apart = self.only_here + self.only_there
        answers = (
            f"{len(self.different)} of {self.common} answers differ"
            if self.different
            else f"{self.common} answers alike"
        )
        return answers + (f", {apart} requests answered in only one of the runs" if apart else "")


def same_work(here: Run, there: Run) -> SameWork:
    """Compares the answers, request by request. The same workload and seed asks the same question under the same
    number."""
    texts = []
    for run in (here, there):
        rows = measured(run.requests, run.window)
        done = rows[rows["failure"] == ""]
        texts.append(
            {
                index: (text, tokens)
                for index, text, tokens in zip(done.index, done["text"], done["tokens"], strict=True)
            }
        )
    common = texts[0].keys() & texts[1].keys()
    different = tuple(sorted(int(index) for index in common if texts[0][index] != texts[1][index]))
    return SameWork(len(common), len(texts[0]) - len(common), len(texts[1]) - len(common), different)


@dataclass(frozen=True)
class Comparison:
    """A metric in two sets of runs. ``ratio`` is there / here; its ``confidence`` is what so many repeats attain."""

    here: tuple[float, ...]
    there: tuple[float, ...]
    ratio: Estimate
    work: tuple[SameWork, ...]
    """One for every pair of first and later runs that were compared."""
    invalid: tuple[str, ...]
    """Runs whose own validity check failed: no verdict may rest on this comparison."""

    @property
    def fair(self) -> bool:
        return all(work.same for work in self.work) and not self.invalid


def compare(here: Sequence[Run], there: Sequence[Run], metric: Callable[[Run], Estimate]) -> Comparison:
    """``metric`` of the runs ``there`` over that of the runs ``here``; the runs should have been interleaved.

    Raises ValueError without runs, or when workloads or seeds differ.
    """
    if not here or not there:
        raise ValueError("a comparison needs runs on both sides")
    workloads = {str(run.manifest["workload"]) for run in (*here, *there)}
    if len(workloads) > 1:
        raise ValueError("these runs were not made under the same workload and seed; there is nothing to compare")
    a, b = tuple(metric(run).value for run in here), tuple(metric(run).value for run in there)
    work = tuple(same_work(one, other) for one, other in zip(here, there, strict=False))
    invalid = tuple(run.name for run in (*here, *there) if not run.valid)
    ratio = ratio_of_estimates(metric(here[0]), metric(there[0])) if len(a) == len(b) == 1 else ratio_of_medians(a, b)
    return Comparison(a, b, ratio, work, invalid)


def ratio_of_estimates(here: Estimate, there: Estimate) -> Estimate:
    """there / here for one run a side: [there.low / here.high, there.high / here.low].

    Its confidence is what the two intervals have at least in common (90 % for two of 95 %), and it knows nothing of
    what differs from run to run: repeat the runs for a verdict on a small difference.
    """
    confidence = max(0.0, here.confidence + there.confidence - 1)
    n = here.n + there.n
    if not here.value > 0 or not math.isfinite(there.value):
        return Estimate(math.nan, math.nan, math.nan, n, "x", confidence)
    low = max(0.0, there.low) / here.high if here.high > 0 else math.nan
    return Estimate(
        there.value / here.value, low, there.high / here.low if here.low > 0 else math.inf, n, "x", confidence
    )


def ratio_of_medians(here: Sequence[float], there: Sequence[float], confidence: float = 0.95) -> Estimate:
    """median(there) / median(here) with the interval of a shift in logarithms (Mann–Whitney), free of any distribution.

    The limits are order statistics of all pairwise ratios: the k-th smallest and k-th largest, k the largest with P(U
    < k) ≤ α/2. With few repeats even the whole range attains less than ``confidence``; what it attains is in the
    result. Values must be positive; NaN, inf or 0 anywhere gives no interval.
    """
    a, b = np.asarray(here, dtype=float), np.asarray(there, dtype=float)
    value = float(np.median(b) / np.median(a)) if np.median(a) else math.nan
    if not (np.isfinite(a).all() and np.isfinite(b).all() and (a > 0).all() and (b > 0).all()):
        return Estimate(value, math.nan, math.nan, len(a) + len(b), "x", 0.0)
    ratios = np.sort((b[:, None] / a[None, :]).ravel())
    counts = np.array(_mann_whitney(len(a), len(b)), dtype=float)
    below = np.cumsum(counts) / counts.sum()  # below[u] = P(U <= u)
    rank = max(1, int(np.searchsorted(below, (1 - confidence) / 2, side="right")))
    attained = 1 - 2 * float(below[rank - 1])
    return Estimate(value, float(ratios[rank - 1]), float(ratios[-rank]), len(a) + len(b), "x", max(0.0, attained))


@cache
def _mann_whitney(m: int, n: int) -> tuple[int, ...]:
    """How many of the orders of m and n values have U = 0 … m n (of all pairs, those in which the second is
    smaller)."""
    if m == 0 or n == 0:
        return (1,)
    last_is_first, last_is_second = _mann_whitney(m - 1, n), _mann_whitney(m, n - 1)
    counts = [0] * (m * n + 1)
    for u, count in enumerate(last_is_second):
        counts[u] += count
    for u, count in enumerate(last_is_first):
        counts[u + n] += count
    return tuple(counts)
