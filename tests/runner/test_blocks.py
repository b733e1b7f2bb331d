from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from labkit.runner.blocks import BlockManager

SIZE = 2
TOKEN = st.sampled_from((0, sys.hash_info.modulus))
"""Two tokens with one hash."""


@given(total=st.integers(1, 40), moves=st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=80))
def test_no_block_leaks_or_has_two_owners(total: int, moves: list[tuple[bool, int]]) -> None:
    manager, held = BlockManager(total), []
    for take, size in moves:
        if take and size <= manager.free:
            held.append(manager.take(size))
        elif take:
            with pytest.raises(ValueError, match="wanted"):
                manager.take(size)
        elif held:
            manager.release(held.pop(size % len(held)))
        owned = [block for blocks in held for block in blocks]
        assert len(owned) == len(set(owned)) == manager.used == total - manager.free
        assert set(owned) <= set(range(total))
    for blocks in held:
        manager.release(blocks)
    assert sorted(manager.take(total)) == list(range(total))


@pytest.mark.parametrize("wrong", [[5], [0, 0], [-1], [3, 99]])
def test_releasing_what_is_not_held_is_refused_and_changes_nothing(wrong: list[int]) -> None:
    manager = BlockManager(8)
    assert manager.take(4) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="nobody holds"):
        manager.release(wrong)
    assert manager.used == 4
    manager.release([0, 1, 2, 3])
    with pytest.raises(ValueError, match="nobody holds"):
        manager.release([0])
    assert manager.free == 8


@dataclass(eq=False)
class Holder:
    """A sequence as the test sees it."""

    tokens: list[int]
    blocks: list[int]
    computed: int
    committed: int = 0

    def prefix(self, block: int) -> tuple[int, ...]:
        return tuple(self.tokens[: (block + 1) * SIZE])


class SharedBlocks(RuleBasedStateMachine):
    """Sequences come, compute, commit, grow and go. ``memory`` is what their writes have put into each block.

    Keys and values depend on all tokens before them, so what a block holds is written as all tokens up to its end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(11)
        self.holders: list[Holder] = []
        self.memory: dict[int, tuple[int, ...]] = {}
        self.findable: dict[int, tuple[int, ...]] = {}
        """Blocks committed and not handed out anew since."""

    @rule(tokens=st.lists(TOKEN, min_size=1, max_size=11))
    def admit(self, tokens: list[int]) -> None:
        found = self.manager.match(tokens, SIZE)
        new = Holder(tokens, found, len(found) * SIZE)
        assert new.computed < len(tokens)
        assert all(self.memory[block] == new.prefix(i) for i, block in enumerate(found)), "a wrong hit"
        least = {holder.prefix(i) for holder in self.holders for i in range(holder.committed)}
        assert len(found) >= self.longest(new, least), "what somebody holds is found"
        assert len(found) <= self.longest(new, set(self.findable.values()))
        need = -(-len(tokens) // SIZE) - len(found)
        if need > self.manager.free:
            self.manager.release(found)
        else:
            new.blocks = found + self.take(need)
            self.holders.append(new)

    def longest(self, holder: Holder, known: set[tuple[int, ...]]) -> int:
        count = 0
        while (count + 1) * SIZE < len(holder.tokens) and holder.prefix(count) in known:
            count += 1
        return count

    def take(self, count: int) -> list[int]:
        taken = self.manager.take(count)
        assert not set(taken) & {block for holder in self.holders for block in holder.blocks}
        for block in taken:
            self.findable.pop(block, None)
            self.memory.pop(block, None)
        return taken

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), tokens=st.integers(1, 6))
    def compute(self, data: st.DataObject, tokens: int) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        first = holder.computed // SIZE
        holder.computed = min(len(holder.tokens), holder.computed + tokens)
        for i in range(first, holder.computed // SIZE):
            self.memory[holder.blocks[i]] = holder.prefix(i)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        holder.committed = holder.computed // SIZE
        self.manager.commit(holder.blocks[: holder.committed], holder.tokens, SIZE)
        for i in range(holder.committed):
            self.findable[holder.blocks[i]] = holder.prefix(i)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), token=TOKEN)
    def grow(self, data: st.DataObject, token: int) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        if len(holder.tokens) < len(holder.blocks) * SIZE:
            holder.tokens.append(token)
        elif self.manager.free:
            holder.tokens.append(token)
            holder.blocks += self.take(1)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.holders.remove(holder)
        self.manager.release(holder.blocks)

    @invariant()
    def nobody_is_written_over(self) -> None:
        for holder in self.holders:
            for i in range(holder.computed // SIZE):
                assert self.memory[holder.blocks[i]] == holder.prefix(i)

    @invariant()
    def blocks_in_use_are_those_held(self) -> None:
        held = {block for holder in self.holders for block in holder.blocks}
        assert self.manager.used == len(held) == 11 - self.manager.free

    def teardown(self) -> None:
        for holder in self.holders:
            self.manager.release(holder.blocks)
        assert self.manager.used == 0
        assert sorted(self.manager.take(11)) == list(range(11))


TestSharedBlocks = SharedBlocks.TestCase
TestSharedBlocks.settings = settings(max_examples=150, stateful_step_count=40)


def committed(manager: BlockManager, tokens: list[int]) -> list[int]:
    """The blocks of a sequence that came, computed all of ``tokens``, and is still there."""
    found = manager.match(tokens, SIZE)
    blocks = found + manager.take(len(tokens) // SIZE - len(found))
    manager.commit(blocks, tokens, SIZE)
    return blocks


def test_a_shared_block_is_free_when_the_last_holder_leaves() -> None:
    manager = BlockManager(4)
    first = committed(manager, [1, 2, 3, 4])
    second = manager.match([1, 2, 3, 4, 5], SIZE)
    assert second == first and manager.used == 2
    manager.release(first)
    assert manager.used == 2
    manager.release(second)
    assert (manager.used, manager.free) == (0, 4)
    with pytest.raises(ValueError, match="nobody holds"):
        manager.release(second)
    assert manager.match([1, 2, 3, 4, 5], SIZE) == first, "kept for what they hold"


def test_the_longest_unused_goes_first_and_a_beginning_after_what_continues_it() -> None:
    manager = BlockManager(5)
    old = committed(manager, [1, 2, 3, 4])
    new = committed(manager, [5, 6])
    manager.release(new)
    manager.release(old)
    manager.release(manager.match([5, 6, 0], SIZE))
    empty = manager.take(2)
    assert not set(empty) & set(old + new), "what holds nothing is taken first"
    assert manager.take(3) == [new[0], old[0], old[1]]
    assert manager.match([1, 2, 0], SIZE) == manager.match([5, 6, 0], SIZE) == []


@pytest.mark.parametrize("first_leaves_first", [True, False])
def test_of_what_was_computed_twice_one_copy_is_kept(first_leaves_first: bool) -> None:
    manager = BlockManager(6)
    one, two = manager.take(2), manager.take(2)
    manager.commit(one, [1, 2, 3, 4], SIZE)
    manager.commit(two, [1, 2, 3, 4], SIZE)
    other = committed(manager, [7, 8])
    for blocks in (one, other, two) if first_leaves_first else (two, other, one):
        manager.release(blocks)
    assert manager.used == 0
    taken = manager.take(4)
    assert set(taken) == {*two, *other, 5}, "the copies are empty, and what was used last is kept longest"
    assert manager.match([1, 2, 3, 4, 5], SIZE) == one
