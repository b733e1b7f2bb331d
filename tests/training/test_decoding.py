from __future__ import annotations

import pytest
import torch

from labkit.training.decoding import greedy
from labkit.training.network import Network, Shape

NETWORK = Network(Shape(vocabulary=50, hidden=32, layers=2, heads=4, kv_heads=2, intermediate=48, context=40), seed=5)
with torch.no_grad():
    for _parameter in NETWORK.parameters():
        _parameter.mul_(8 if _parameter.dim() == 2 else 1)
PROMPTS = [[1, 2, 3], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1], [30, 31]]


def one_by_one(prompt: list[int], stop: int, most: int) -> list[int]:
    """The same by the forward pass of training alone: no cache, no padding, no batch."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + most:
            ids.append(int(NETWORK(torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] == stop:
                break
    return ids[len(prompt) :]


def test_a_batch_gives_each_prompt_what_it_gives_alone_and_ends_at_the_stop() -> None:
    free = [one_by_one(prompt, -1, 30) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in free}) == len(PROMPTS)
    assert greedy(NETWORK, PROMPTS, -1, 30) == free
    stop = free[0][4]
    expected = [one_by_one(prompt, stop, 30) for prompt in PROMPTS]
    assert expected[0][-1] == stop and len(expected[0]) <= 5
    assert greedy(NETWORK, PROMPTS, stop, 30) == expected


@pytest.mark.parametrize("prompts", [[], [[1], []], [[1] * 31]])
def test_impossible_prompts_are_refused(prompts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="1 to 30 tokens"):
        greedy(NETWORK, prompts, 0, 10)
