"""Against torch's own count of floating-point operations, and against adding up what each step reads."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from labkit.bench.cost import Elements, cost_of, elements_of, model_cost
from labkit.bench.workloads import Request
from labkit.deployment import SHIPPED_MODEL
from labkit.errors import UserError
from labkit.kernels.w4a16 import pack_levels
from labkit.kernels.w8a16 import pack_int8
from labkit.models.loading import load_model, open_checkpoint
from labkit.models.quantized import QuantizedLinear, round_to_nearest

TINY = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip
CONFIGS = {
    "qwen2": {**TINY, "num_key_value_heads": 2},
    "qwen3": {**TINY, "num_key_value_heads": 1, "head_dim": 32},
    "llama": {**TINY, "num_key_value_heads": 4},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_operations_are_those_that_torch_counts(kind):
    """A prompt of p tokens in one pass does the products of p tokens; attention is counted there over the full square,
    here over the half that is causal."""
    tokens = 48
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **CONFIGS[kind]), attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, tokens, dtype=torch.long), logits_to_keep=1)
    cost = cost_of(CONFIGS[kind])
    request = Request([0] * tokens, 1)
    half = cost.attention * tokens * (tokens + 1) // 2
    assert counter.get_total_flops() == pytest.approx(
        cost.flops([request]) - half + cost.attention * tokens**2, rel=2e-3
    )


def test_weights_and_cache_are_those_of_the_shipped_checkpoint():
    from pathlib import Path

    cost = model_cost(Path(SHIPPED_MODEL))
    model = AutoModelForCausalLM.from_pretrained(SHIPPED_MODEL)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    assert cost.resident == cost.active == matrices
    assert cost.head == model.lm_head.weight.numel()
    assert cost.kv == 8 * 2 * 2 * 64


def test_a_mixture_of_experts_counts_its_own_experts_for_work_and_all_for_weights():
    config = {
        **TINY, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 40,
        "first_k_dense_replace": 1, "num_key_value_heads": 4,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **config, n_group=2, topk_group=1))
    outside = ("embed", "lm_head", "norm", "bias")
    held = {n: p.numel() for n, p in model.named_parameters() if p.dim() >= 2 and not any(w in n for w in outside)}
    cost = cost_of(config)
    assert cost.resident == sum(held.values())
    unused = 2 * (8 - 2) * 3 * 64 * 40
    assert cost.active == cost.resident - unused
    assert cost.kv == 3 * (32 + 8) and cost.attention == 3 * 4 * 2 * (16 + 8 + 12)


def test_bytes_are_what_the_steps_read_and_write_one_by_one():
    cost = cost_of(CONFIGS["qwen2"])
    requests = [Request([0] * 5, 3), Request([0] * 2, 1)]
    steps, moved = 3, 0
    for _ in range(steps):
        moved += cost.resident + cost.head
    for prompt, new in ((5, 3), (2, 1)):
        moved += (prompt + prompt) * cost.kv  # the prompt's keys and values written, and read once
        for context in range(prompt + 1, prompt + new):
            moved += (1 + context) * cost.kv
    assert cost.bytes(requests, steps, Elements(2, 2, 2)) == 2 * moved
    weights = steps * (0.5 * cost.resident + cost.head)
    assert cost.bytes(requests, steps, Elements(0.5, 1, 2)) == weights + 2 * (
        moved - steps * (cost.resident + cost.head)
    )


def load(dtype, **options):
    return load_model(open_checkpoint(SHIPPED_MODEL), torch.device("cpu"), dtype, **options)


def test_elements_are_those_of_the_model_that_is_loaded():
    assert elements_of(load(torch.float32)) == Elements(4, 4, 4)
    assert elements_of(load(torch.bfloat16, int8_head=True)) == Elements(2, 2, 2), "a CPU multiplies it out"


def test_packed_weights_count_with_their_scales():
    """As they are on a GPU: 16 bits beside each 128 levels of 4, and 32 beside each row of the head."""
    model = load(torch.bfloat16, quantization="int4")
    assert elements_of(model) == Elements(2, 2, 2), "a CPU multiplies them out"
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            levels, scales = round_to_nearest(module.weight, 128)
            module.packed, module.weight = pack_levels(levels, scales, None, 128), None
    model.int8_head = pack_int8(model.head)
    assert elements_of(model) == Elements(0.5 + 2 / 128, 1 + 4 / 384, 2)


def test_no_config_is_said(tmp_path):
    with pytest.raises(UserError, match="config.json"):
        model_cost(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen2"]))
    assert model_cost(tmp_path) == cost_of(CONFIGS["qwen2"])
