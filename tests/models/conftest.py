"""Tiny random models of every architecture, saved by transformers, with what transformers makes of a few prompts."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

VOCAB = 400
PROMPTS = [[5], list(range(10, 47)), [(7 * i) % 390 + 3 for i in range(130)]]
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
}
# name -> (architecture without "Config" and "ForCausalLM", what its config has beside COMMON)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen2-yarn": (
        "Qwen2",
        {"num_key_value_heads": 1, "rope_parameters": {k: v for k, v in YARN.items() if "mscale" not in k}},
    ),
    "llama3": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "llama-bias": (
        "Llama",
        {
            "num_key_value_heads": 4,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        },
    ),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "deepseek-v2-lite": (
        "DeepseekV2",
        LATENT
        | {
            "q_lora_rank": None,
            "topk_method": "greedy",
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "rope_parameters": YARN,
        },
    ),
    "deepseek-v2": (
        "DeepseekV2",
        LATENT
        | {
            "q_lora_rank": 48,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 0,
            "routed_scaling_factor": 4.0,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
            "rms_norm_eps": 1e-3,
        },
    ),
    "deepseek-v3": (
        "DeepseekV3",
        LATENT
        | {
            "num_hidden_layers": 3,
            "q_lora_rank": 48,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
}


@dataclass(frozen=True)
class Case:
    """A checkpoint and what ``transformers`` makes of PROMPTS with it, in float32."""

    path: Path
    prompts: list[list[int]]
    logits: list[Tensor]
    """[length, vocab] each."""
    answers: list[list[int]]
    """64 greedy tokens each, end-of-sequence tokens ignored."""


@pytest.fixture(scope="session")
def drive() -> ModuleType:
    """The module drive.py beside this file, which pytest would not find by its name."""
    return _beside("drive")


@pytest.fixture(scope="session")
def gptq() -> ModuleType:
    """The module gptq.py."""
    return _beside("gptq")


def _beside(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"labkit_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """A function that gives the case of one of FAMILIES by name, saved in several shards; the same one every time."""
    folder = tmp_path_factory.mktemp("families")
    return cache(lambda name: build_case(name, folder / name))


@pytest.fixture(scope="session")
def read_case() -> Callable[[Path], Case]:
    """A function that gives the case of a checkpoint."""
    return case_of


@pytest.fixture(params=list(FAMILIES))
def case(request: pytest.FixtureRequest, make_case: Callable[[str], Case]) -> Case:
    """Each of FAMILIES in turn."""
    return make_case(request.param)


def build_case(name: str, path: Path) -> Case:
    import transformers

    architecture, changes = FAMILIES[name]
    config = getattr(transformers, f"{architecture}Config")(**(COMMON | changes))
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    spread(model)
    model.save_pretrained(path, max_shard_size="200KB")
    return case_of(path)


def case_of(path: Path) -> Case:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.inference_mode():
        logits = [model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]
        answers = [greedy(model, prompt) for prompt in PROMPTS]
    return Case(path, PROMPTS, logits, answers)


def spread(model: Any) -> None:
    """Random weights, spread widely enough that greedy answers vary from prompt to prompt, and biases that matter."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.1 * noise if "norm" in name else 0.3 * noise)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """64 tokens by ``generate``."""
    ids = torch.tensor([prompt])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=64,
        min_new_tokens=64,
        eos_token_id=-1,
        do_sample=False,
    )
    return found[0, len(prompt) :].tolist()
