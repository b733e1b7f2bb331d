"""Sampling on the device against the runner's, which sorts the vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from labkit.kernels import sampling
from labkit.kernels.sampling import greedy, greedy_triton, sample_reference, sample_triton
from labkit.request import SamplingParams
from labkit.runner import sampling as runner

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
    """Every row's token is the runner's, or its neighbour where the random number falls on their border in float32."""
    logits = logits.float().cpu()
    expected = runner.sample(logits, params, uniforms)
    for row in torch.nonzero(found.cpu() != expected)[:, 0].tolist():
        assert params[row].temperature >= runner.COLDEST
        probs = runner.filtered_scores(logits[row : row + 1], [params[row]])[0].double().softmax(-1)
        assert probs[found[row]] > 0
        before = probs.cumsum(0)[found[row]] - probs[found[row]]
        assert before - 1e-5 <= uniforms[row] <= before + probs[found[row]] + 1e-5, (row, params[row])


@pytest.mark.parametrize("uniform", UNIFORMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_one_mixed_batch_takes_the_tokens_of_the_runner(seed: int, uniform: float) -> None:
    logits, uniforms = some_logits(len(PARAMS), seed=seed), [uniform] * len(PARAMS)
    arguments = (logits, *tensors(PARAMS, uniforms))
    agree(sample_reference(*arguments), logits, PARAMS, uniforms)
    agree(sample_triton(*arguments), logits, PARAMS, uniforms)


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
    expected = runner.filtered_scores(logits.cpu(), [params])[0].softmax(-1).numpy()
    counts = np.bincount(found, minlength=60)
    assert (counts[expected == 0] == 0).all()
    np.testing.assert_allclose(counts, expected * draws, atol=1.01)


@pytest.mark.parametrize("point", [0.0, 0.5, 1 - 2**-53])
def test_what_is_impossible_is_never_drawn(point: float) -> None:
    logits = torch.full((3, VOCAB), float("-inf"), device=DEVICE)
    logits[:, [7, 4500]] = 1.0
    params = [SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=5)]
    params.append(SamplingParams(temperature=1.0, top_p=0.9))
    found = sample_triton(logits, *tensors(params, [point] * 3))
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


def test_the_temperature_of_greedy_is_the_runners() -> None:
    assert sampling.COLDEST == runner.COLDEST
