"""Admission with a prefix cache, and what the runner is told by rows; the policies' tests cover the rest."""

from __future__ import annotations

from labkit.batcher.queues import Queues
from labkit.request import SamplingParams
from labkit.runner.blocks import BlockManager
from labkit.runner.sequence import PLACEHOLDER, Sequence


def make(blocks: int = 20, max_batch: int = 8, prefix_cache: bool = True) -> Queues:
    return Queues(BlockManager(blocks), 4, max_batch, prefix_cache)


def arrive(queues: Queues, tokens: list[int], limit: int = 100) -> Sequence:
    sequence = Sequence(len(queues.waiting), tokens, len(tokens), limit, SamplingParams(), 0, 0.0)
    queues.waiting.append(sequence)
    return sequence


def compute(queues: Queues, sequence: Sequence, tokens: int) -> None:
    sequence.computed += tokens
    queues.prompts = [sequence]
    queues.remember_prompts()


def test_a_prompt_that_begins_like_another_is_computed_from_where_they_part() -> None:
    queues = make()
    prompt = list(range(10))
    first = arrive(queues, list(prompt))
    assert queues.admit() is first and first.computed == 0
    compute(queues, first, 6)
    second, third, fourth = (
        arrive(queues, list(prompt)),
        arrive(queues, [*prompt[:8]]),
        arrive(queues, [9, *prompt[1:]]),
    )
    assert queues.admit() is second
    assert (second.computed, second.pending, second.blocks[:1]) == (4, 6, first.blocks[:1]), "6 tokens fill one block"
    compute(queues, first, 4)
    assert queues.admit() is third
    assert (third.computed, third.blocks[:1]) == (4, first.blocks[:1]), "one token at least is left to compute"
    assert third.blocks[1] not in first.blocks + second.blocks
    assert queues.admit() is fourth and fourth.computed == 0
    assert queues.cached_tokens == 8
    assert queues.blocks.used == 3 + 2 + 1 + 3
    for sequence in (first, second, third, fourth):
        queues.leave(sequence)
    assert queues.blocks.used == 0
    again = arrive(queues, list(prompt))
    assert queues.admit() is again and again.computed == 8, "what nobody holds is kept"


def test_without_a_prefix_cache_nothing_is_shared() -> None:
    queues = make(prefix_cache=False)
    first, second = arrive(queues, list(range(10))), arrive(queues, list(range(10)))
    assert queues.admit() is first
    compute(queues, first, 10)
    assert queues.admit() is second
    assert second.computed == queues.cached_tokens == 0 and not set(first.blocks) & set(second.blocks)


def test_a_preempted_sequence_takes_up_where_its_blocks_have_survived() -> None:
    queues = make(blocks=5)
    old, new = arrive(queues, list(range(7)), limit=16), arrive(queues, list(range(20, 27)), limit=16)
    assert queues.admit() is old and queues.admit() is new
    for sequence in (old, new):
        compute(queues, sequence, 7)
        sequence.tokens += [7, 8]
    new.computed = 8
    assert queues.grow(old) and not queues.grow(new)
    assert (new.computed, new.row, new.blocks, queues.preemptions) == (0, -1, [], 1)
    assert not queues.grow(new) and queues.preemptions == 1
    queues.leave(old)
    assert queues.admit() is new
    assert new.computed == 8, "both its blocks, of which it had filled one with its answer"


def test_tokens_that_are_not_known_are_not_found() -> None:
    queues = make()
    sequence = arrive(queues, [1, 2, 3])
    queues.admit()
    sequence.tokens += [4, 5, 6, 7, PLACEHOLDER, PLACEHOLDER]
    assert queues.grow(sequence)
    sequence.computed = 8
    queues.leave(sequence)
    other = arrive(queues, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert queues.admit() is other and other.computed == 4


def test_who_does_not_fit_waits_and_holds_nothing() -> None:
    queues = make(blocks=6)
    first = arrive(queues, list(range(12)))
    queues.admit()
    compute(queues, first, 12)
    arrive(queues, [*range(8), *range(12)])
    assert queues.blocks.free == 3 and queues.admit() is None, (
        "two blocks are known, three more and a spare are not free"
    )
    assert queues.blocks.used == 3
    queues.leave(first)
    second = queues.admit()
    assert second and queues.blocks.used == 5
    queues.leave(second)
    assert queues.blocks.used == 0


def test_rows_are_given_back_and_blocks_are_copied_anew() -> None:
    queues = make(max_batch=2, prefix_cache=False)
    first, second, third = (arrive(queues, [1, 2]) for _ in range(3))
    assert queues.admit() and queues.admit() and not queues.admit()
    assert {first.row, second.row} == {0, 1}
    first.copied, third.copied = 1, 5
    freed = first.row
    queues.leave(first)
    assert first.row == -1 and queues.admit() is third
    assert (third.row, third.copied) == (freed, 0)
    queues.leave(second)
    queues.leave(third)
    assert arrive(queues, [1]) and queues.admit() and queues.blocks.used == 1
