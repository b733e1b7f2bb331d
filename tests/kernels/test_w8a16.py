"""8-bit linear layers against numpy in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from labkit.kernels import w8a16
from labkit.kernels.w8a16 import One, Some, pack_int8, w8a16_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).to(DEVICE)


def right(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    wide = weight.cpu().double().numpy() * scale.cpu().double().numpy()[:, None]
    return torch.from_numpy(x.cpu().double().numpy() @ wide.T + bias.cpu().double().numpy()).to(DEVICE)


def test_a_weight_is_kept_to_half_a_level() -> None:
    weight = random(5000, 40)
    weight[7] = 0
    levels, scale = pack_int8(weight)
    assert levels.dtype == torch.int8 and int(levels.abs().max()) == 127
    assert ((levels * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_op_is_a_linear_layer(dtype: torch.dtype) -> None:
    x, bias = random(5, 96, seed=1).to(dtype), random(37, seed=2).to(dtype)
    levels, scale = pack_int8(random(37, 96))
    found, expected = w8a16_linear(x, levels, scale, bias).double(), right(x, levels, scale, bias)
    assert (found - expected).norm() <= (1e-6 if dtype == torch.float32 else 2e-3) * expected.norm()


@pytest.mark.parametrize("form", [w8a16_linear, w8a16.w8a16_linear_triton])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_product_is_written_where_it_is_asked_for(form: Callable[..., Tensor], rows: int) -> None:
    x, bias = random(rows, 512, seed=1).half(), random(7, seed=2).half()
    levels, scale = pack_int8(random(7, 512))
    larger = torch.full((rows + 2, 7), 5.0, dtype=torch.half, device=DEVICE)
    out, expected = larger[:rows], right(x, levels, scale, bias)
    assert form(x, levels, scale, bias, out).data_ptr() == larger.data_ptr()
    assert (out.double() - expected).norm() <= 2e-3 * expected.norm() and (larger[rows:] == 5).all()


@pytest.mark.parametrize(
    "rows, outputs, inputs, cut",
    [
        (1, 7, 512, One(2, 512, 2, 1)),
        (1, 5, 1100, One(4, 512, 2, 3)),
        (3, 70, 384, Some(64, 16, 128, 4, 3)),
        (40, 130, 200, Some(64, 32, 64, 4, 3)),
    ],
    ids=str,
)
def test_the_kernels(rows: int, outputs: int, inputs: int, cut: One | Some) -> None:
    x, bias = random(rows, inputs, seed=1).half(), random(outputs, seed=2).half()
    levels, scale = pack_int8(random(outputs, inputs))
    found, expected = w8a16.launch(x, levels, scale, bias, cut).double(), right(x, levels, scale, bias)
    assert (found - expected).norm() <= 2e-3 * expected.norm()


def test_every_number_of_rows_has_a_cut() -> None:
    for rows, inputs in itertools.product(range(1, w8a16.MOST_ROWS + 1), (1536, 3584)):
        cut = w8a16.tuning(rows, inputs)
        assert isinstance(cut, One) == (rows == 1 and inputs == 3584) and cut.warps in (2, 4, 8)
