"""Sampling in PyTorch against a plain numpy reference that goes through the vocabulary one token at a time, and in
Triton against sampling in PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit.kernels.sampling import COLDEST, filtered_scores, greedy, greedy_triton, sample_reference, sample_triton
from labkit.request import SamplingParams

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 5000
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=1.7, top_k=1),
    SamplingParams(temperature=1.0, top_k=50),
    SamplingParams(temperature=1.0, top_k=VOCAB + 1),
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(temperature=0.8, top_p=0.01),
    SamplingParams(temperature=2.0, min_p=0.2),
    SamplingParams(temperature=1.3, top_k=20, top_p=0.7, min_p=0.1),
    SamplingParams(temperature=1e-30, top_k=3),
]
UNIFORMS = [0.0, 0.31, 0.77, 1 - 2**-53]


def some_logits(rows: int, vocab: int = VOCAB, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    logits = 2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    return logits.to(DEVICE, dtype)


def tensors(params: list[SamplingParams], uniforms: list[float]) -> tuple[torch.Tensor, ...]:
    """The parameters as sample takes them: temperature, top_k, top_p, min_p, uniforms."""
    column = lambda name, dtype: torch.tensor([getattr(each, name) for each in params], dtype=dtype, device=DEVICE)  # noqa: E731
    floats = [column(name, torch.float32) for name in ("temperature", "top_p", "min_p")]
    drawn = torch.tensor(uniforms, dtype=torch.float64, device=DEVICE)
    return floats[0], column("top_k", torch.int32), floats[1], floats[2], drawn


def agree(found: torch.Tensor, logits: torch.Tensor, params: list[SamplingParams], uniforms: list[float]) -> None:
    """Every row's token is the reference's, or its neighbour where the random number falls on their border."""
    *filters, drawn = tensors(params, uniforms)
    expected = sample_reference(logits, *filters, drawn)
    kept = filtered_scores(logits, *filters)
    for row in torch.nonzero(found != expected)[:, 0].tolist():
        assert params[row].temperature >= COLDEST
        probs = kept[row].double().softmax(-1)
        assert probs[found[row]] > 0
        before = probs.cumsum(0)[found[row]] - probs[found[row]]
        assert before - 1e-5 <= uniforms[row] <= before + probs[found[row]] + 1e-5, (row, params[row])


SMALL = 60
FILTERS = [*PARAMS[1:5], SamplingParams(temperature=1.0, top_k=7), *PARAMS[5:10]]


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


def test_filters_keep_what_the_numpy_reference_keeps_in_one_mixed_batch() -> None:
    logits = some_logits(len(FILTERS), SMALL)
    found = filtered_scores(logits, *tensors(FILTERS, [0.0] * len(FILTERS))[:-1]).softmax(-1).cpu().numpy()
    kept = set()
    for row, params in enumerate(FILTERS):
        expected = reference(logits[row].double().cpu().numpy(), params)
        np.testing.assert_array_equal(found[row] > 0, expected > 0, err_msg=str(params))
        np.testing.assert_allclose(found[row], expected, atol=1e-6)
        kept.add(int((expected > 0).sum()))
    assert {1, 7, SMALL} < kept, "the cases must differ in what they keep"


@given(
    st.integers(0, 10**6),
    st.floats(0.1, 5),
    st.integers(0, SMALL + 5),
    st.floats(0.02, 1),
    st.one_of(st.just(0.0), st.floats(1e-3, 1)),
)
def test_filters_on_any_parameters(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = some_logits(1, SMALL, seed)
    expected = reference(logits[0].double().cpu().numpy(), params)
    found = filtered_scores(logits, *tensors([params], [0.0])[:-1])[0].softmax(-1).double().cpu().numpy()
    # A token on the very border may fall either way in float32; anything more than one token is wrong.
    border = np.flatnonzero((found > 0) != (expected > 0))
    assert len(border) <= 1
    if not len(border):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("params", FILTERS)
def test_draws_of_the_reference_follow_the_filtered_distribution(params: SamplingParams) -> None:
    draws = 4000
    logits = some_logits(1, SMALL)
    uniforms = np.random.default_rng(11).random(draws).tolist()
    found = sample_reference(logits.expand(draws, -1), *tensors([params] * draws, uniforms)).cpu()
    expected = reference(logits[0].double().cpu().numpy(), params)
    counts = np.bincount(found.numpy(), minlength=SMALL)
    assert counts[expected == 0].sum() == 0
    common = expected * draws >= 5
    chi_square = ((counts - expected * draws) ** 2)[common] / (expected * draws)[common]
    freedom = max(int(common.sum()) - 1, 1)
    # Mean and variance of a chi-square are its freedom and twice that; five deviations do not happen by chance.
    assert chi_square.sum() < freedom + 5 * np.sqrt(2 * freedom)


def test_a_temperature_too_low_for_float32_takes_the_likeliest() -> None:
    logits = torch.tensor([[3.0, 90.0, -5.0]], device=DEVICE)
    for temperature in (1e-300, 1e-38, 9e-6):
        columns = tensors([SamplingParams(temperature=temperature)], [0.999])
        assert sample_reference(logits, *columns).tolist() == sample_triton(logits, *columns).tolist() == [1]


@pytest.mark.parametrize("uniform", UNIFORMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_one_mixed_batch_takes_the_tokens_of_the_reference(seed: int, uniform: float) -> None:
    logits, uniforms = some_logits(len(PARAMS), seed=seed), [uniform] * len(PARAMS)
    agree(sample_triton(logits, *tensors(PARAMS, uniforms)), logits, PARAMS, uniforms)


@pytest.mark.parametrize("vocab", [1, 17, 4096, 4097])
def test_vocabularies_that_end_beside_a_chunk(vocab: int) -> None:
    params = [PARAMS[i] for i in (0, 1, 4, 6, 9)]
    logits, uniforms = some_logits(len(params), vocab, seed=2), [0.5] * len(params)
    agree(sample_triton(logits, *tensors(params, uniforms)), logits, params, uniforms)


def test_half_precision_has_ties_at_the_threshold_and_they_are_kept() -> None:
    params = [SamplingParams(temperature=1.0, top_k=10), SamplingParams(temperature=1.0, top_p=0.5)] * 3
    uniforms = [0.0, 0.2, 0.4, 0.6, 0.8, 0.999]
    logits = (some_logits(len(params)) * 2).round().div(2).to(torch.float16)
    agree(sample_triton(logits, *tensors(params, uniforms)), logits, params, uniforms)


def test_a_row_is_sampled_alike_in_any_batch() -> None:
    logits, uniforms = some_logits(len(PARAMS)), [(0.37 * i) % 1 for i in range(len(PARAMS))]
    columns = tensors(PARAMS, uniforms)
    together = sample_triton(logits, *columns)
    for row in (1, 6, 9):
        assert sample_triton(logits[row : row + 1], *(each[row : row + 1] for each in columns)) == together[row]
    backwards = sample_triton(logits.flip(0), *(each.flip(0) for each in columns))
    assert together.tolist() == backwards.flip(0).tolist()


def test_draws_follow_the_filtered_distribution() -> None:
    draws, params = 40, SamplingParams(temperature=1.0, top_p=0.8)
    logits = some_logits(1, vocab=60)
    uniforms = ((np.arange(draws) + 0.5) / draws).tolist()
    found = sample_triton(logits.repeat(draws, 1), *tensors([params] * draws, uniforms)).cpu().numpy()
    expected = filtered_scores(logits, *tensors([params], [0.0])[:-1])[0].softmax(-1).cpu().numpy()
    counts = np.bincount(found, minlength=60)
    assert (counts[expected == 0] == 0).all()
    np.testing.assert_allclose(counts, expected * draws, atol=1.01)


@pytest.mark.parametrize("point", [0.0, 0.5, 1 - 2**-53])
def test_what_is_impossible_is_never_drawn(point: float) -> None:
    logits = torch.full((3, VOCAB), float("-inf"), device=DEVICE)
    logits[:, [7, 4500]] = 1.0
    params = [SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=5)]
    params.append(SamplingParams(temperature=1.0, top_p=0.9))
    for sample in (sample_reference, sample_triton):
        found = sample(logits, *tensors(params, [point] * 3))
        assert found.tolist() == [7 if point < 0.5 else 4500] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 400, 4096, 9001])
def test_greedy_takes_the_first_of_the_likeliest(vocab: int, dtype: torch.dtype) -> None:
    logits = some_logits(3, vocab, dtype=dtype)
    logits[1, [vocab // 3, vocab // 2, vocab - 1]] = 50.0
    logits[2] = float("-inf")
    assert greedy_triton(logits).tolist() == logits.cpu().argmax(-1).tolist()
    assert greedy(logits).tolist() == logits.cpu().argmax(-1).tolist()
    assert greedy_triton(logits[:0]).shape == (0,)
