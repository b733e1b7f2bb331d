"""RMSNorm, alone and with the residual added first."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension. x: [tokens, hidden]; the mean square is taken in float32.

    The quotient is rounded to x's dtype before the weight is applied, as the published models were trained.
    """
    return rms_norm_reference(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition of ``rms_norm``; x may have any number of dimensions."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * scale).to(x.dtype).mul_(weight)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Adds x to the residual stream and normalises the sum. Both [tokens, hidden]; returns (normed, new residual)."""
    residual = residual + x
    return rms_norm(residual, weight, eps), residual
