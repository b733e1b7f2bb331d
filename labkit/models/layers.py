"""What layers are made of: linear maps, norms and the gated MLP."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from labkit.kernels.activation import silu_mul
from labkit.kernels.metadata import AttentionMetadata
from labkit.kernels.norm import add_rms_norm, rms_norm


class Step(NamedTuple):
    """What all layers share in one step."""

    positions: Tensor
    """[tokens] int64."""
    cos_sin: Tensor
    """[max_positions, rotary_dim] float32, see labkit.kernels.rope.RopeTable."""
    meta: AttentionMetadata


class Linear(nn.Module):
    """x @ weight.T + bias, weight [out, in]."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """RMSNorm of the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Adds x to the residual stream; returns (the sum normed, the sum)."""
        return add_rms_norm(x, residual, self.weight, self.eps)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one matrix."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * intermediate_size)
        self.down = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu_mul(self.gate_up(x)))
