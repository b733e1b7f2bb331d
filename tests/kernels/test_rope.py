"""Rotary embedding against ``transformers``: its tables, its rotation, and the write to the cache after it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig, Qwen2Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from labkit.kernels.rope import (
    RopeTable,
    rope_interleaved_reference,
    rope_interleaved_triton,
    rope_write_reference,
    rope_write_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}
DEEPSEEK = {"factor": 40, "mscale": 1.0, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1}
TYPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3},
    "yarn": {"rope_type": "yarn", "rope_theta": 1000000.0, **YARN},
    "yarn, untruncated": {"rope_type": "yarn", "rope_theta": 150000.0, "truncate": False, **YARN},
    "yarn, factor given": {"rope_type": "yarn", "rope_theta": 10000.0, "attention_factor": 1.5, **YARN},
    "yarn of DeepSeek": {"rope_type": "yarn", "rope_theta": 10000.0, **YARN, **DEEPSEEK},
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", TYPES)
def test_tables_are_those_of_transformers(name: str) -> None:
    parameters = TYPES[name]
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=4096, rope_parameters=dict(parameters)
    )
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(4096)[None])
    table = RopeTable.build(config.rope_parameters, 64, 4096).cos_sin
    assert table.shape == (4096, 64) and table.dtype == torch.float32
    # Frequencies that differ in the last bit turn by 4096 * 2**-23 more or less at the last position.
    torch.testing.assert_close(table, torch.cat([part[0, :, :32] for part in theirs], -1), atol=1e-3, rtol=0)


def test_the_configs_of_the_models_give_what_the_table_needs() -> None:
    qwen = Qwen2Config(rope_theta=1234.0)
    assert RopeTable.build(qwen.rope_parameters, 64, 8).cos_sin[1, 1] == pytest.approx(np.cos(1234.0 ** (-1 / 32)))
    deepseek = DeepseekV3Config(rope_parameters=dict(TYPES["yarn of DeepSeek"]))
    assert RopeTable.build(deepseek.rope_parameters, deepseek.qk_rope_head_dim, 8).cos_sin.shape == (8, 64)


def test_an_unknown_type_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="longrope"):
        RopeTable.build({"rope_type": "longrope", "rope_theta": 1.0}, 64, 8)


def case(
    tokens: int, heads: int, kv_heads: int, head_dim: int, rotary: float = 1.0, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Arguments of rope_write: scattered slots in a cache of 4 blocks of 16, the second token (if any) not written."""
    qkv = random(tokens, (heads + 2 * kv_heads) * head_dim).to(DEVICE, dtype)
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(1))[:tokens]
    slots[1:2] = -1
    table = RopeTable.build({"rope_theta": 10000.0, "partial_rotary_factor": rotary}, head_dim, 600, DEVICE)
    return {
        "qkv": qkv,
        "positions": (torch.arange(tokens) * 97 % 600).to(DEVICE),
        "table": table.cos_sin,
        "cache": torch.full((2, kv_heads, 4, 16, head_dim), 7.0, device=DEVICE, dtype=dtype),
        "slots": slots.to(DEVICE),
        "heads": heads,
    }


