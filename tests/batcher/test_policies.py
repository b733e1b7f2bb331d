"""What each policy runs next, without a model: a step is booked as a runner would book it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.batcher.policies import schedule, wait_s
from labkit.batcher.queues import Queues
from labkit.deployment import Deployment
from labkit.request import SamplingParams
from labkit.runner.blocks import BlockManager
from labkit.runner.sequence import Sequence, Work


def arrive(queues: Queues, request_id: int, prompt: int, answer: int = 4, at_s: float = 0.0) -> Sequence:
    sequence = Sequence(request_id, [1] * prompt, prompt, prompt + answer, SamplingParams(), 0, at_s)
    queues.waiting.append(sequence)
    return sequence


def make(blocks: int = 100, **knobs: Any) -> tuple[Queues, Deployment]:
    deployment = Deployment(kv_block_size=4, **knobs)
    return Queues(BlockManager(blocks), 4, deployment.max_batch), deployment


def book(queues: Queues, work: list[Work]) -> None:
    for sequence, tokens in work:
        assert 0 < tokens <= sequence.pending
        assert len(sequence.blocks) * 4 >= sequence.computed + tokens, "a share without blocks to write to"
        samples = tokens == sequence.pending
        sequence.computed += tokens
        if samples:
            sequence.tokens.append(1)
            if len(sequence.tokens) == sequence.limit:
                queues.leave(sequence)


def step(queues: Queues, deployment: Deployment, now_s: float = 0.0) -> list[tuple[int, int]]:
    work = schedule(queues, deployment, now_s)
    found = [(share.sequence.request_id, share.tokens) for share in work]
    book(queues, work)
    return found


def test_continuous_mixes_decodes_with_chunks_within_the_budget() -> None:
    queues, deployment = make(token_budget=10)
    arrive(queues, 0, prompt=3)
    assert step(queues, deployment) == [(0, 3)]
    arrive(queues, 1, prompt=14)
    arrive(queues, 2, prompt=6)
    assert step(queues, deployment) == [(0, 1), (1, 9)]
    assert step(queues, deployment) == [(0, 1), (1, 5), (2, 4)]
    assert step(queues, deployment) == [(0, 1), (1, 1), (2, 2)]


def test_continuous_without_chunks_gives_prompts_steps_of_their_own() -> None:
    queues, deployment = make(token_budget=10, chunked_prefill=False)
    arrive(queues, 0, prompt=3)
    arrive(queues, 1, prompt=40)
    arrive(queues, 2, prompt=1)
    assert step(queues, deployment) == [(0, 3)]
    assert step(queues, deployment) == [(1, 40)]
    assert step(queues, deployment) == [(2, 1)]
    assert step(queues, deployment) == [(0, 1), (1, 1), (2, 1)]


def test_a_static_batch_admits_nobody_until_its_last_member_ends() -> None:
    queues, deployment = make(batching="static", max_batch=2, token_budget=8)
    arrive(queues, 0, prompt=10, answer=2)
    arrive(queues, 1, prompt=3, answer=4)
    arrive(queues, 2, prompt=2, answer=1)
    assert step(queues, deployment) == [(0, 8)]
    assert step(queues, deployment) == [(0, 2), (1, 3)]
    assert step(queues, deployment) == [(0, 1), (1, 1)]
    assert step(queues, deployment) == [(1, 1)], "0 has ended and left, 2 waits on"
    assert step(queues, deployment) == [(1, 1)]
    assert step(queues, deployment) == [(2, 2)]
    assert step(queues, deployment) == []


def test_the_window_opens_with_the_oldest_and_closes_without_a_new_arrival() -> None:
    queues, deployment = make(batching="dynamic", max_batch=3, batch_window_ms=50)
    arrive(queues, 0, prompt=2, at_s=10.0)
    arrive(queues, 1, prompt=2, at_s=10.04)
    assert wait_s(queues, deployment, 10.02) == pytest.approx(0.03)
    assert step(queues, deployment, 10.049) == []
    assert wait_s(queues, deployment, 10.05) == 0
    assert step(queues, deployment, 10.0501) == [(0, 2), (1, 2)], "the second arrival does not hold the window open"
    arrive(queues, 2, prompt=2, at_s=10.06)
    assert wait_s(queues, deployment, 10.06) == 0, "while a batch runs there are steps to do"
    while queues.running:
        assert all(request_id < 2 for request_id, _ in step(queues, deployment, 10.06))
    assert wait_s(queues, deployment, 10.07) == pytest.approx(0.04)


def test_the_window_closes_early_for_a_full_batch() -> None:
    queues, deployment = make(batching="dynamic", max_batch=2, batch_window_ms=50)
    for request_id in range(3):
        arrive(queues, request_id, prompt=2, at_s=1.0)
    assert wait_s(queues, deployment, 1.0) == 0
    assert step(queues, deployment, 1.0) == [(0, 2), (1, 2)]


def test_the_latest_arrival_is_preempted_and_the_oldest_goes_on() -> None:
    queues, deployment = make(blocks=5, token_budget=100)
    arrive(queues, 0, prompt=8, answer=8)
    arrive(queues, 1, prompt=4, answer=8)
    assert step(queues, deployment) == [(0, 8), (1, 4)]
    assert step(queues, deployment) == [(0, 1), (1, 1)]
    for _ in range(3):
        step(queues, deployment)
    assert queues.blocks.free == 0
    assert step(queues, deployment) == [(0, 1)]
    latest = queues.waiting[0]
    assert (latest.request_id, latest.computed, latest.blocks, queues.preemptions) == (1, 0, [], 1)
    assert len(latest.tokens) == 4 + 5, "what it has said so far is kept"
    while queues.running or queues.waiting:
        assert step(queues, deployment)
    assert queues.blocks.used == 0


def test_admission_leaves_a_block_for_each_who_runs() -> None:
    queues, deployment = make(blocks=6)
    arrive(queues, 0, prompt=8)
    arrive(queues, 1, prompt=8)
    arrive(queues, 2, prompt=8)
    assert step(queues, deployment) == [(0, 8), (1, 8)]
    assert step(queues, deployment) == [(0, 1), (1, 1)], "two blocks are free, and each of the two soon wants one"
    assert queues.preemptions == 0 and queues.blocks.free == 0


def test_nobody_overtakes_the_first_who_waits() -> None:
    queues, deployment = make(blocks=10)
    arrive(queues, 0, prompt=24)
    arrive(queues, 1, prompt=20)
    arrive(queues, 2, prompt=1)
    assert step(queues, deployment) == [(0, 24)]
    assert [sequence.request_id for sequence in queues.waiting] == [1, 2]


@settings(max_examples=150, deadline=None)
@given(
    batching=st.sampled_from(["static", "dynamic", "continuous"]),
    chunked=st.booleans(),
    budget=st.integers(1, 40),
    max_batch=st.integers(1, 6),
    blocks=st.integers(8, 20),
    events=st.lists(st.tuples(st.sampled_from("acs"), st.integers(1, 20), st.integers(1, 10)), max_size=60),
)
def test_everyone_ends_and_nothing_leaks(
    batching: Any, chunked: bool, budget: int, max_batch: int, blocks: int, events: list[tuple[str, int, int]]
) -> None:
    """Any order of arrivals, cancellations and steps: limits hold in each step, and in the end all is done and free."""
    queues, deployment = make(
        blocks, batching=batching, chunked_prefill=chunked, token_budget=budget, max_batch=max_batch
    )
    everyone: list[Sequence] = []

    def checked_step() -> int:
        work = schedule(queues, deployment, now_s=1e9)
        assert len(queues.running) <= max_batch
        assert len({share.sequence.request_id for share in work}) == len(work)
        if batching == "continuous" and chunked:
            assert sum(share.tokens for share in work) <= budget
        held = [block for sequence in everyone for block in sequence.blocks]
        assert len(held) == len(set(held)) == queues.blocks.used
        arrivals = [s.request_id for s in queues.running] + [s.request_id for s in queues.waiting]
        assert arrivals == sorted(arrivals), "order of arrival is kept, whoever was preempted"
        book(queues, work)
        return len(work)

    for kind, a, b in events:
        if kind == "a":
            everyone.append(arrive(queues, len(everyone), prompt=a, answer=b))
        elif kind == "s":
            checked_step()
        elif alive := [*queues.running, *queues.waiting]:
            queues.leave(alive[a % len(alive)])
    for _ in range(20 * 30 * max(1, len(everyone))):
        if not (queues.running or queues.waiting):
            break
        assert checked_step() > 0, "someone waits, but nothing runs"
    assert not queues.running and not queues.waiting
    assert queues.blocks.used == 0
