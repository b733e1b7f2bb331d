"""The model against transformers: the same logits, however the tokens come in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from labkit.deployment import Deployment
from labkit.errors import UserError
from labkit.models.loading import open_checkpoint
from labkit.models.qwen2 import Qwen2Shape
from labkit.request import SamplingParams
from labkit.runner.inputs import pack
from labkit.runner.runner import Runner
from labkit.runner.sequence import Sequence, Work

PROMPTS = [[5], list(range(10, 47)), [(7 * i) % 390 + 3 for i in range(130)]]


def our_logits(runner: Runner, chunks: list[int]) -> list[torch.Tensor]:
    """Logits at every position of each prompt, all prompts together, ``chunks`` tokens in turn (the last repeats)."""
    sequences, first = [], 0
    for i, prompt in enumerate(PROMPTS):
        count = -(-len(prompt) // runner.block_size)
        blocks = list(range(first + count - 1, first - 1, -1))
        sequences.append(Sequence(i, prompt, len(prompt), 512, SamplingParams(), 0, 0.0, 0, blocks))
        first += count
    found: list[list[torch.Tensor]] = [[] for _ in PROMPTS]
    step = 0
    while work := [Work(s, min(s.pending, chunks[min(step, len(chunks) - 1)])) for s in sequences if s.pending]:
        work = sorted(work, key=lambda share: share.tokens > 1)
        with torch.inference_mode():
            inputs = pack(work, runner.block_size, runner.device)
            hidden = runner.model(inputs.token_ids, inputs.positions, runner.cache, inputs.attention)
            logits = runner.model.logits(hidden).split([share.tokens for share in work])
        for share, part in zip(work, logits, strict=True):
            found[share.sequence.request_id].append(part)
            share.sequence.computed += share.tokens
        step += 1
    return [torch.cat(parts) for parts in found]


@pytest.mark.parametrize("chunks", [[1000], [1], [5], [16], [100, 1], [33, 7, 1, 90]])
@pytest.mark.parametrize("block_size", [16, 5])
def test_logits_equal_those_of_transformers(tiny_model: Path, chunks: list[int], block_size: int) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_model)
    runner = Runner(
        open_checkpoint(str(tiny_model)), Deployment(str(tiny_model), device="cpu", kv_block_size=block_size)
    )
    for prompt, found in zip(PROMPTS, our_logits(runner, chunks), strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).logits[0]
        assert expected.std() > 1, "logits that hardly vary would prove nothing"
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("chunks", [[1000], [33, 1]])
def test_bfloat16_logits_are_as_near_the_truth_as_those_of_transformers(tiny_model: Path, chunks: list[int]) -> None:
    truth = AutoModelForCausalLM.from_pretrained(tiny_model)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    runner = Runner(open_checkpoint(str(tiny_model)), Deployment(str(tiny_model), device="cpu", dtype="bfloat16"))
    for prompt, found in zip(PROMPTS, our_logits(runner, chunks), strict=True):
        with torch.inference_mode():
            exact = truth(torch.tensor([prompt])).logits[0]
            theirs = (reference(torch.tensor([prompt])).logits[0].float() - exact).square().mean().sqrt()
        ours = (found - exact).square().mean().sqrt()
        assert 0 < theirs < 0.2 * exact.std()
        assert ours < 1.5 * theirs


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope type 'linear'"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding-window"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
    ],
)
def test_variants_that_would_be_computed_wrongly_are_refused(change: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Qwen2Shape.from_config(Qwen2Config(**change))
