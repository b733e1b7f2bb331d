"""Linear layers with weights of 4 bits: the reference, and which of the kernels takes how many rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.kernels import w4a16_few, w4a16_many
from labkit.kernels.activation import silu_mul
from labkit.kernels.w4a16_layout import (
    INPUTS,
    OUTPUTS,
    Packed,
    dequantize,
    dequantize_checkpoint,
    join,
    pack,
    pack_levels,
)

__all__ = [
    "Packed", "dequantize", "dequantize_checkpoint", "has_kernel", "join", "pack", "pack_levels", "w4a16_linear",
    "w4a16_linear_reference", "w4a16_silu_mul",
]  # fmt: skip

MOST_FEW, MOST_MANY = 16, 512
HALVES = (torch.bfloat16, torch.float16)


def w4a16_linear_reference(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x [rows, inputs] times the transpose of the weight, plus bias [outputs]: [rows, outputs] in x's dtype.

    The weight is rounded to x's dtype before."""
    return F.linear(x, dequantize(packed, x.dtype), bias)


def w4a16_linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """``w4a16_linear_reference``, by the kernel for this many rows.

    The rule: 16-bit rows on CUDA, groups of a multiple of 128, all zeros 8 -> up to 16 rows ``w4a16_few``, up to 512
    ``w4a16_many``, more of them dequantised once and multiplied by cuBLAS; anything else -> the reference.
    """
    if not has_kernel(x, packed):
        return w4a16_linear_reference(x, packed, bias)
    if len(x) <= MOST_FEW:
        return w4a16_few.few_triton(x, packed, bias)
    if len(x) <= MOST_MANY:
        return w4a16_many.many_triton(x, packed, bias)
    return F.linear(x, w4a16_many.dequantize_triton(packed, x.dtype), bias)


def w4a16_silu_mul(x: Tensor, packed: Packed) -> Tensor:
    """silu(first half of the outputs) * the other half, of ``w4a16_linear`` of x [rows, inputs]: [rows, outputs / 2].

    The rule: where ``w4a16_few`` multiplies and half of the outputs fills whole tiles of 16, it does all of it.
    """
    if has_kernel(x, packed) and len(x) <= MOST_FEW and packed.outputs % (2 * OUTPUTS) == 0:
        return w4a16_few.few_triton(x, packed, silu=True)
    return silu_mul(w4a16_linear(x, packed))


def has_kernel(x: Tensor, packed: Packed) -> bool:
    """Whether a kernel multiplies such rows x [rows, inputs] by this weight."""
    fits = packed.group == INPUTS and packed.inputs % INPUTS == 0 and packed.outputs % OUTPUTS == 0
    return x.is_cuda and fits and packed.zeros is None and x.dtype in HALVES and len(x) > 0 and x.is_contiguous()
