"""What layers are made of: linear maps, norms and the gated MLP.

Half a layer takes x and the residual stream that x is yet to be added to, and returns the same pair: the sum is taken
where it is normed, in the kernel that norms it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from labkit.kernels.linear import linear, linear_silu_mul, norm_linear, norm_linear_silu_mul
from labkit.kernels.metadata import AttentionMetadata
from labkit.kernels.norm import add_rms_norm, rms_norm


class Step(NamedTuple):
    """What all layers share in one step."""

    positions: Tensor
    """[tokens] int64."""
    cos_sin: Tensor
    """[max_positions, rotary_dim] float32, see labkit.kernels.rope.RopeTable."""
    meta: AttentionMetadata


class Norm(nn.Module):
    """RMSNorm of the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(the sum of x and residual, normed, and the sum itself); all [tokens, hidden]."""
        return add_rms_norm(x, residual, self.weight, self.eps)


class Linear(nn.Module):
    """x @ weight.T + bias, weight [out, in]."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def of_normed_sum(self, x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        """(this map of the normed sum of x and residual, the sum). Without a residual the sum is x."""
        return norm_linear(x, residual, norm.weight, norm.eps, self.weight, self.bias)

    def silu_mul_of(self, x: Tensor) -> Tensor:
        """silu(gate) * up, where gate is the first half of this map of x and up the second; there is no bias."""
        return linear_silu_mul(x, self.weight)

    def silu_mul_of_normed_sum(self, x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        """(``silu_mul_of`` the normed sum of x and residual, the sum), as in ``of_normed_sum``."""
        return norm_linear_silu_mul(x, residual, norm.weight, norm.eps, self.weight)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one matrix."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * intermediate_size)
        self.down = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate_up.silu_mul_of(x))


class DenseMLP(nn.Module):
    """The second half of a layer: a norm and a gated MLP."""

    def __init__(self, hidden_size: int, intermediate_size: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = Norm(hidden_size, norm_eps)
        self.gate_up = Linear(hidden_size, 2 * intermediate_size)
        self.down = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x, residual: [tokens, hidden]; returns what is to be added, and their sum."""
        inner, residual = self.gate_up.silu_mul_of_normed_sum(x, residual, self.norm)
        return self.down(inner), residual
