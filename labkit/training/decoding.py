"""Greedy decoding in static batches, for measuring how often the model is right; serving has its own engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.training.network import Layer, Network, rotate


@torch.inference_mode()
def greedy(network: Network, prompts: list[list[int]], stop: int, most: int) -> list[list[int]]:
    """Completions of ``prompts``, each ending with ``stop`` or after ``most`` tokens.

    Device and dtype are the network's. Raises ValueError if there is no prompt, or one is empty or, with ``most``,
    longer than the context.
    """
    device = next(network.parameters()).device
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    if not prompts or int(lengths.min()) < 1 or int(lengths.max()) + most > network.shape.context:
        raise ValueError(f"prompts must have 1 to {network.shape.context - most} tokens")
    longest = int(lengths.max())
    padded = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = torch.tensor(prompt)
    lengths, padded = lengths.to(device), padded.to(device)
    hidden, cache = _prefill(network, padded, longest + most)
    last = hidden[torch.arange(len(prompts), device=device), lengths - 1]
    token = _choose(network, last)
    written = [token]
    done = token == stop
    for step in range(1, most):
        if step % 8 == 0 and bool(done.all()):
            break
        token = _choose(network, _decode(network, token, lengths + step - 1, cache))
        written.append(token)
        done = done | (token == stop)
    return [_until(row, stop) for row in torch.stack(written, dim=1).tolist()]


def _layers(network: Network) -> Iterable[Layer]:
    return cast("Iterable[Layer]", network.model.layers)


def _until(tokens: list[int], stop: int) -> list[int]:
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens


def _choose(network: Network, hidden: Tensor) -> Tensor:
    logits = F.linear(network.model.norm(hidden), network.model.embed_tokens.weight)
    return logits.float().argmax(-1)


def _prefill(network: Network, ids: Tensor, room: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Hidden states [B, L, hidden] before the last norm, and per layer keys and values [B, kv_heads, room, d].

    Prompts are padded on the right; what lies beyond a prompt is overwritten by its completion before anyone looks
    there.
    """
    batch, length = ids.shape
    cos, sin = network.cos[:length], network.sin[:length]
    x = network.model.embed_tokens(ids)
    cache = []
    for layer in _layers(network):
        attention = layer.self_attn
        q, k, v = attention.project(layer.input_layernorm(x), cos, sin)
        keys = k.new_zeros(batch, network.shape.kv_heads, room, network.shape.head_size)
        values = torch.zeros_like(keys)
        keys[:, :, :length], values[:, :, :length] = k, v
        cache.append((keys, values))
        x = x + attention.o_proj(attention.attend(q, k, v))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return x, cache


def _decode(network: Network, tokens: Tensor, positions: Tensor, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Hidden states [B, hidden] of one new token each, at ``positions`` [B]; the cache takes them in."""
    shape, batch = network.shape, tokens.shape[0]
    cos, sin = network.cos[positions][:, None, None], network.sin[positions][:, None, None]
    rows = torch.arange(batch, device=tokens.device)
    room = cache[0][0].shape[2]
    hide = torch.arange(room, device=tokens.device)[None, None, None] > positions[:, None, None, None]
    x = network.model.embed_tokens(tokens)[:, None]
    for layer, (keys, values) in zip(_layers(network), cache, strict=True):
        attention = layer.self_attn
        normed = layer.input_layernorm(x)
        q = rotate(attention.q_proj(normed).view(batch, 1, shape.heads, -1).transpose(1, 2), cos, sin)
        k = rotate(attention.k_proj(normed).view(batch, 1, shape.kv_heads, -1).transpose(1, 2), cos, sin)
        v = attention.v_proj(normed).view(batch, shape.kv_heads, -1)
        keys[rows, :, positions], values[rows, :, positions] = k[:, :, 0], v
        grouped = q.view(batch, shape.kv_heads, shape.heads // shape.kv_heads, shape.head_size)
        scores = (grouped @ keys.transpose(-1, -2)).float() * shape.head_size**-0.5
        shares = scores.masked_fill(hide, float("-inf")).softmax(-1).to(values.dtype)
        out = (shares @ values).reshape(batch, 1, -1)
        x = x + attention.o_proj(out)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return x[:, 0]
