"""Activations against their formulas in float64, and the kernel against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from labkit.kernels import activation
from labkit.kernels.activation import silu_mul

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def random(*shape: int) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_silu_mul_gates_with_the_first_half() -> None:
    packed = random(5, 14)
    gate, up = packed.double().numpy()[:, :7], packed.double().numpy()[:, 7:]
    np.testing.assert_allclose(silu_mul(packed).double().numpy(), gate / (1 + np.exp(-gate)) * up, atol=2e-6)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_is_its_formula(approximate: activation.Approximate) -> None:
    x = random(5, 7)
    gate = x.double().numpy()
    share = np.vectorize(math.erf)(gate / np.sqrt(2))
    if approximate == "tanh":
        share = np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))
    expected = gate * (1 + share) / 2
    np.testing.assert_allclose(activation.gelu(x, approximate).numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, inner", [(1, 15), (3, 16), (2, 17), (2, 2049)])
def test_the_kernels_do_what_the_references_do(tokens: int, inner: int, dtype: torch.dtype) -> None:
    packed = random(tokens, 2 * inner).to(DEVICE, dtype)
    packed[0, :2] = torch.tensor([-90.0, 90.0])
    plain = packed[:, :inner].contiguous()
    pairs = [(activation.silu_mul_triton(packed), activation.silu_mul_reference(packed))]
    for kind in ("tanh", "none"):
        pairs.append((activation.gelu_triton(plain, kind), activation.gelu_reference(plain, kind)))
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_the_kernel_takes_no_rows_at_all() -> None:
    assert activation.silu_mul_triton(random(0, 8).to(DEVICE)).shape == (0, 4)
