"""Norm, activation and rotary embedding against their formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from labkit.kernels.activation import silu_mul
from labkit.kernels.norm import add_rms_norm, rms_norm
from labkit.kernels.rope import apply_rope, rope_angles


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [1, 15, 17])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_rms_norm(tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    x, weight = random(tokens, 48).to(dtype) * 5, random(48, seed=1).to(dtype)
    wide = x.double().numpy()
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * weight.double().numpy()
    found = rms_norm(x, weight, 1e-6)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=tolerance, atol=tolerance)


def test_add_rms_norm_adds_before_it_norms() -> None:
    x, residual, weight = random(3, 8), random(3, 8, seed=1), random(8, seed=2)
    before = residual.clone()
    normed, total = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + before)
    assert torch.equal(normed, rms_norm(x + before, weight, 1e-6))
    assert torch.equal(residual, before), "the old residual is the caller's"


def test_silu_mul_gates_with_the_first_half() -> None:
    packed = random(5, 14)
    gate, up = packed.double().numpy()[:, :7], packed.double().numpy()[:, 7:]
    np.testing.assert_allclose(silu_mul(packed).double().numpy(), gate / (1 + np.exp(-gate)) * up, atol=1e-6)


def test_rope_turns_pairs_by_position_times_frequency() -> None:
    positions, theta, head_dim = torch.tensor([0, 1, 4000]), 10000.0, 8
    x = random(3, 2, head_dim)
    found = apply_rope(x, *rope_angles(positions, head_dim, theta, torch.float32)).double().numpy()
    for row, position in enumerate(positions.tolist()):
        for pair in range(head_dim // 2):
            angle = position * theta ** (-2 * pair / head_dim)
            turned = (x[row, :, pair].numpy() + 1j * x[row, :, pair + head_dim // 2].numpy()) * np.exp(1j * angle)
            np.testing.assert_allclose(found[row, :, pair], turned.real, atol=1e-3)
            np.testing.assert_allclose(found[row, :, pair + head_dim // 2], turned.imag, atol=1e-3)
