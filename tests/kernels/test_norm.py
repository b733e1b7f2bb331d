"""RMSNorm against its formula in float64, and the kernel against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from labkit.kernels.norm import (
    add_rms_norm,
    add_rms_norm_reference,
    add_rms_norm_triton,
    rms_norm,
    rms_norm_reference,
    rms_norm_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, hidden", [(1, 1536), (15, 384), (16, 48), (17, 100), (2, 3584), (2, 8192)])
def test_the_kernel_does_what_the_reference_does(tokens: int, hidden: int, dtype: torch.dtype) -> None:
    drawn = (random(tokens, hidden), random(tokens, hidden, seed=1), random(hidden, seed=2))
    x, residual, weight = (each.to(DEVICE, dtype) for each in drawn)
    given = residual.clone()
    tolerance = TOLERANCE[dtype]
    normed, total = add_rms_norm_triton(x, residual, weight, 1e-5)
    expected, expected_total = add_rms_norm_reference(x, residual, weight, 1e-5)
    assert torch.equal(total, expected_total) and torch.equal(residual, given)
    torch.testing.assert_close(normed, expected, atol=tolerance, rtol=tolerance)
    plain = rms_norm_triton(x, weight, 1e-5)
    torch.testing.assert_close(plain, rms_norm_reference(x, weight, 1e-5), atol=tolerance, rtol=tolerance)


def test_the_kernel_takes_part_of_a_row_and_no_rows_at_all() -> None:
    x, weight = random(3, 96).to(DEVICE), random(64).to(DEVICE)
    torch.testing.assert_close(
        rms_norm_triton(x[:, 16:80], weight, 1e-6), rms_norm_reference(x[:, 16:80], weight, 1e-6)
    )
    assert rms_norm_triton(x[:0], random(96).to(DEVICE), 1e-6).shape == (0, 96)
