"""Qwen2 over a flat token stream: all sequences of a step lie end to end in [tokens, hidden], without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from labkit.errors import UserError
from labkit.kernels.activation import silu_mul
from labkit.kernels.attention import AttentionMetadata, paged_attention, write_kv
from labkit.kernels.norm import add_rms_norm, rms_norm
from labkit.kernels.rope import apply_rope, rope_angles


@dataclass(frozen=True)
class Qwen2Shape:
    """The sizes of a Qwen2 model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    tied: bool

    @classmethod
    def from_config(cls, config: Any) -> Qwen2Shape:
        """From a ``transformers`` Qwen2Config. Raises UserError for variants that would be computed wrongly."""
        rope = config.rope_parameters
        if rope.get("rope_type", "default") != "default":
            raise UserError(f"rope type {rope['rope_type']!r} is not supported; only the default one is")
        if any(kind != "full_attention" for kind in config.layer_types or []):
            raise UserError("sliding-window attention is not supported; set use_sliding_window to false in config.json")
        if config.hidden_act != "silu":
            raise UserError(f"activation {config.hidden_act!r} is not supported; Qwen2 uses 'silu'")
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            norm_eps=config.rms_norm_eps,
            rope_theta=float(rope["rope_theta"]),
            max_positions=config.max_position_embeddings,
            tied=bool(config.tie_word_embeddings),
        )

    def checkpoint_map(self) -> dict[str, tuple[str, int, int]]:
        """Tensor name in a checkpoint -> (parameter here, first row, rows); fused parameters take several tensors."""
        head, kv, inner = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.intermediate_size
        names = {
            "model.embed_tokens.weight": ("embed.weight", 0, self.vocab_size),
            "model.norm.weight": ("norm.weight", 0, self.hidden_size),
        }
        if not self.tied:
            names["lm_head.weight"] = ("head.weight", 0, self.vocab_size)
        for i in range(self.layers):
            here, there = f"layers.{i}.", f"model.layers.{i}."
            for kind in ("weight", "bias"):
                names[f"{there}self_attn.q_proj.{kind}"] = (f"{here}qkv.{kind}", 0, head)
                names[f"{there}self_attn.k_proj.{kind}"] = (f"{here}qkv.{kind}", head, kv)
                names[f"{there}self_attn.v_proj.{kind}"] = (f"{here}qkv.{kind}", head + kv, kv)
            names[f"{there}self_attn.o_proj.weight"] = (f"{here}out.weight", 0, self.hidden_size)
            names[f"{there}mlp.gate_proj.weight"] = (f"{here}gate_up.weight", 0, inner)
            names[f"{there}mlp.up_proj.weight"] = (f"{here}gate_up.weight", inner, inner)
            names[f"{there}mlp.down_proj.weight"] = (f"{here}down.weight", 0, self.hidden_size)
            names[f"{there}input_layernorm.weight"] = (f"{here}attention_norm.weight", 0, self.hidden_size)
            names[f"{there}post_attention_layernorm.weight"] = (f"{here}mlp_norm.weight", 0, self.hidden_size)
        return names


class Qwen2(nn.Module):
    """The model without its sampling: tokens in, hidden states out, and logits where asked."""

    def __init__(self, shape: Qwen2Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        if shape.tied:
            self.head.weight = self.embed.weight

    def forward(self, token_ids: Tensor, positions: Tensor, cache: Sequence[Tensor], meta: AttentionMetadata) -> Tensor:
        """token_ids, positions: [tokens] int64. cache: one tensor a layer (see labkit.kernels.attention), to which the
        new keys and values are written. Returns [tokens, hidden], normed, in the weights' dtype."""
        residual = self.embed(token_ids)
        angles = rope_angles(positions, self.shape.head_dim, self.shape.rope_theta, residual.dtype)
        x = torch.zeros_like(residual)
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x, residual = layer(x, residual, angles, layer_cache, meta)
        return rms_norm(residual + x, self.norm.weight, self.shape.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, hidden] as ``forward`` returns it; returns [rows, vocab] in float32."""
        return self.head(hidden).float()


class Layer(nn.Module):
    """One transformer layer. The sum of the residual stream and x is taken where it is normed next."""

    def __init__(self, shape: Qwen2Shape) -> None:
        super().__init__()
        self.shape = shape
        head_rows, kv_rows = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.attention_norm = Norm(shape)
        self.qkv = nn.Linear(shape.hidden_size, head_rows + 2 * kv_rows)
        self.out = nn.Linear(head_rows, shape.hidden_size, bias=False)
        self.mlp_norm = Norm(shape)
        self.gate_up = nn.Linear(shape.hidden_size, 2 * shape.intermediate_size, bias=False)
        self.down = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(
        self, x: Tensor, residual: Tensor, angles: tuple[Tensor, Tensor], cache: Tensor, meta: AttentionMetadata
    ) -> tuple[Tensor, Tensor]:
        x, residual = add_rms_norm(x, residual, self.attention_norm.weight, self.shape.norm_eps)
        x = self.attend(x, angles, cache, meta)
        x, residual = add_rms_norm(x, residual, self.mlp_norm.weight, self.shape.norm_eps)
        return self.down(silu_mul(self.gate_up(x))), residual

    def attend(self, x: Tensor, angles: tuple[Tensor, Tensor], cache: Tensor, meta: AttentionMetadata) -> Tensor:
        shape = self.shape
        qkv = self.qkv(x).view(len(x), -1, shape.head_dim)
        rotated = apply_rope(qkv[:, : shape.heads + shape.kv_heads], *angles)
        write_kv(cache, rotated[:, shape.heads :], qkv[:, shape.heads + shape.kv_heads :], meta.slots)
        return self.out(paged_attention(rotated[:, : shape.heads], cache, meta).flatten(1))


class Norm(nn.Module):
    """The weight of an RMSNorm."""

    def __init__(self, shape: Qwen2Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden_size))
