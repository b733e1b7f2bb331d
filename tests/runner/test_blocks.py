from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.runner.blocks import BlockManager


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