def test_the_reference_rotates_as_transformers_does_and_writes_nothing_else() -> None:
    arguments = case(5, 4, 2, 16)
    qkv, cache, slots = arguments["qkv"].cpu(), arguments["cache"], arguments["slots"].cpu()
    each = qkv.view(5, 8, 16).transpose(0, 1)[None]
    cos, sin = arguments["table"].cpu()[arguments["positions"].cpu()].repeat(1, 1, 1)[0].chunk(2, -1)
    queries, keys = apply_rotary_pos_emb(
        each[:, :4], each[:, 4:6], torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None]
    )
    expected = torch.full((2, 2, 64, 16), 7.0)
    for token in (0, 2, 3, 4):
        expected[0, :, slots[token]] = keys[0, :, token]
        expected[1, :, slots[token]] = each[0, 6:, token]
    found = rope_write_reference(**arguments).cpu()
    torch.testing.assert_close(found, queries[0].transpose(0, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache.view(2, 2, 64, 16).cpu(), expected, atol=1e-5, rtol=1e-5)


def test_norms_of_queries_and_keys_come_before_the_rotation() -> None:
    arguments = case(3, 2, 1, 16)
    q_norm, k_norm = (1 + random(16, seed=seed).to(DEVICE) for seed in (3, 4))
    normed = arguments["qkv"].clone().view(3, 4, 16)
    for heads, weight in ((slice(0, 2), q_norm), (slice(2, 3), k_norm)):
        norm = Qwen3RMSNorm(16, 1e-5).to(DEVICE)
        norm.weight.data = weight
        normed[:, heads] = norm(normed[:, heads]).detach()
    plain = {**arguments, "qkv": normed.view(3, -1), "cache": arguments["cache"].clone()}
    found = rope_write_reference(**arguments, q_norm=q_norm, k_norm=k_norm, eps=1e-5)
    torch.testing.assert_close(found, rope_write_reference(**plain), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(arguments["cache"], plain["cache"], atol=1e-5, rtol=1e-5)


def test_interleaved_pairs_turn_as_those_of_deepseek() -> None:
    x, key, positions = random(3, 2, 64), random(3, 1, 64, seed=1), torch.tensor([0, 9, 500])
    table = RopeTable.build(TYPES["yarn of DeepSeek"], 64, 600).cos_sin
    cos, sin = table[positions].chunk(2, -1)
    doubled = [torch.cat((part, part), -1)[None] for part in (cos, sin)]
    expected, _ = apply_rotary_pos_emb_interleave(x.transpose(0, 1)[None], key.transpose(0, 1)[None], *doubled)
    found = rope_interleaved_reference(x, positions, table)
    torch.testing.assert_close(found, expected[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize(
    "tokens, heads, kv_heads, head_dim", [(3, 2, 1, 16), (1, 7, 1, 64), (2, 4, 4, 96), (3, 12, 2, 128)]
)
def test_the_kernel_does_what_the_reference_does(
    tokens: int, heads: int, kv_heads: int, head_dim: int, normed: bool, dtype: torch.dtype
) -> None:
    arguments = case(tokens, heads, kv_heads, head_dim, dtype=dtype)
    if normed:
        for seed, name in enumerate(("q_norm", "k_norm")):
            arguments[name] = (1 + random(head_dim, seed=seed)).to(DEVICE, dtype)
    ours = {**arguments, "qkv": arguments["qkv"].clone(), "cache": arguments["cache"].clone()}
    tolerance = TOLERANCE[dtype]
    expected = rope_write_reference(**arguments)
    torch.testing.assert_close(rope_write_triton(**ours), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(ours["cache"], arguments["cache"], atol=tolerance, rtol=tolerance)


def test_the_kernel_leaves_what_is_not_rotated() -> None:
    arguments = case(3, 4, 2, 64, rotary=0.5)
    assert arguments["table"].shape[-1] == 32
    ours = {**arguments, "qkv": arguments["qkv"].clone(), "cache": arguments["cache"].clone()}
    expected = rope_write_reference(**arguments)
    torch.testing.assert_close(rope_write_triton(**ours), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours["cache"], arguments["cache"], atol=1e-5, rtol=1e-5)


def test_the_kernel_writes_no_padding_and_takes_no_tokens_at_all() -> None:
    arguments = case(2, 4, 2, 16)
    arguments["slots"] = torch.full_like(arguments["slots"], -1)
    rope_write_triton(**arguments)
    assert (arguments["cache"] == 7).all()
    assert rope_write_triton(**case(0, 4, 2, 16)).shape == (0, 4, 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, heads", [(2, 1), (3, 9)])
def test_the_interleaved_kernel_takes_part_of_a_row(tokens: int, heads: int, dtype: torch.dtype) -> None:
    x = random(tokens, heads, 96).to(DEVICE, dtype)[..., 32:]
    positions = torch.tensor([0, 9, 500][:tokens], device=DEVICE)
    table = RopeTable.build(TYPES["yarn of DeepSeek"], 64, 600, DEVICE).cos_sin
    found, expected = rope_interleaved_triton(x, positions, table), rope_interleaved_reference(x, positions, table)
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
