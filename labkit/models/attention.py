"""Grouped-query attention of Qwen2, Llama and Qwen3."""

from __future__ import annotations

from torch import Tensor, nn

from labkit.kernels.attention import paged_attention
from labkit.kernels.rope import rope_write
from labkit.models.layers import Linear, Norm, Step
from labkit.models.shape import ModelShape


class GroupedAttention(nn.Module):
    """The first half of a layer: query heads in groups that share a key and a value head, all from one matrix."""

    def __init__(self, shape: ModelShape, out_bias: bool) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm = Norm(shape.hidden_size, shape.norm_eps)
        rows = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.qkv = Linear(shape.hidden_size, rows, bias=shape.qkv_bias)
        self.q_norm = Norm(shape.head_dim, shape.norm_eps) if shape.head_norms else None
        self.k_norm = Norm(shape.head_dim, shape.norm_eps) if shape.head_norms else None
        self.out = Linear(shape.heads * shape.head_dim, shape.hidden_size, bias=out_bias)

    def forward(self, x: Tensor, residual: Tensor | None, cache: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """x, residual: [tokens, hidden]; returns what is to be added, and their sum."""
        qkv, residual = self.qkv.of_normed_sum(x, residual, self.norm)
        queries = rope_write(
            qkv,
            step.positions,
            step.cos_sin,
            cache,
            step.meta.slots,
            self.heads,
            self.q_norm.weight if self.q_norm else None,
            self.k_norm.weight if self.k_norm else None,
            self.norm.eps,
        )
        return self.out(paged_attention(queries, cache, step.meta).flatten(1)), residual
