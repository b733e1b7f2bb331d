"""Two models on the same problems: which of them were right on what, and whether that may be chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist


@dataclass(frozen=True)
class Paired:
    """Problems by who was right. ``p`` is that of McNemar's exact test, two-sided: how often two models that are
    equally good would differ so much or more. ``difference`` is the share right of the model less that of the
    reference, with the interval of Agresti and Min (2005) from ``low`` to ``high``."""

    both: int
    model_only: int
    reference_only: int
    neither: int
    p: float
    difference: float
    low: float
    high: float

    @property
    def asked(self) -> int:
        """How many problems there were."""
        return self.both + self.model_only + self.reference_only + self.neither


def compare(model: Sequence[bool], reference: Sequence[bool], confidence: float = 0.95) -> Paired:
    """Compares verdicts on the same problems in the same order. Raises ValueError if they are none or not as many."""
    if len(model) != len(reference) or not model:
        raise ValueError(f"verdicts must be of the same problems, got {len(model)} and {len(reference)}")
    pairs = list(zip(model, reference, strict=True))
    both, neither = pairs.count((True, True)), pairs.count((False, False))
    model_only, reference_only = pairs.count((True, False)), pairs.count((False, True))
    low, high = _difference_interval(model_only, reference_only, len(pairs), confidence)
    return Paired(
        both,
        model_only,
        reference_only,
        neither,
        mcnemar(model_only, reference_only),
        (model_only - reference_only) / len(pairs),
        low,
        high,
    )


def mcnemar(one: int, other: int) -> float:
    """Exact two-sided p of ``one`` and ``other`` problems that only one of two models had right: each such problem is
    the throw of a fair coin."""
    throws = one + other
    tail = sum(math.comb(throws, k) for k in range(min(one, other) + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2**throws)))


def _difference_interval(one: int, other: int, n: int, confidence: float) -> tuple[float, float]:
    """Wald's interval with half a problem more in each of the four cells."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    more, less, total = one + 0.5, other + 0.5, n + 2
    difference = (more - less) / total
    half = z * math.sqrt(more + less - (more - less) ** 2 / total) / total
    return max(-1.0, difference - half), min(1.0, difference + half)
