from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.experiments.intervals import (
    Estimate,
    binomial_cdf,
    bootstrap,
    bootstrap_pooled_percentile,
    evidence,
    percentile,
    requests_needed,
    share,
)


@given(st.integers(1, 40), st.data())
def test_the_binomial_is_that_of_exact_arithmetic(n, data):
    k = data.draw(st.integers(0, n))
    p = Fraction(data.draw(st.integers(1, 99)), 100)
    exact = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))
    assert binomial_cdf(k, n, float(p)) == pytest.approx(float(exact), abs=1e-12)


def test_the_interval_of_a_percentile_has_the_ranks_of_the_definition():
    """Ranks by brute force over exact binomial sums."""
    for n, q in product((5, 30, 72, 73, 150), (50, 90, 95, 99)):
        p = Fraction(q, 100)
        terms = [math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(n + 1)]
        below = [sum(terms[:k]) for k in range(n + 2)]  # P(B < k)
        alpha_half = Fraction(25, 1000)
        lower = max(k for k in range(n + 1) if below[k] <= alpha_half)
        uppers = [k for k in range(1, n + 1) if 1 - below[k] <= alpha_half]
        got = percentile(range(1, n + 1), q)
        assert got.value == math.ceil(n * q / 100)
        assert got.low == (lower if lower else -math.inf)
        assert got.high == (min(uppers) if uppers else math.inf)


def test_the_interval_covers_the_true_percentile_as_often_as_it_says():
    rng = np.random.default_rng(5)
    truth = -math.log(1 - 0.9)  # P90 of the exponential
    found = [percentile(rng.exponential(size=200), 90) for _ in range(1500)]
    covered = np.mean([estimate.low <= truth <= estimate.high for estimate in found])
    assert 0.945 <= covered <= 0.985  # conservative: ranks are whole


def test_a_p95_has_no_upper_limit_below_72_requests():
    assert percentile(range(71), 95).high == math.inf or percentile(range(72), 95).high == math.inf
    assert percentile(range(100), 95).high < math.inf


def test_failed_requests_can_push_a_percentile_to_infinity():
    assert percentile([1.0] * 90 + [math.inf] * 10, 95).value == math.inf
    assert percentile([1.0] * 96 + [math.inf] * 4, 95).value == 1.0


@pytest.mark.parametrize("hits,n", [(0, 10), (1, 10), (5, 10), (10, 10), (3, 400), (950, 1000)])
def test_wilson_solves_its_own_equation(hits, n):
    """The limits are the p at which |hits/n − p| = z √(p(1−p)/n)."""
    z = 1.959963984540054
    estimate = share(hits, n)
    for p in (estimate.low, estimate.high):
        assert abs(hits / n - p) == pytest.approx(z * math.sqrt(p * (1 - p) / n), abs=1e-9)
    assert estimate.low <= estimate.value <= estimate.high


@pytest.mark.parametrize("p", [0.02, 0.3])
def test_the_interval_of_a_share_covers_as_often_as_it_says(p):
    """Coverage in closed form: the sum of the binomial weights of the outcomes whose interval holds p."""
    n = 120
    weights = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    wilson = sum(w for k, w in enumerate(weights) if share(k, n).low <= p <= share(k, n).high)
    assert 0.92 <= wilson <= 0.985


def test_the_bootstrap_agrees_with_the_normal_interval_of_a_mean():
    data = np.random.default_rng(1).normal(10, 2, 400)
    estimate = bootstrap(data, "s")
    half = 1.96 * data.std() / 20
    assert estimate.value == pytest.approx(data.mean())
    assert estimate.low == pytest.approx(data.mean() - half, abs=0.02)
    assert estimate.high == pytest.approx(data.mean() + half, abs=0.02)
    assert bootstrap(data) == bootstrap(data)
    assert bootstrap(data, seed=1) != bootstrap(data, seed=2)


def test_a_pooled_percentile_weighs_its_values_and_resamples_the_clusters():
    values, weights, owners = np.array([3.0, 1.0, 2.0, 4.0]), np.array([1.0, 1.0, 1.0, 1.0]), np.array([0, 0, 1, 1])
    assert bootstrap_pooled_percentile(values, weights, owners, 50).value == 2.0
    assert bootstrap_pooled_percentile(values, weights * [5, 1, 1, 1], owners, 50).value == 3.0
    one_cluster = bootstrap_pooled_percentile(values, weights, np.zeros(4, int), 50)
    assert (one_cluster.low, one_cluster.high) == (2.0, 2.0)
    apart = bootstrap_pooled_percentile(np.r_[np.ones(50), np.full(50, 9.0)], np.ones(100), np.repeat([0, 1], 50), 50)
    assert (apart.low, apart.high) == (1.0, 9.0)


def test_how_many_requests_a_p95_needs():
    assert (requests_needed(0), requests_needed(10)) == (90, 398)
    for misses in range(30):
        n = requests_needed(misses)
        assert binomial_cdf(misses, n, 0.05) <= 0.01 < binomial_cdf(misses, n - 1, 0.05)


def test_evidence_has_three_outcomes():
    assert evidence([0.1] * 90, 1.0).verdict == "within"
    assert evidence([0.1] * 89, 1.0).verdict == "undecided"
    assert evidence([0.1] * 80 + [math.inf] * 20, 1.0).verdict == "over"
    assert evidence([], 1.0).verdict == "undecided"


def test_nothing_to_go_by_is_said():
    for nothing in (percentile([], 95), share(0, 0), bootstrap([])):
        assert math.isnan(nothing.value) and nothing.n == 0 and str(nothing) == "–"
    assert str(Estimate(0.5, 0.4, math.inf, 10, "s")) == "0.500 s [0.400, ∞]"
    assert str(share(1, 2)).startswith("50.0 % [")
