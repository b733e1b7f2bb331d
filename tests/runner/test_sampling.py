"""Sampling against a plain numpy reference that goes through the vocabulary one token at a time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit.request import SamplingParams
from labkit.runner.sampling import filtered_scores, sample, token_logprobs, uniform

VOCAB = 60


def reference(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities after temperature, top-k, top-p and min-p, for logits without ties."""
    probs = np.exp((logits - logits.max()) / params.temperature)
    probs /= probs.sum()
    order = sorted(range(len(probs)), key=lambda token: -probs[token])
    if params.top_k:
        for token in order[params.top_k :]:
            probs[token] = 0
        probs /= probs.sum()
    if params.top_p < 1:
        before = 0.0
        for token in order:
            mass, probs[token] = probs[token], probs[token] if before < params.top_p else 0
            before += mass
        probs /= probs.sum()
    probs[probs < params.min_p * probs.max()] = 0
    return probs / probs.sum()


PARAMS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=1.7, top_k=1),
    SamplingParams(temperature=1.0, top_k=7),
    SamplingParams(temperature=1.0, top_k=1000),
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(temperature=0.8, top_p=0.01),
    SamplingParams(temperature=2.0, min_p=0.2),
    SamplingParams(temperature=1.3, top_k=20, top_p=0.7, min_p=0.1),
    SamplingParams(temperature=1.3, top_k=5, top_p=0.95),
]


def some_logits(rows: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return spread * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def test_filters_keep_what_the_reference_keeps_in_one_mixed_batch() -> None:
    logits = some_logits(len(PARAMS))
    found = filtered_scores(logits, PARAMS).softmax(-1).numpy()
    kept = set()
    for row, params in enumerate(PARAMS):
        expected = reference(logits[row].double().numpy(), params)
        np.testing.assert_array_equal(found[row] > 0, expected > 0, err_msg=str(params))
        np.testing.assert_allclose(found[row], expected, atol=1e-6)
        kept.add(int((expected > 0).sum()))
    assert {1, 7, VOCAB} < kept, "the cases must differ in what they keep"


@given(
    st.integers(0, 10**6),
    st.floats(0.1, 5),
    st.integers(0, VOCAB + 5),
    st.floats(0.02, 1),
    st.one_of(st.just(0.0), st.floats(1e-3, 1)),
)
def test_filters_on_any_parameters(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = some_logits(1, seed)
    expected = reference(logits[0].double().numpy(), params)
    found = filtered_scores(logits, [params])[0].softmax(-1).double().numpy()
    # A token on the very border may fall either way in float32; anything more than one token is wrong.
    border = np.flatnonzero((found > 0) != (expected > 0))
    assert len(border) <= 1
    if not len(border):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("params", PARAMS)
def test_draws_follow_the_filtered_distribution(params: SamplingParams) -> None:
    draws = 4000
    logits = some_logits(1)
    uniforms = [uniform(seed=11, position=position) for position in range(draws)]
    found = sample(logits.expand(draws, -1), [params] * draws, uniforms)
    expected = reference(logits[0].double().numpy(), params)
    counts = np.bincount(found.numpy(), minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    common = expected * draws >= 5
    chi_square = ((counts - expected * draws) ** 2)[common] / (expected * draws)[common]
    freedom = max(int(common.sum()) - 1, 1)
    # Mean and variance of a chi-square are its freedom and twice that; five deviations do not happen by chance.
    assert chi_square.sum() < freedom + 5 * np.sqrt(2 * freedom)


def test_uniforms_look_uniform_across_positions_and_across_seeds() -> None:
    for values in ([uniform(5, at) for at in range(5000)], [uniform(seed, 9) for seed in range(5000)]):
        assert all(0 <= value < 1 for value in values)
        counts = np.histogram(values, bins=20, range=(0, 1))[0]
        assert ((counts - 250) ** 2 / 250).sum() < 19 + 5 * np.sqrt(38)
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.06


def test_a_row_is_sampled_alike_in_any_batch() -> None:
    logits, uniforms = some_logits(len(PARAMS)), [uniform(i, 3) for i in range(len(PARAMS))]
    mixed = [*PARAMS[:-1], SamplingParams()]
    together = sample(logits, mixed, uniforms)
    alone = [sample(logits[i : i + 1], [mixed[i]], [uniforms[i]])[0] for i in range(len(mixed))]
    assert together.tolist() == alone
    backwards = sample(logits.flip(0), mixed[::-1], uniforms[::-1])
    assert together.tolist() == backwards.flip(0).tolist()
    assert together[-1] == logits[-1].argmax()


@pytest.mark.parametrize("point", [0.0, 0.5, 1 - 2**-53])
def test_the_ends_of_the_distribution_are_tokens_that_may_be_drawn(point: float) -> None:
    logits = torch.full((1, VOCAB), float("-inf"))
    logits[0, [7, 30]] = 1.0
    assert sample(logits, [SamplingParams(temperature=1.0)], [point]).item() == (7 if point < 0.5 else 30)


def test_logprobs_are_those_of_the_unfiltered_distribution() -> None:
    logits = some_logits(3)
    sampling = [SamplingParams(temperature=0.2, top_k=1, logprobs=3), SamplingParams(), SamplingParams(logprobs=0)]
    found = token_logprobs(logits, torch.tensor([4, 5, 6]), sampling)
    exact = logits.double().numpy()
    exact = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    assert found[1] is None and found[0] is not None and found[2] is not None
    assert found[0].token_id == 4 and found[0].logprob == pytest.approx(exact[0, 4], abs=1e-5)
    assert [token for token, _ in found[0].top] == np.argsort(-exact[0])[:3].tolist()
    assert [value for _, value in found[0].top] == pytest.approx(np.sort(exact[0])[::-1][:3], abs=1e-5)
    assert dataclasses.astuple(found[2]) == (6, pytest.approx(exact[2, 6], abs=1e-5), ())


def test_a_temperature_too_low_for_float32_takes_the_likeliest() -> None:
    logits = torch.tensor([[3.0, 90.0, -5.0]])
    for temperature in (1e-300, 1e-38, 9e-6):
        assert sample(logits, [SamplingParams(temperature=temperature)], [0.999]).tolist() == [1]
