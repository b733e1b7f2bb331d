"""The attention of the report whose claims the lab tests (its section 2.4), kept as the "before" of its claims.

Its comment says that it uses FlashAttention; it writes out all scores instead.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LONGEST = 2048
"""Tokens that its mask has room for."""


class OptimizedAttention(nn.Module):
    """Causal self-attention of x [batch, tokens, dim] as the report publishes it, under the name that it gives it.

    Repaired, so that it runs at all: its mask is of floats, which the tilde that it applies does not take, and is of
    booleans here; einops' ``rearrange``, which it does not import, is written as views. The rest is its own: the
    products, the scores written to memory, the mask for ``LONGEST`` tokens.
    """

    mask: Tensor

    def __init__(self, dim: int, heads: int = 8) -> None:
        super().__init__()
        self.scale = (dim // heads) ** -0.5
        self.heads = heads
        self.register_buffer("mask", torch.tril(torch.ones(LONGEST, LONGEST, dtype=torch.bool)))
        self.to_qkv = nn.Linear(dim, dim * 3, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [batch, tokens, dim]; raises RuntimeError for more than ``LONGEST`` tokens, as the report's does."""
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in self.to_qkv(x).chunk(3, dim=-1))
        out = materialized_attention(q, k, v, self.mask, self.scale)
        return self.to_out(out.transpose(1, 2).flatten(2))


def materialized_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """What lies between the projections. q, k, v: [batch, heads, tokens, head_dim]; mask: [longest, longest]."""
    n = q.shape[2]
    dots = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    dots.masked_fill_(~mask[:n, :n], float("-inf"))
    return torch.einsum("bhij,bhjd->bhid", dots.softmax(dim=-1), v)
