"""What each policy runs next, without a model: a step is booked as a runner would book it."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.batcher.policies import schedule, wait_s
from labkit.batcher.queues import Queues
from labkit.deployment import Deployment
from labkit.request import SamplingParams
from labkit.runner.blocks import BlockManager
from labkit.runner.sequence import PLACEHOLDER, Sequence, Work


def arrive(queues: Queues, request_id: int, prompt: int, answer: int = 4, at_s: float = 0.0) -> Sequence:
    sequence = Sequence(request_id, [1] * prompt, prompt, prompt + answer, SamplingParams(), 0, at_s)
    queues.waiting.append(sequence)
    return sequence


def make(blocks: int = 100, **knobs: Any) -> tuple[Queues, Deployment]:
    deployment = Deployment(kv_block_size=4, **knobs)
    return Queues(BlockManager(blocks), 4, deployment.max_batch, deployment.prefix_cache), deployment


def launch(work: list[Work]) -> list[Sequence]:
    """Books a step whose tokens are not known yet; returns who gets one."""
    sampled = [share.sequence for share in work if share.samples]
    for sequence, tokens in work:
        assert 0 < tokens <= sequence.pending
        assert len(sequence.blocks) * 4 >= sequence.computed + tokens, "a share without blocks to write to"
        sequence.computed += tokens
    for sequence in sampled:
        sequence.tokens.append(PLACEHOLDER)
    return sampled


def read_back(queues: Queues, sampled: list[Sequence], token: int = 1) -> None:
    """Puts a launched step's tokens into their places, and takes out who has reached its limit."""
    for sequence in sampled:
        place = sequence.tokens.index(PLACEHOLDER)
        sequence.tokens[place] = token
        if place + 1 == sequence.limit:
            queues.leave(sequence)


def book(queues: Queues, work: list[Work]) -> None:
    read_back(queues, launch(work))


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
    assert len(queues.waiting) == 1, "nobody is admitted before there is budget for a token of his"
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


def test_who_is_ending_gets_no_share_but_keeps_its_place_until_it_is_known() -> None:
    queues, deployment = make(max_batch=2)
    ending, other = arrive(queues, 0, prompt=3, answer=2), arrive(queues, 1, prompt=3, answer=9)
    arrive(queues, 2, prompt=3)
    first = launch(schedule(queues, deployment, 0.0))
    second = launch(schedule(queues, deployment, 0.0))
    read_back(queues, first)
    assert schedule(queues, deployment, 0.0) == [(other, 1)]
    assert list(queues.running) == [ending, other] and len(queues.waiting) == 1
    read_back(queues, second)
    assert [share.sequence.request_id for share in schedule(queues, deployment, 0.0)] == [1, 2]


@pytest.mark.parametrize("batching", ["static", "continuous"])
def test_where_all_are_ending_there_is_nothing_to_run(batching: Any) -> None:
    queues, deployment = make(batching=batching)
    arrive(queues, 0, prompt=3, answer=1)
    sampled = launch(schedule(queues, deployment, 0.0))
    arrive(queues, 1, prompt=3, answer=1) if batching == "static" else None
    assert schedule(queues, deployment, 0.0) == []
    assert wait_s(queues, deployment, 0.0) == 0
    read_back(queues, sampled)
    assert len(schedule(queues, deployment, 0.0)) == (batching == "static")


def test_who_was_preempted_waits_for_its_token_before_it_runs_again() -> None:
    queues, deployment = make(blocks=4, token_budget=100)
    arrive(queues, 0, prompt=7, answer=3)
    latest = arrive(queues, 1, prompt=4, answer=9)
    in_flight = launch(schedule(queues, deployment, 0.0))
    for _ in range(4):
        work = schedule(queues, deployment, 0.0)
        if latest in queues.waiting:
            break
        sampled = launch(work)
        read_back(queues, in_flight)
        in_flight = sampled
    assert latest.tokens[-1] == PLACEHOLDER and (latest.row, latest.computed, latest.blocks) == (-1, 0, [])
    for sequence in [*queues.running]:
        queues.leave(sequence)
        in_flight.remove(sequence)
    assert schedule(queues, deployment, 0.0) == [] and queues.admit() is None
    read_back(queues, in_flight)
    assert schedule(queues, deployment, 0.0) == [(latest, len(latest.tokens))]


