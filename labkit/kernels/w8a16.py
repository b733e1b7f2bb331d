"""Linear layers with weights of 8 bits and a scale for each output: for the projection to the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [outputs, inputs] -> (int8 [outputs, inputs], float32 [outputs]), the largest of a row at +-127."""
    scale = weight.abs().amax(dim=1).float() / 127
    levels = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for at in range(0, len(weight), 4096):  # a vocabulary in float32 would take much memory
        part = weight[at : at + 4096].float() / scale[at : at + 4096, None].clamp_min(1e-30)
        levels[at : at + 4096] = part.round().to(torch.int8)
    return levels, scale


def w8a16_linear_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, inputs] times the transpose of weight int8 [outputs, inputs] times scale [outputs], plus bias [outputs]:
    [rows, outputs] in x's dtype, to which the weight is rounded before."""
    return F.linear(x, (weight.float() * scale[:, None]).to(x.dtype), bias)


def w8a16_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """``w8a16_linear_reference``, by the kernel for this many rows."""
    return w8a16_linear_reference(x, weight, scale, bias)
