"""Hessians of what comes into every matrix, against the inputs of the same modules in transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from labkit.models.decoder import Layer
from labkit.quantizer.source import open_source
from labkit.quantizer.stream import Stream
from labkit.quantizer.watch import Matrix, stages, watching

CPU = torch.device("cpu")
FAMILIES = ["qwen2", "llama-bias", "qwen3", "deepseek-v2-lite", "deepseek-v2", "deepseek-v3"]
# what comes into a matrix of ours comes into one module of transformers
THEIRS = {
    "attention.qkv": "self_attn.q_proj",
    "attention.out": "self_attn.o_proj",
    "attention.compress": "self_attn.kv_a_proj_with_mqa",
    "attention.q_expand": "self_attn.q_b_proj",
    "attention.kv_expand": "self_attn.kv_b_proj",
    "mlp.gate_up": "mlp.gate_proj",
    "mlp.down": "mlp.down_proj",
    "mlp.shared.gate_up": "mlp.shared_experts.gate_proj",
    "mlp.shared.down": "mlp.shared_experts.down_proj",
}
SEQUENCES = [torch.arange(3, 40), torch.arange(50, 52), (torch.arange(70) * 7) % 390 + 3]


def hessians_of_transformers(path: Path) -> dict[str, Tensor]:
    """Name of a module -> 2/n sum x x^T over its inputs, in float64, the sequences one by one."""
    model = AutoModelForCausalLM.from_pretrained(path)
    seen: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, inputs: seen.setdefault(name, []).append(inputs[0].flatten(0, -2).double())

    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.inference_mode():
        for sequence in SEQUENCES:
            model(sequence[None])
    return {name: 2 / len(x) * x.T @ x for name, parts in seen.items() if len(x := torch.cat(parts))}


def hessians_of_ours(path: Path, most_bytes: int = 2**30) -> dict[tuple[int, Matrix], tuple[Tensor, int]]:
    """(layer, matrix) -> its Hessian and the number of tokens that it saw; nothing is quantised."""
    source = open_source(str(path), CPU)
    shape = source.checkpoint.shape
    found = {}
    with torch.inference_mode():
        stream = Stream(SEQUENCES, source.embedding(torch.float32), shape, CPU, torch.float32, batch_tokens=60)
        assert len(stream) == 2
        for index in range(shape.layers):
            layer = source.layer(index, torch.float32)
            order = stages(layer, most_bytes)
            for half in ("attention", "mlp"):
                for stage in (each for each in order if each[0].half == half):
                    with watching(layer, stage) as hessians:
                        stream.look(layer, half)
                    found |= {(index, matrix): (each.mean(), each.tokens) for matrix, each in hessians.items()}
                stream.advance(layer, half)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_hessians_are_those_of_what_comes_in(make_model: Callable[..., Path], family: str) -> None:
    path = make_model(family)
    expected, found = hessians_of_transformers(path), hessians_of_ours(path)
    tokens = sum(map(len, SEQUENCES))
    compared = 0
    for (index, matrix), (hessian, count) in found.items():
        if matrix.expert is None:
            theirs = expected[f"{index}.{THEIRS[matrix.name]}"]
            scale = float(theirs.diagonal().mean())
            torch.testing.assert_close(hessian.double() / scale, theirs / scale, atol=1e-4, rtol=1e-3)
            assert count == tokens
            compared += 1
    assert compared >= 4


@pytest.mark.parametrize("family", ["deepseek-v2-lite", "deepseek-v3"])
def test_every_expert_sees_the_tokens_that_are_routed_to_it(make_model: Callable[..., Path], family: str) -> None:
    path = make_model(family)
    found = hessians_of_ours(path)
    tokens, per_token = sum(map(len, SEQUENCES)), 3
    layers = {index for index, matrix in found if matrix.expert is not None}
    assert layers
    for index in layers:
        of_kind = {
            kind: {m.expert: found[index, m] for i, m in found if i == index and m.parameter == f"mlp.{kind}"}
            for kind in ("gate_up", "down")
        }
        counts = {kind: [count for _, count in experts.values()] for kind, experts in of_kind.items()}
        assert counts["gate_up"] == counts["down"] and sum(counts["gate_up"]) == tokens * per_token
        assert len(set(counts["gate_up"])) > 1
        # every token is seen by three experts, so that together they see thrice what the shared ones see
        together = sum(hessian * count for hessian, count in of_kind["gate_up"].values())
        shared, _ = found[index, Matrix("mlp.shared.gate_up.weight")]
        torch.testing.assert_close(together, shared * tokens * per_token, rtol=1e-3, atol=1e-3 * float(together.max()))


def test_what_feeds_each_other_is_in_stages_apart_and_memory_splits_experts(make_model: Callable[..., Path]) -> None:
    layer: Layer = open_source(str(make_model("deepseek-v3")), CPU).layer(2, torch.float32)
    names = [[matrix.name for matrix in stage] for stage in stages(layer)]
    experts = list(range(8))
    assert names == [
        ["attention.compress"],
        ["attention.q_expand", "attention.kv_expand"],
        ["attention.out"],
        [*(f"mlp.gate_up of expert {i}" for i in experts), "mlp.shared.gate_up"],
        [*(f"mlp.down of expert {i}" for i in experts), "mlp.shared.down"],
    ]
    # Hessians of 64 x 64 float32: three of them
    split = stages(layer, most_bytes=3 * 4 * 64 * 64)
    assert [len(stage) for stage in split if stage[0].parameter == "mlp.gate_up"] == [3, 3, 3]
    path = make_model("deepseek-v3")
    whole, parts = hessians_of_ours(path), hessians_of_ours(path, most_bytes=3 * 4 * 64 * 64)
    assert all(torch.equal(whole[key][0], parts[key][0]) for key in whole)


def test_a_watch_leaves_no_trace(make_model: Callable[..., Path]) -> None:
    source = open_source(str(make_model("deepseek-v3")), CPU)
    layer = source.layer(2, torch.float32)

    def state() -> Any:
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in layer.modules()]
        return [type(m) for m in layer.modules()], hooks

    before = state()
    for stage in stages(layer):
        with watching(layer, stage):
            assert state() != before
    assert state() == before
