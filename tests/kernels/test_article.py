"""The report's attention computes causal attention once repaired, and stops where its mask does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from labkit.kernels.article import LONGEST, OptimizedAttention


@pytest.mark.parametrize("tokens", [1, 15, 17])
def test_it_is_causal_attention_between_two_projections(tokens: int) -> None:
    torch.manual_seed(0)
    module, x = OptimizedAttention(24, heads=3), torch.randn(2, tokens, 24)
    weights = {name: weight.detach().double().numpy() for name, weight in module.named_parameters()}
    expected = np.zeros((2, tokens, 24))
    for row in range(2):
        q, k, v = np.split(x[row].double().numpy() @ weights["to_qkv.weight"].T, 3, axis=-1)
        for head in range(3):
            of = slice(8 * head, 8 * head + 8)
            for token in range(tokens):
                scores = k[: token + 1, of] @ q[token, of] / np.sqrt(8)
                shares = np.exp(scores - scores.max())
                expected[row, token, of] = shares @ v[: token + 1, of] / shares.sum()
    expected = expected @ weights["to_out.weight"].T + weights["to_out.bias"]
    np.testing.assert_allclose(module(x).detach().numpy(), expected, atol=1e-5)


def test_it_refuses_more_tokens_than_its_mask_has() -> None:
    with torch.no_grad(), pytest.raises(RuntimeError):
        OptimizedAttention(2, heads=1)(torch.zeros(1, LONGEST + 1, 2))
