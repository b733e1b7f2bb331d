"""Multi-head latent attention (MLA) of DeepSeek-V2 and V3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from labkit.kernels.mla import mla_attention, write_latent
from labkit.kernels.rope import rope_interleaved
from labkit.models.layers import Linear, Norm, Step
from labkit.models.shape import LatentShape, ModelShape

LATENT_NORM_EPS = 1e-6
"""The published code's, whatever the config's ``rms_norm_eps`` says."""


class LatentAttention(nn.Module):
    """The first half of a layer: keys and values of all heads are expanded from one latent a token, which is all that
    the cache holds."""

    def __init__(self, shape: ModelShape, latent: LatentShape) -> None:
        super().__init__()
        self.heads, self.latent, self.scale = shape.heads, latent, shape.attention_scale
        self.norm = Norm(shape.hidden_size, shape.norm_eps)
        query_rows = shape.heads * latent.query_dim
        self.query_rows = latent.query_rank or query_rows
        # The latents of queries (or the queries themselves), the latents of keys and values, the shared rotary key.
        self.compress = Linear(shape.hidden_size, self.query_rows + latent.rank + latent.rotary_dim)
        self.q_norm = Norm(latent.query_rank, LATENT_NORM_EPS) if latent.query_rank else None
        self.q_expand = Linear(latent.query_rank, query_rows) if latent.query_rank else None
        self.kv_norm = Norm(latent.rank, LATENT_NORM_EPS)
        self.kv_expand = nn.Parameter(torch.empty(shape.heads * (latent.plain_dim + latent.value_dim), latent.rank))
        self.out = Linear(shape.heads * latent.value_dim, shape.hidden_size)

    def forward(self, x: Tensor, residual: Tensor | None, cache: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """x, residual: [tokens, hidden]; returns what is to be added, and their sum."""
        compressed, residual = self.compress.of_normed_sum(x, residual, self.norm)
        widths = (self.query_rows, self.latent.rank, self.latent.rotary_dim)
        queries, latents, rotary_key = compressed.split(widths, dim=-1)
        if self.q_norm is not None and self.q_expand is not None:
            queries = self.q_expand(self.q_norm(queries))
        queries = self._rotate(queries.unflatten(-1, (self.heads, self.latent.query_dim)), step)
        rotary_key = rope_interleaved(rotary_key[:, None], step.positions, step.cos_sin)[:, 0]
        write_latent(cache, self.kv_norm(latents), rotary_key, step.meta.slots)
        values = mla_attention(queries, self.kv_expand, cache, step.meta, self.scale)
        return self.out(values.flatten(1)), residual

    def _rotate(self, queries: Tensor, step: Step) -> Tensor:
        plain, rotary = queries.split((self.latent.plain_dim, self.latent.rotary_dim), dim=-1)
        return torch.cat((plain, rope_interleaved(rotary, step.positions, step.cos_sin)), dim=-1)
