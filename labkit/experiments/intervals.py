"""Numbers with intervals: order statistics and Wilson where a closed form holds, a seeded bootstrap elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value with its interval. ``n`` is what it rests on: requests, gaps, slices. NaN when there is nothing to go by.

    A limit may be infinite: too few requests to bound it on that side.
    """

    value: float
    low: float
    high: float
    n: int
    unit: str = ""
    confidence: float = 0.95

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "–"
        scale, unit = (100.0, " %") if self.unit == "share" else (1.0, f" {self.unit}" if self.unit else "")
        shown = [digits(number * scale) for number in (self.value, self.low, self.high)]
        attained = "" if abs(self.confidence - 0.95) < 0.005 else f" at {self.confidence:.0%}"
        return f"{shown[0]}{unit} [{shown[1]}, {shown[2]}]{attained}"


def digits(value: float) -> str:
    """Three significant digits, no exponent, thousands apart from 10 000 on; "–" for NaN."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    rounded = round(value, places)
    text = f"{rounded:.{places}f}" if abs(rounded) < 10_000 else f"{rounded:,.0f}".replace(",", "\u202f")
    return text.replace("-", "−")


def percentile(values: Iterable[float], q: float, unit: str = "", confidence: float = 0.95) -> Estimate:
    """Percentile q as an order statistic: the ⌈n q/100⌉-th smallest value (nearest rank, no interpolation).

    The interval [x_(l), x_(u)] holds for any distribution: with B ~ Binomial(n, q/100), l is the largest rank with
    P(B < l) ≤ α/2 and u the smallest with P(B ≥ u) ≤ α/2. With too few values for such a rank that side is infinite
    (below: 0 for q's lower side cannot be excluded, so −inf). Values may be inf.
    """
    if not 0 < q < 100:
        raise ValueError(f"q must be above 0 and below 100, got {q!r}")
    ordered = np.sort(np.asarray(list(values), dtype=float))
    n = len(ordered)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, unit, confidence)
    alpha = 1 - confidence
    below = np.cumsum(np.exp(_binomial_log_pmf(n, q / 100)))  # below[k] = P(B <= k)
    lower = int(np.searchsorted(below, alpha / 2, side="right"))  # the first k with P(B <= k) > alpha / 2
    upper = (
        int(np.searchsorted(below, 1 - alpha / 2, side="left")) + 1
    )  # P(B >= u) <= alpha/2  <=>  P(B <= u-1) >= 1-alpha/2
    rank = math.ceil(round(n * q / 100, 9))
    return Estimate(
        float(ordered[rank - 1]),
        float(ordered[lower - 1]) if lower >= 1 else -math.inf,
        float(ordered[upper - 1]) if upper <= n else math.inf,
        n,
        unit,
        confidence,
    )


def share(hits: int, n: int, confidence: float = 0.95) -> Estimate:
    """hits / n with Wilson's interval: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)."""
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, "share", confidence)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = hits / n
    centre = p + z * z / (2 * n)
    margin = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Rounding must not push the limits past what the formula gives exactly at the ends.
    low = 0.0 if hits == 0 else max(0.0, (centre - margin) / scale)
    high = 1.0 if hits == n else min(1.0, (centre + margin) / scale)
    return Estimate(p, low, high, n, "share", confidence)


def bootstrap(values: Iterable[float], unit: str = "", confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Mean, with the percentile interval of the means of RESAMPLES resamples (seeded)."""
    data = np.asarray(list(values), dtype=float)
    if not len(data):
        return Estimate(math.nan, math.nan, math.nan, 0, unit, confidence)
    rng = np.random.default_rng(seed)
    means = np.array([data[rng.integers(0, len(data), len(data))].mean() for _ in range(RESAMPLES)])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(data.mean()), float(low), float(high), len(data), unit, confidence)


def bootstrap_pooled_percentile(
    values: np.ndarray,
    weights: np.ndarray,
    owners: np.ndarray,
    q: float,
    unit: str = "",
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 400,
) -> Estimate:
    """Weighted percentile q of values [n] that come in clusters; the interval resamples the clusters (``owners``,
    ints [n])."""
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan, 0, unit, confidence)
    order = np.argsort(values, kind="stable")
    values, weights = values[order], weights[order].astype(float)
    _, owners = np.unique(owners[order], return_inverse=True)
    clusters = int(owners.max()) + 1

    def at(weight: np.ndarray) -> float:
        passed = np.cumsum(weight)
        # The tolerance keeps a rank that is whole in exact arithmetic from being rounded up.
        return float(values[np.searchsorted(passed, passed[-1] * (q / 100) * (1 - 1e-12), side="left")])

    rng = np.random.default_rng(seed)
    drawn = [at(weights * rng.multinomial(clusters, np.full(clusters, 1 / clusters))[owners]) for _ in range(resamples)]
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(at(weights), float(low), float(high), len(values), unit, confidence)


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(B ≤ k) for B ~ Binomial(n, p)."""
    if k < 0 or k >= n:
        return 0.0 if k < 0 else 1.0
    return float(min(1.0, np.exp(_binomial_log_pmf(n, p)[: k + 1]).sum()))


@dataclass(frozen=True)
class Evidence:
    """Whether ``n`` requests with ``misses`` over a limit show that percentile ``q`` is within it."""

    misses: int
    n: int
    needed: int
    """Requests that would have to be seen with so many misses before the percentile is shown to be within the limit."""
    verdict: str
    """within, over or undecided."""


def requests_needed(misses: int, q: float = 95, confidence: float = 0.99) -> int:
    """The smallest n at which ``misses`` over the limit still show, at this confidence, that percentile q is within it.

    That is P(Binomial(n, 1 − q/100) ≤ misses) ≤ 1 − confidence: 0 misses need 90 requests for a P95 at 99 %, 10 need
    398.
    """
    low, high = misses, max(2 * misses, 1)
    while binomial_cdf(misses, high, 1 - q / 100) > 1 - confidence:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if binomial_cdf(misses, middle, 1 - q / 100) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def evidence(latencies: Iterable[float], limit: float, q: float = 95, confidence: float = 0.99) -> Evidence:
    """Is percentile q within ``limit``? Failed requests belong in ``latencies`` as inf."""
    data = np.asarray(list(latencies), dtype=float)
    misses, n = int((data > limit).sum()), len(data)
    needed = requests_needed(misses, q, confidence)
    over = n > 0 and 1 - binomial_cdf(misses - 1, n, 1 - q / 100) <= 1 - confidence
    return Evidence(misses, n, needed, "within" if n >= needed else "over" if over else "undecided")


def _binomial_log_pmf(n: int, p: float) -> np.ndarray:
    """log P(B = k) for k = 0 … n."""
    if p <= 0 or p >= 1:
        certain = np.full(n + 1, -np.inf)
        certain[0 if p <= 0 else n] = 0.0
        return certain
    k = np.arange(n + 1)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    return np.asarray(factorials[n] - factorials[k] - factorials[n - k] + k * math.log(p) + (n - k) * math.log1p(-p))
