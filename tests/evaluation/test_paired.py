from __future__ import annotations

import itertools
import math

import pytest

from labkit.evaluation.paired import compare, mcnemar


@pytest.mark.parametrize(("one", "other"), [(0, 0), (1, 0), (3, 3), (7, 2), (2, 7), (0, 9), (5, 4)])
def test_the_p_value_is_the_share_of_all_coin_throws_that_are_as_uneven(one: int, other: int) -> None:
    throws = list(itertools.product((0, 1), repeat=one + other))
    uneven = [each for each in throws if abs(2 * sum(each) - len(each)) >= abs(one - other)]
    assert mcnemar(one, other) == pytest.approx(len(uneven) / len(throws))


def test_many_problems_overflow_nothing() -> None:
    assert 0 < mcnemar(900, 1100) < 1e-4 and mcnemar(0, 3000) == 0.0


def test_problems_are_counted_by_who_was_right() -> None:
    model = [True] * 5 + [True] * 3 + [False] * 1 + [False] * 2
    reference = [True] * 5 + [False] * 3 + [True] * 1 + [False] * 2
    found = compare(model, reference)
    assert (found.both, found.model_only, found.reference_only, found.neither) == (5, 3, 1, 2)
    assert found.difference == pytest.approx(2 / 11) and found.p == mcnemar(3, 1)
    assert found.low < found.difference < found.high
    turned = compare(reference, model)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low)) and turned.p == found.p


@pytest.mark.parametrize(("more", "less"), [(0.02, 0.02), (0.1, 0.02), (0.3, 0.1), (0.01, 0.0)])
def test_the_interval_holds_the_true_difference_as_often_as_it_says(more: float, less: float) -> None:
    """Every outcome of 40 problems, weighed by how likely it is."""
    n, covered = 40, 0.0
    for one in range(n + 1):
        for other in range(n + 1 - one):
            ways = math.comb(n, one) * math.comb(n - one, other)
            likely = ways * more**one * less**other * (1 - more - less) ** (n - one - other)
            if likely > 1e-12:
                found = compare(
                    [True] * one + [False] * (n - one), [False] * one + [True] * other + [False] * (n - one - other)
                )
                covered += likely * (found.low <= more - less <= found.high)
    assert covered > 0.94


@pytest.mark.parametrize("verdicts", [([], []), ([True], [True, False])])
def test_verdicts_of_other_problems_are_refused(verdicts: tuple[list[bool], list[bool]]) -> None:
    with pytest.raises(ValueError, match="same problems"):
        compare(*verdicts)