class Device:
    """A model and its KV cache, in miniature: what a slot holds, and what is sampled, depends on all that is attended.

    Steps run in the order of their launch, and know tokens that the host does not know yet by row alone.
    """

    def __init__(self, queues: Queues) -> None:
        self.slots: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.rows = queues.max_batch

    def run(self, work: list[Work]) -> list[int]:
        sampled = {}
        for sequence, tokens in work:
            assert 0 <= sequence.row < self.rows
            slots = [block * 4 + offset for block in sequence.blocks for offset in range(4)]
            for place in range(sequence.computed, sequence.computed + tokens):
                token = sequence.tokens[place]
                token = self.last[sequence.row] if token == PLACEHOLDER else token
                self.slots[slots[place]] = hash((token, *(self.slots[slot] for slot in slots[:place])))
            if tokens == sequence.pending:
                sampled[sequence.row] = self.slots[slots[len(sequence.tokens) - 1]] % 2
        self.last |= sampled
        return list(sampled.values())


def alone(prompt: list[int], limit: int) -> list[int]:
    tokens, slots = list(prompt), []
    while len(tokens) < limit:
        for token in tokens[len(slots) :]:
            slots.append(hash((token, *slots)))
        tokens.append(slots[-1] % 2)
    return tokens


@settings(max_examples=400)
@given(
    batching=st.sampled_from(["static", "dynamic", *["continuous"] * 4]),
    chunked=st.booleans(),
    ahead=st.booleans(),
    prefix_cache=st.booleans(),
    budget=st.integers(1, 40),
    max_batch=st.sampled_from((1, 2, 4, 6)),
    blocks=st.integers(8, 12),
    seed=st.integers(0, 2**32),
    length=st.integers(1, 60),
)
def test_everyone_ends_as_if_alone_and_nothing_leaks(
    batching: Any,
    chunked: bool,
    ahead: bool,
    prefix_cache: bool,
    budget: int,
    max_batch: int,
    blocks: int,
    seed: int,
    length: int,
) -> None:
    """Any order of arrivals, cancellations and steps: limits hold in each step, and in the end all is done and free."""
    queues, deployment = make(
        blocks,
        batching=batching,
        chunked_prefill=chunked,
        token_budget=budget,
        max_batch=max_batch,
        prefix_cache=prefix_cache,
    )
    chance = random.Random(seed)
    device = Device(queues)
    everyone: list[Sequence] = []
    in_flight: list[tuple[Sequence, int]] = []

    def checked_step() -> int:
        """Launches a step, then reads the step before it back, or this one if none is to run ahead."""
        nonlocal in_flight
        work = schedule(queues, deployment, now_s=1e9)
        check(work)
        tokens = device.run(work)
        before, in_flight = in_flight, list(zip(launch(work), tokens, strict=True))
        if not ahead:
            before, in_flight = in_flight, []
        for sequence, token in before:
            if sequence in queues.running or sequence in queues.waiting:
                read_back(queues, [sequence], token)
        return len(work) + len(before)

    def check(work: list[Work]) -> None:
        assert len(queues.running) <= max_batch
        assert sorted(s.row for s in everyone if s.row >= 0) == sorted({s.row for s in queues.running})
        assert len({share.sequence.request_id for share in work}) == len(work)
        assert all(len(share.sequence.tokens) < share.sequence.limit for share in work)
        if batching == "continuous" and chunked:
            assert sum(share.tokens for share in work) <= budget
        held = [block for sequence in everyone for block in sequence.blocks]
        assert len(set(held)) == queues.blocks.used
        assert prefix_cache or len(set(held)) == len(held)
        arrivals = [s.request_id for s in queues.running] + [s.request_id for s in queues.waiting]
        assert arrivals == sorted(arrivals), "order of arrival is kept, whoever was preempted"

    cancelled = set()
    prompts = []
    for kind in chance.choices("asc", (8, 10, 1), k=length):
        if kind == "a":
            everyone.append(arrive(queues, len(everyone), prompt=chance.randint(1, 20), answer=chance.randint(1, 12)))
            parting = chance.choice((4, 8, 14, 20))
            everyone[-1].tokens[:] = [int(place >= parting) for place in range(everyone[-1].prompt_len)]
            prompts.append(list(everyone[-1].tokens))
        elif kind == "s":
            checked_step()
        elif alive := [*queues.running, *queues.waiting]:
            victim = chance.choice(alive)
            cancelled.add(victim)
            queues.leave(victim)
    for _ in range(20 * 30 * max(1, len(everyone))):
        if not (queues.running or queues.waiting):
            break
        assert checked_step() > 0, "someone waits, but nothing runs"
    assert not queues.running and not queues.waiting
    assert queues.blocks.used == 0
    for sequence, prompt in zip(everyone, prompts, strict=True):
        assert sequence in cancelled or sequence.tokens[: sequence.limit] == alone(prompt, sequence.limit)
