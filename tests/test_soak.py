"""Requests come, are cancelled and preempted on a KV cache too small for them, and answer as if each were alone."""

from __future__ import annotations

import random
from typing import Any

import pytest

from labkit.core import LabkitCore
from labkit.deployment import Deployment
from labkit.models.loading import load_tokenizer
from labkit.request import SamplingParams
from labkit.training.ledger import FAMILIES, ask, make_blotter

SHORTEST_ANSWER, LONGEST_ANSWER = 4, 24
LONGEST_PROMPT = 120


def engine(**knobs: Any) -> LabkitCore:
    return LabkitCore(Deployment(device="cpu", kv_block_size=2, **knobs))


def ask_ledgers(blotters: int, questions: int) -> list[list[int]]:
    """Prompts for the shipped model; those about one blotter begin alike, and differ in their last line."""
    chance, tokenizer = random.Random(0), load_tokenizer(Deployment().model)
    prompts: list[list[int]] = []
    while len(prompts) < blotters * questions:
        blotter = make_blotter(chance, "short")
        asked = [ask(chance, blotter, family, held_out=True) for family in chance.sample(FAMILIES, questions)]
        chats = [[{"role": "user", "content": f"{blotter.text}\n{question.text}"}] for question in asked]
        ids = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
        if max(len(prompt) for prompt in ids) <= LONGEST_PROMPT:
            prompts += ids
    return prompts


def sampling(prompt: int, max_tokens: int) -> SamplingParams:
    """Every third prompt is sampled, with a seed of its own; the others are greedy."""
    return SamplingParams(max_tokens, temperature=float(prompt % 3 == 0), seed=prompt)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return ask_ledgers(blotters=4, questions=5)


@pytest.fixture(scope="module")
def quantization(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def alone(prompts: list[list[int]], quantization: str) -> list[list[int]]:
    """What each prompt is answered when nothing else runs and nothing is kept."""
    core, answers = engine(prefix_cache=False, async_scheduling=False, quantization=quantization), []
    for number, prompt in enumerate(prompts):
        core.add(number, prompt, sampling(number, LONGEST_ANSWER))
        answers.append([])
        while core.has_work():
            answers[-1] += [token for output in core.step() for token in output.token_ids]
    return answers


LONG = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    "quantization, requests, ahead",
    [
        ("none", 200, True),
        ("int4", 100, True),
        pytest.param("none", 2000, True, marks=LONG),
        pytest.param("none", 2000, False, marks=LONG),
        pytest.param("int4", 2000, True, marks=LONG),
    ],
    indirect=["quantization"],
)
def test_every_answer_is_the_one_given_alone(
    prompts: list[list[int]], alone: list[list[int]], quantization: str, requests: int, ahead: bool
) -> None:
    small: dict[str, Any] = {"kv_blocks": 200, "max_batch": 24, "token_budget": 80}
    core = engine(prefix_cache=True, async_scheduling=ahead, quantization=quantization, **small)
    chance = random.Random(requests)
    asked: dict[int, tuple[int, int]] = {}
    found: dict[int, list[int]] = {}
    alive: set[int] = set()
    cancelled = 0
    while len(asked) < requests or core.has_work():
        while len(asked) < requests and chance.random() < 0.75:
            request_id, number = len(asked), chance.randrange(len(prompts))
            most = chance.randint(SHORTEST_ANSWER, LONGEST_ANSWER)
            core.add(request_id, prompts[number], sampling(number, most))
            asked[request_id], found[request_id] = (number, most), []
            alive.add(request_id)
        if alive and chance.random() < 0.05:
            victim = chance.choice(sorted(alive))
            alive.remove(victim)
            core.cancel(victim)
            cancelled += 1
        for output in core.step():
            assert output.request_id in alive and output.error is None
            found[output.request_id] += output.token_ids
            if output.finish_reason:
                alive.remove(output.request_id)
                number, most = asked[output.request_id]
                assert found[output.request_id] == alone[number][:most]
    assert not alive
    stats = core.stats()
    assert stats.kv_blocks_used == stats.running == stats.waiting == 0
    assert cancelled > requests // 50 and stats.preemptions > requests // 20, "it was crowded"
    assert stats.cached_tokens > 20 * requests, "beginnings were shared"
