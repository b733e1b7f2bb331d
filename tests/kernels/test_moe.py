"""Routing against the modules of transformers, experts against their definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from labkit.kernels import moe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randomise(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@torch.no_grad()
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("groups, top_groups", [(1, 1), (4, 2)])
def test_deepseek_v3_of_transformers_agrees(groups: int, top_groups: int, normalise: bool) -> None:
    config = DeepseekV3Config(
        hidden_size=32,
        moe_intermediate_size=16,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=groups,
        topk_group=top_groups,
        norm_topk_prob=normalise,
        routed_scaling_factor=2.5,
    )
    module = DeepseekV3MoE(config)
    randomise(module)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    ids, weights = moe.router(
        x @ module.gate.weight.T,
        4,
        scoring="sigmoid",
        method="noaux_tc",
        correction_bias=module.gate.e_score_correction_bias,
        groups=groups,
        top_groups=top_groups,
        normalise=normalise,
        scale=2.5,
    )
    found = moe.experts_reference(x, ids, weights, module.experts.gate_up_proj, module.experts.down_proj)
    torch.testing.assert_close(found + module.shared_experts(x), module(x[None])[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("method, groups, top_groups", [("greedy", 1, 1), ("group_limited_greedy", 4, 2)])
def test_deepseek_v2_of_transformers_agrees(method: str, groups: int, top_groups: int) -> None:
    config = DeepseekV2Config(
        hidden_size=32,
        moe_intermediate_size=16,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        n_group=groups,
        topk_group=top_groups,
        topk_method=method,
        routed_scaling_factor=16.0,
    )
    module = DeepseekV2Moe(config)
    randomise(module)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    logits = x @ module.gate.weight.T
    ids, weights = moe.router(logits, 4, method=method, groups=groups, top_groups=top_groups, scale=16.0)
    found = moe.experts_reference(x, ids, weights, module.experts.gate_up_proj, module.experts.down_proj)
    torch.testing.assert_close(found + module.shared_experts(x), module(x[None])[0], atol=1e-4, rtol=1e-4)


def test_a_bias_chooses_but_does_not_weigh() -> None:
    logits, bias = torch.zeros(1, 4), torch.tensor([0.0, -9.0, 3.0, 1.0])
    ids, weights = moe.router(logits, 2, scoring="sigmoid", method="noaux_tc", correction_bias=bias)
    assert sorted(ids[0].tolist()) == [2, 3]
    assert weights.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("word", ["scoring", "method"])
def test_unknown_words_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match="tanh"):
        moe.router(torch.zeros(1, 4), 2, **{word: "tanh"})


def definition(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> np.ndarray:
    wide, gate_up_wide, down_wide = (each.double().cpu().numpy() for each in (x, gate_up, down))
    out = np.zeros(wide.shape)
    for token in range(len(wide)):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            gate, up = np.split(gate_up_wide[expert] @ wide[token], 2)
            out[token] += weight * (down_wide[expert] @ (gate / (1 + np.exp(-gate)) * up))
    return out


def close(found: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(found.double().cpu().numpy(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("tokens, top_k, count", [(1, 1, 1), (1, 3, 8), (7, 2, 5), (33, 2, 3)])
def test_experts_are_a_weighted_sum(tokens: int, top_k: int, count: int) -> None:
    x, weights = random(tokens, 24), random(tokens, top_k, seed=1)
    ids = random(tokens, count, seed=2).topk(top_k).indices
    gate_up, down = random(count, 20, 24, seed=3) / 5, random(count, 24, 10, seed=4) / 3
    close(moe.experts(x, ids, weights, gate_up, down), definition(x, ids, weights, gate_up, down), 1e-4)
