"""Decoders over a flat token stream: all sequences of a step lie end to end in [tokens, hidden], without padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.kernels.embedding import embed
from labkit.kernels.linear import linear
from labkit.kernels.metadata import AttentionMetadata
from labkit.kernels.w8a16 import pack_int8, w8a16_linear
from labkit.models.attention import GroupedAttention
from labkit.models.experts import Experts
from labkit.models.latent import LatentAttention
from labkit.models.layers import DenseMLP, Norm, Step
from labkit.models.parallel import Parallel
from labkit.models.shape import ModelShape


class Decoder(nn.Module):
    """Qwen2, Llama, Qwen3, DeepSeek-V2 or V3 without sampling: tokens in, hidden states out, and logits where asked."""

    cos_sin: Tensor

    def __init__(self, shape: ModelShape, parallel: Parallel) -> None:
        """shape: of the whole model. The attribute ``shape`` is that of this rank's part, and so of its cache."""
        super().__init__()
        self.shape = parallel.share(shape)
        self.embed = nn.Parameter(torch.empty(shape.vocab_size, shape.hidden_size))
        self.layers = nn.ModuleList(Layer(self.shape, parallel, i) for i in range(shape.layers))
        self.norm = Norm(shape.hidden_size, shape.norm_eps)
        self.head = self.embed if shape.tied else nn.Parameter(torch.empty(shape.vocab_size, shape.hidden_size))
        self.int8_head: tuple[Tensor, Tensor] | None = None
        # Of labkit.kernels.rope.RopeTable; computed when the weights are loaded.
        self.register_buffer("cos_sin", torch.empty(shape.max_positions, shape.rotary_dim), persistent=False)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cache: Sequence[Tensor],
        meta: AttentionMetadata,
        last_tokens: Tensor | None = None,
    ) -> Tensor:
        """token_ids, positions: [tokens] int64. cache: one tensor a layer, [cache_planes, cache_heads, blocks,
        block_size, cache_width] of ``shape``, to which the new tokens' keys and values (or latents) are written.
        last_tokens: [rows] int64, where a token of -1 - row is looked up. Returns [tokens, hidden], normed, in the
        weights' dtype."""
        step = Step(positions, self.cos_sin, meta)
        x = F.embedding(token_ids, self.embed) if last_tokens is None else embed(token_ids, last_tokens, self.embed)
        residual: Tensor | None = None
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x, residual = layer(x, residual, layer_cache, step)
        return self.norm(x) if residual is None else self.norm.of_sum(x, residual)[0]

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden: [rows, hidden] as ``forward`` returns it; returns [rows, vocab], in float32 on the CPU and in the
        weights' dtype on CUDA, where they can be written to ``out``."""
        if self.int8_head is None:
            logits = linear(hidden, self.head, out=out)
        else:
            logits = w8a16_linear(hidden, *self.int8_head, out=out)
        return logits if logits.is_cuda else logits.float()

    def round_head(self) -> None:
        """From here on logits come from a head in 8 bits with a scale a row; the embedding stays as it is."""
        levels, scale = pack_int8(self.head)
        if levels.is_cuda:
            self.int8_head = levels, scale
            if not self.shape.tied:
                del self.head
        else:  # a CPU would take longer to multiply it out for every product than to read it
            self.head = nn.Parameter((levels.float() * scale[:, None]).to(self.head.dtype), requires_grad=False)


class Layer(nn.Module):
    """One transformer layer: attention, then an MLP or experts."""

    def __init__(self, shape: ModelShape, parallel: Parallel, index: int) -> None:
        super().__init__()
        self.parallel = parallel
        self.attention: nn.Module = (
            LatentAttention(shape, shape.latent)
            if shape.latent
            # Of a bias that all ranks would add to the sum, the first alone adds it.
            else GroupedAttention(shape, out_bias=shape.out_bias and parallel.rank == 0)
        )
        self.mlp: nn.Module = (
            Experts(shape.hidden_size, shape.experts, shape.norm_eps)
            if shape.experts and index >= shape.experts.dense_layers
            else DenseMLP(shape.hidden_size, shape.intermediate_size, shape.norm_eps)
        )

    def forward(self, x: Tensor, residual: Tensor | None, cache: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """x: [tokens, hidden], what the layers before want added to residual, which is None at first; returns both
        anew."""
        x, residual = self.attention(x, residual, cache, step)
        x, residual = self.mlp(self.parallel.sum(x), residual)
        return self.parallel.sum(x), residual
