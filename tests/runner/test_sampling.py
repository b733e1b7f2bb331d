"""Random numbers that look random, and log-probabilities against numpy's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from labkit.request import SamplingParams
from labkit.runner.sampling import token_logprobs, uniform


def test_uniforms_look_uniform_across_positions_and_across_seeds() -> None:
    for values in ([uniform(5, at) for at in range(5000)], [uniform(seed, 9) for seed in range(5000)]):
        assert all(0 <= value < 1 for value in values)
        counts = np.histogram(values, bins=20, range=(0, 1))[0]
        assert ((counts - 250) ** 2 / 250).sum() < 19 + 5 * np.sqrt(38)
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.06


def test_logprobs_are_those_of_the_unfiltered_distribution() -> None:
    logits = 2 * torch.randn(3, 60, generator=torch.Generator().manual_seed(0))
    sampling = [SamplingParams(temperature=0.2, top_k=1, logprobs=3), SamplingParams(), SamplingParams(logprobs=0)]
    found = token_logprobs(logits, torch.tensor([4, 5, 6]), sampling)
    exact = logits.double().numpy()
    exact = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    assert found[1] is None and found[0] is not None and found[2] is not None
    assert found[0].token_id == 4 and found[0].logprob == pytest.approx(exact[0, 4], abs=1e-5)
    assert [token for token, _ in found[0].top] == np.argsort(-exact[0])[:3].tolist()
    assert [value for _, value in found[0].top] == pytest.approx(np.sort(exact[0])[::-1][:3], abs=1e-5)
    assert dataclasses.astuple(found[2]) == (6, pytest.approx(exact[2, 6], abs=1e-5), ())
