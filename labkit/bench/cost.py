"""How much arithmetic and memory traffic answering requests takes at least, counted from the model's config.json.

With m = prompt + new tokens - 1 the tokens that one request has computed (the last one is never fed back), in a model
of L layers, H heads and head dimension D:

    flops  =  2 x (weights of the layers' matrices) x m  +  2 x (vocab x hidden) x new
              +  L x H x 2 (D_qk + D_v) x (1 + 2 + ... + m)
    bytes  =  steps x (all weights that a step multiplies by)                           read
              +  (KV bytes of a token) x m                                              written
              +  (KV bytes of a token) x (prompt + ((prompt + 1) + ... + m))            read

So a step reads the weights once, a prompt's keys and values are read once, and each later token reads all before it and
itself. Quantised weights count as they are stored, with their scales, where there are kernels that read them so. Left
out: activations, embedding rows, padding, what preemption computes again, and re-reading for later chunks of a prompt.
Both are lower bounds of what happened; bytes / time can therefore not exceed the device's bandwidth by counting what
was never moved, except where a cache larger than the step's data served it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit.bench.workloads import Request
from labkit.errors import UserError
from labkit.models.decoder import Decoder
from labkit.models.quantized import QuantizedLinear


@dataclass(frozen=True)
class Elements:
    """Bytes of an element. Those of weights are means over the matrices that a step multiplies by."""

    layers: float
    """Of a weight of the layers."""
    head: float
    """Of a weight of the output projection."""
    cache: int


def elements_of(model: Decoder) -> Elements:
    """Those of a model that is loaded, or of one rank's part of it."""
    weights, size = 0, 0
    for module in model.layers.modules():
        if isinstance(module, QuantizedLinear) and (packed := module.packed):
            weights += packed.outputs * packed.inputs
            size += packed.words.nbytes + packed.scales.nbytes
        for matrix in module.parameters(recurse=False):
            if matrix.dim() >= 2:
                weights, size = weights + matrix.numel(), size + matrix.nbytes
    cache = model.norm.weight.itemsize
    if model.int8_head is None:
        return Elements(size / weights, model.head.itemsize, cache)
    levels, scales = model.int8_head
    return Elements(size / weights, (levels.nbytes + scales.nbytes) / levels.numel(), cache)


@dataclass(frozen=True)
class ModelCost:
    """Sizes of a model, in numbers of weights and operations; bytes are these times the elements'."""

    active: int
    """Weights of the layers' matrices that one token is multiplied by (of a mixture of experts, its own experts)."""
    resident: int
    """Weights of the layers' matrices that a large step multiplies by: all of them."""
    head: int
    """vocab x hidden of the output projection."""
    attention: int
    """Attention operations per token and token attended to, all layers: L x H x 2 (D_qk + D_v)."""
    kv: int
    """Cache elements of a token, all layers."""

    def flops(self, requests: Iterable[Request]) -> float:
        total = 0
        for request in requests:
            computed = len(request.prompt_ids) + request.new_tokens - 1
            total += 2 * self.active * computed + 2 * self.head * request.new_tokens
            total += self.attention * computed * (computed + 1) // 2
        return float(total)

    def bytes(self, requests: Iterable[Request], steps: int, elements: Elements) -> float:
        cached = 0
        for request in requests:
            prompt, computed = len(request.prompt_ids), len(request.prompt_ids) + request.new_tokens - 1
            attended = computed * (computed + 1) // 2 - prompt * (prompt + 1) // 2
            cached += self.kv * (computed + prompt + attended)
        return steps * (self.resident * elements.layers + self.head * elements.head) + cached * elements.cache


def model_cost(directory: Path) -> ModelCost:
    """From a model directory's config.json. Raises UserError if there is none."""
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / 'config.json'} cannot be read: {error}") from error
    return cost_of(config)


def cost_of(config: dict[str, Any]) -> ModelCost:
    """``config``: what a config.json of the Qwen2, Llama, Qwen3 or DeepSeek family holds."""
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    if config.get("kv_lora_rank"):
        latent, rotary = config["kv_lora_rank"], config["qk_rope_head_dim"]
        qk, value = config["qk_nope_head_dim"] + rotary, config["v_head_dim"]
        rank = config.get("q_lora_rank")
        projections = (hidden * rank + rank * heads * qk) if rank else hidden * heads * qk
        projections += hidden * (latent + rotary) + latent * heads * (qk - rotary + value) + heads * value * hidden
        kv = latent + rotary
    else:
        kv_heads = config.get("num_key_value_heads") or heads
        qk = value = config.get("head_dim") or hidden // heads
        projections = hidden * (2 * heads + 2 * kv_heads) * qk
        kv = 2 * kv_heads * qk
    dense, experts = _dense_layers(config), config.get("n_routed_experts") or 0
    gated = 3 * hidden
    inner = config.get("moe_intermediate_size") or 0
    shared = (config.get("n_shared_experts") or 0) * inner
    routed = hidden * experts + gated * (shared + (config.get("num_experts_per_tok") or 0) * inner)
    everything = hidden * experts + gated * (shared + experts * inner)
    plain = dense * gated * config["intermediate_size"] + layers * projections
    return ModelCost(
        active=plain + (layers - dense) * routed,
        resident=plain + (layers - dense) * everything,
        head=config["vocab_size"] * hidden,
        attention=layers * heads * 2 * (qk + value),
        kv=layers * kv,
    )


def _dense_layers(config: dict[str, Any]) -> int:
    """Layers with a plain MLP: all of them without experts, else the first ones."""
    layers = int(config["num_hidden_layers"])
    if not config.get("n_routed_experts"):
        return layers
    return min(layers, int(config.get("first_k_dense_replace") or 0))
