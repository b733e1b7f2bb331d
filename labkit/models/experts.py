"""Mixture of experts of DeepSeek-V2 and V3: a router, its experts, and experts that see every token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.kernels import moe
from labkit.models.layers import GatedMLP, Norm
from labkit.models.shape import ExpertsShape


class Experts(nn.Module):
    """The second half of a layer. The experts' matrices are stacked, [experts, out, in]; the router computes in
    float32."""

    correction: Tensor | None

    def __init__(self, hidden_size: int, shape: ExpertsShape, norm_eps: float) -> None:
        super().__init__()
        self.shape = shape
        self.norm = Norm(hidden_size, norm_eps)
        self.router = nn.Parameter(torch.empty(shape.count, hidden_size))
        # A buffer, so that it stays float32 in a model of bfloat16: its steps are finer than bfloat16's.
        self.register_buffer("correction", torch.empty(shape.count) if shape.correction else None)
        self.gate_up = nn.Parameter(torch.empty(shape.count, 2 * shape.intermediate_size, hidden_size))
        self.down = nn.Parameter(torch.empty(shape.count, hidden_size, shape.intermediate_size))
        self.shared = GatedMLP(hidden_size, shape.shared_size) if shape.shared_size else None

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x, residual: [tokens, hidden]; returns what is to be added, and their sum."""
        x, residual = self.norm.of_sum(x, residual)
        ids, weights = self.route(x)
        routed = moe.experts(x, ids, weights, self.gate_up, self.down)
        return (routed if self.shared is None else routed + self.shared(x)), residual

    def route(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each row of normed [tokens, hidden] and their weights, both [tokens, per token]."""
        shape = self.shape
        return moe.router(
            F.linear(normed.float(), self.router.float()),
            shape.per_token,
            scoring=shape.scoring,
            method=shape.method,
            correction_bias=self.correction,
            groups=shape.groups,
            top_groups=shape.top_groups,
            normalise=shape.normalise,
            scale=shape.scale,
        )
