"""Routing against the modules of transformers, experts against their definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from labkit.kernels import moe, moe_experts
from labkit.kernels.moe_experts import experts_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = [(torch.float32, 1e-4), (torch.float16, 5e-3)]
if DEVICE == "cuda":  # the interpreter cannot multiply bfloat16
    TOLERANCES.append((torch.bfloat16, 4e-2))


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


CONFIGS = {"few": moe_experts.FEW, "some": moe_experts.SOME, "many": moe_experts.MANY}


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "tokens, top_k, count, hidden, inner",
    [(1, 1, 1, 32, 16), (1, 3, 9, 40, 72), (15, 2, 5, 128, 64), (17, 2, 3, 24, 10), (65, 3, 4, 16, 16)],
)
def test_the_kernels_agree(
    tokens: int,
    top_k: int,
    count: int,
    hidden: int,
    inner: int,
    config: str,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(moe_experts, "_config", lambda pairs, experts: CONFIGS[config])
    x, weights = random(tokens, hidden).to(dtype), random(tokens, top_k, seed=1)
    ids = random(tokens, count, seed=2).topk(top_k).indices
    gate_up = (random(count, 2 * inner, hidden, seed=3) / hidden**0.5).to(dtype)
    down = (random(count, hidden, inner, seed=4) / inner**0.5).to(dtype)
    found = experts_triton(x, ids, weights, gate_up, down)
    assert found.dtype == dtype
    close(found, definition(x, ids, weights, gate_up, down), tolerance)


def test_all_tokens_may_go_to_one_expert() -> None:
    x, weights = random(40, 16), random(40, 1, seed=1)
    gate_up, down = random(6, 16, 16, seed=3), random(6, 16, 8, seed=4)
    ids = torch.full((40, 1), 4, device=DEVICE)
    close(experts_triton(x, ids, weights, gate_up, down), definition(x, ids, weights, gate_up, down), 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_graph_follows_the_routing() -> None:
    x, logits = random(33, 256).bfloat16(), random(33, 16, seed=1)
    gate_up, down = random(16, 256, 256, seed=3).bfloat16() / 16, random(16, 256, 128, seed=4).bfloat16() / 11

    def run() -> torch.Tensor:
        return moe.experts(x, *moe.router(logits, 4), gate_up, down)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for seed in (5, 6):
        logits.copy_(random(33, 16, seed=seed))
        graph.replay()
        close(found, definition(x, *moe.router(logits, 4), gate_up, down), 4e-2)


@pytest.mark.parametrize("block", [1, 16, 64])
@pytest.mark.parametrize("pairs, count", [(1, 1), (7, 40), (64, 1), (65, 1), (300, 7)])
def test_every_pair_lies_once_in_a_tile_of_its_expert(
    pairs: int, count: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe_experts, "PAIRS_AT_ONCE", 256)
    ids = torch.randint(count, (pairs, 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    order, tile_experts = (each.cpu() for each in moe_experts._sort(ids, count, block))
    used = -(-ids.flatten().bincount(minlength=count).cpu() // block)
    assert tile_experts[tile_experts >= 0].tolist() == torch.arange(count).repeat_interleave(used).tolist()
    assert not (tile_experts[: used.sum()] < 0).any()
    found = []
    for expert, tile in zip(tile_experts.tolist(), order.view(-1, block), strict=True):
        if expert >= 0:
            real = tile[tile < pairs]
            assert (ids.cpu()[real] == expert).all()
            assert (tile[tile >= pairs] == pairs).all()
            found += real.tolist()
    assert sorted(found) == list(range(pairs))


def test_many_pairs_of_an_expert_take_larger_tiles() -> None:
    assert moe_experts._config(8, 256) is moe_experts.FEW
    assert moe_experts._config(256 * 64, 256) is moe_experts.SOME
    assert moe_experts._config(256 * 512, 256) is moe_experts.MANY
