"""The index of prefixes against a plain dictionary from all tokens up to a block's end to the blocks that hold them."""

from __future__ import annotations

import sys
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.runner.prefix import Prefix, PrefixIndex

SIZE = 2
ALIKE = (0, sys.hash_info.modulus)
"""Two tokens with one hash, so that all blocks of them have one too."""
SEQUENCES = st.lists(st.lists(st.sampled_from(ALIKE), min_size=SIZE, max_size=9), min_size=1, max_size=12)


def add(index: PrefixIndex, block: int, tokens: list[int]) -> list[int]:
    blocks = list(range(block, block + len(tokens) // SIZE))
    index.add(blocks, tokens, SIZE)
    return blocks


@pytest.fixture(scope="module", autouse=True)
def all_hashes_collide():  # type: ignore[no-untyped-def]
    assert len({hash((a, b)) for a in ALIKE for b in ALIKE}) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prefix, "__hash__", lambda _: 7)
        yield


@settings(max_examples=200)
@given(sequences=SEQUENCES, asked=SEQUENCES, forgotten=st.lists(st.integers(0, 47), max_size=30))
def test_what_is_found_holds_the_very_tokens(
    sequences: list[list[int]], asked: list[list[int]], forgotten: list[int]
) -> None:
    index, holders = PrefixIndex(48), defaultdict(set)
    block = 0
    for tokens in sequences:
        for place, each in enumerate(add(index, block, tokens)):
            holders[tuple(tokens[: (place + 1) * SIZE])].add(each)
            block = each + 1
    for each in dict.fromkeys(number for number in forgotten if number < block):
        index.forget(each)
        assert index.home(each) is None
        for blocks in holders.values():
            blocks.discard(each)
    for tokens in sequences + asked:
        found = index.find(tokens, SIZE)
        assert len(found) * SIZE < len(tokens), "something is left to compute"
        for place, each in enumerate(found):
            assert each in holders[tuple(tokens[: (place + 1) * SIZE])]
        following = tuple(tokens[: (len(found) + 1) * SIZE])
        if not forgotten and len(following) < len(tokens):
            assert not holders[following], "the longest is found"


def test_a_known_beginning_costs_nothing_and_new_blocks_continue_it() -> None:
    index = PrefixIndex(9)
    index.add([4], [1, 2, 3], SIZE)
    index.add([4, 7], [1, 2, 3, 4], SIZE)
    index.add([4, 7], [1, 2, 3, 4], SIZE)
    assert index.find([1, 2, 3, 4, 5], SIZE) == [4, 7]
    assert index.find([1, 2, 3, 4], SIZE) == [4], "the last token has to be computed"
    assert index.find([9, 2, 3, 4, 5], SIZE) == []
    assert [index.home(block) for block in (4, 7, 0)] == [4, 7, None]


def test_a_copy_takes_the_place_of_what_is_forgotten() -> None:
    index = PrefixIndex(9)
    index.add([0, 1], [1, 2, 3, 4], SIZE)
    index.add([2, 3, 4], [1, 2, 3, 4, 5, 6], SIZE)
    assert (index.home(2), index.home(3), index.home(4)) == (0, 1, 4)
    index.forget(0)
    index.forget(3)
    assert index.find([1, 2, 3, 4, 5, 6, 7], SIZE) == [2, 1, 4]


def test_what_continues_a_forgotten_prefix_is_not_found_even_if_it_comes_back() -> None:
    index = PrefixIndex(9)
    index.add([0, 1], [1, 2, 3, 4], SIZE)
    index.forget(0)
    assert index.find([1, 2, 3, 4, 5], SIZE) == []
    index.add([5], [1, 2], SIZE)
    assert index.find([1, 2, 3, 4, 5], SIZE) == [5]
