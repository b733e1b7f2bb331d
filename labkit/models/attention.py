"""Grouped-query attention of Qwen2, Llama and Qwen3."""

from __future__ import annotations

from torch import Tensor, nn

from labkit.kernels.attention import paged_attention
from labkit.kernels.rope import rope_write
from labkit.models.layers import Linear, Norm, Step
from labkit.models.shape import ModelShape


class GroupedAttention(nn.Module):
    """Query heads in groups that share a key and a value head; queries, keys and values come from one matrix."""

    def __init__(self, shape: ModelShape, out_bias: bool) -> None:
        super().__init__()
        self.heads, self.norm_eps = shape.heads, shape.norm_eps
        rows = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.qkv = Linear(shape.hidden_size, rows, bias=shape.qkv_bias)
        self.q_norm = Norm(shape.head_dim, shape.norm_eps) if shape.head_norms else None
        self.k_norm = Norm(shape.head_dim, shape.norm_eps) if shape.head_norms else None
        self.out = Linear(shape.heads * shape.head_dim, shape.hidden_size, bias=out_bias)

    def forward(self, x: Tensor, cache: Tensor, step: Step) -> Tensor:
        """x: [tokens, hidden], normed; returns the same shape."""
        queries = rope_write(
            self.qkv(x),
            step.positions,
            step.cos_sin,
            cache,
            step.meta.slots,
            self.heads,
            self.q_norm.weight if self.q_norm else None,
            self.k_norm.weight if self.k_norm else None,
            self.norm_eps,
        )
        return self.out(paged_attention(queries, cache, step.meta).flatten(1))
