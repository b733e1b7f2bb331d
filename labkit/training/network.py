"""The ledger model as it is trained: Qwen2 over [batch, length], lean, with the parameter names of ``transformers``.

Serving has its own Qwen2 over a flat token stream (``labkit.models``); this one exists to be compiled and
differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHECKPOINTING = ("none", "all", "half", "attention", "mlp")
"""What keeps no activations but works them out again in the backward pass: nothing, every layer, every second layer, or
of every layer one half."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2 model with tied embeddings."""

    vocabulary: int = 768
    hidden: int = 384
    layers: int = 8
    heads: int = 6
    kv_heads: int = 2
    intermediate: int = 1024
    context: int = 5120
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads


class RMSNorm(nn.Module):
    """Root-mean-square norm, worked in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * wide).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention; with a cache, one that appends and attends to what came before."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_size)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_size)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_size)
        self.o_proj = nn.Linear(shape.heads * shape.head_size, shape.hidden, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, heads, L, d], keys and values [B, kv_heads, L, d], the first two rotated."""
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.shape.heads, -1).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.shape.kv_heads, -1).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.shape.kv_heads, -1).transpose(1, 2)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        return self.o_proj(self.attend(q, k, v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention over whole sequences; returns [B, L, heads * d]."""
        group = self.shape.heads // self.shape.kv_heads
        out = F.scaled_dot_product_attention(
            q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1), is_causal=True
        )
        return out.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and around a residual."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, forgets: str = "none") -> Tensor:
        """``forgets``, one of CHECKPOINTING but "half", is what of this layer keeps no activations."""
        if forgets == "all":
            return _forgetting(self, x, cos, sin)
        mix = partial(_forgetting, self.mix) if forgets == "attention" else self.mix
        feed = partial(_forgetting, self.feed) if forgets == "mlp" else self.feed
        return feed(mix(x, cos, sin))

    def mix(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The attention half."""
        return x + self.self_attn(self.input_layernorm(x), cos, sin)

    def feed(self, x: Tensor) -> Tensor:
        """The feed-forward half."""
        return x + self.mlp(self.post_attention_layernorm(x))


def _forgetting(part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``part(*inputs)``, of which the backward pass finds the inputs alone and goes forward again."""
    out: Tensor = checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
    return out


class Body(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps)


class Network(nn.Module):
    """The whole model; the output head is the embedding. ``checkpointing`` is one of CHECKPOINTING."""

    cos: Tensor
    sin: Tensor
    checkpointing: str = "none"

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                narrow = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / (2 * shape.layers) ** 0.5 if narrow else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        cos, sin = rope_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, L, vocabulary] of token ids int64 [B, L]."""
        return self.logits(self.states(ids)[-1])

    def states(self, ids: Tensor) -> list[Tensor]:
        """What every layer leaves for the next, [B, L, hidden] each, of token ids int64 [B, L]."""
        length = ids.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x, found = self.model.embed_tokens(ids), []
        for index, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, self._forgets(index))
            found.append(x)
        return found

    def logits(self, last: Tensor) -> Tensor:
        """Logits [..., vocabulary] of the last layer's state [..., hidden]."""
        return F.linear(self.model.norm(last), self.model.embed_tokens.weight)

    def _forgets(self, index: int) -> str:
        if not (self.training and torch.is_grad_enabled()):
            return "none"
        if self.checkpointing == "half":
            return "all" if index % 2 else "none"
        return self.checkpointing


def weighted_loss(network: nn.Module, ids: Tensor, weights: Tensor) -> Tensor:
    """Mean cross-entropy (nats, float32 scalar) of the next token, each counted ``weights`` [B, L] times."""
    losses = next_token_losses(network(ids), ids)
    return weighted_mean(losses, weights)


def next_token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy (nats, float32 [B, L]) of the token after each; that of the last place means nothing."""
    targets = ids.roll(-1, dims=1)
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(ids.shape)


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Mean of ``losses`` [B, L] of next tokens; ``weights`` [B, L] is how often each token counts as one predicted."""
    counts = weights.roll(-1, dims=1).float()
    counts[:, -1] = 0
    return (losses * counts).sum() / counts.sum()


def rope_tables(shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [context, head_size], in the layout of ``transformers`` (halves, not pairs)."""
    steps = torch.arange(0, shape.head_size, 2, dtype=torch.float32) / shape.head_size
    angles = torch.outer(torch.arange(shape.context, dtype=torch.float32), 1.0 / shape.rope_theta**steps)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of ``x`` [B, heads, L, d] by tables that broadcast against it."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)


def operations_a_token(shape: Shape, context: int) -> float:
    """Floating-point operations of one token's forward pass that attends to ``context`` tokens, products alone."""
    width, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    matrices = shape.hidden * (2 * width + 2 * keys + 3 * shape.intermediate)
    return 2.0 * (shape.layers * (matrices + 2 * context * width) + shape.vocabulary * shape.hidden)
