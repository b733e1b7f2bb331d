"""Linear layers for a few rows against the same in float64, alone and with a norm before and a gate after."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from labkit.kernels import linear as ops
from labkit.kernels.activation import silu_mul_reference
from labkit.kernels.norm import add_rms_norm_reference, rms_norm_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product in float64, rounded once to x's dtype."""
    product = x.double() @ weight.double().T
    return (product if bias is None else product + bias.double()).to(x.dtype)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, outputs, inputs",
    [(1, 7, 1536), (1, 1, 16), (1, 5, 1000), (1, 5, 8200), (2, 6, 512), (3, 5, 520), (4, 4, 96), (8, 3, 64)],
)
def test_the_kernel_is_a_linear_layer(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    x = random(rows, inputs, dtype=dtype)
    weight = (random(outputs, inputs, seed=1) / inputs**0.5).to(dtype)
    bias = random(outputs, seed=2, dtype=dtype)
    close(ops.linear_triton(x, weight), exact(x, weight))
    close(ops.linear_triton(x, weight, bias), exact(x, weight, bias))


@pytest.mark.parametrize("form", [ops.linear, ops.linear_triton])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_product_is_written_where_it_is_asked_for(form: Callable[..., Tensor], with_bias: bool, rows: int) -> None:
    x, weight, bias = random(rows, 64), random(7, 64, seed=1), random(7, seed=2) if with_bias else None
    larger = torch.full((rows + 2, 7), 5.0, device=DEVICE)
    out = larger[:rows]
    assert form(x, weight, bias, out=out).data_ptr() == larger.data_ptr()
    close(out, exact(x, weight, bias))
    assert (larger[rows:] == 5).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, inner, inputs", [(1, 5, 1536), (1, 3, 8200), (2, 3, 100), (4, 2, 64)])
def test_a_gate_after(rows: int, inner: int, inputs: int, dtype: torch.dtype) -> None:
    x = random(rows, inputs, dtype=dtype)
    weight = (random(2 * inner, inputs, seed=1) / inputs**0.5).to(dtype)
    close(ops.linear_silu_mul_triton(x, weight), silu_mul_reference(exact(x, weight)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs, inputs", [(5, 1536), (2, 2056), (4, 100), (2, 8192)])
def test_a_norm_before(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    x, residual = random(1, inputs, dtype=dtype), random(1, inputs, seed=3, dtype=dtype)
    norm, bias = random(inputs, seed=4, dtype=dtype), random(outputs, seed=5, dtype=dtype)
    weight = (random(outputs, inputs, seed=1) / inputs**0.5).to(dtype)
    before = residual.clone()
    normed, total = add_rms_norm_reference(x, residual, norm, 1e-5)
    found, found_total = ops.norm_linear_triton(x, residual, norm, 1e-5, weight, bias)
    close(found, exact(normed, weight, bias))
    assert torch.equal(found_total, total) and torch.equal(residual, before)
    found, found_total = ops.norm_linear_triton(x, None, norm, 1e-5, weight)
    close(found, exact(rms_norm_reference(x, norm, 1e-5), weight))
    assert torch.equal(found_total, x)
    gated, gated_total = ops.norm_linear_silu_mul_triton(x, residual, norm, 1e-5, weight[: outputs // 2 * 2])
    close(gated, silu_mul_reference(exact(normed, weight[: outputs // 2 * 2])))
    assert torch.equal(gated_total, total)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_ops_are_their_parts_one_after_the_other(rows: int) -> None:
    x, residual = random(rows, 64), random(rows, 64, seed=1)
    weight, norm, bias = random(6, 64, seed=2) / 8, random(64, seed=3), random(6, seed=4)
    normed, total = add_rms_norm_reference(x, residual, norm, 1e-6)
    close(ops.linear(x, weight, bias), exact(x, weight, bias))
    close(ops.linear_silu_mul(x, weight), silu_mul_reference(exact(x, weight)))
    for found, expected in (
        (ops.norm_linear(x, residual, norm, 1e-6, weight, bias), exact(normed, weight, bias)),
        (ops.norm_linear_silu_mul(x, residual, norm, 1e-6, weight), silu_mul_reference(exact(normed, weight))),
    ):
        close(found[0], expected)
        assert torch.equal(found[1], total)
    assert ops.norm_linear(x, None, norm, 1e-6, weight)[1] is x


def test_the_rule_counts_rows() -> None:
    assert not ops.is_skinny(torch.zeros(1, 8))
    if DEVICE == "cuda":
        assert [ops.is_skinny(random(rows, 8)) for rows in (0, 1, ops.MOST_ROWS, ops.MOST_ROWS + 1)] == [
            False, True, True, False
        ]  # fmt: skip
