"""Which KV block holds which tokens, so that the beginning of a sequence is found again once it has been computed."""

from __future__ import annotations

from dataclasses import dataclass, field

Key = tuple["Prefix | None", tuple[int, ...]]


@dataclass(eq=False, slots=True)
class Prefix:
    """The tokens from a sequence's start to the end of one of its blocks.

    Two prefixes are the same only if they are one object. Being part of the keys of those that continue it, it cannot
    be confused with another, not even after it was forgotten.
    """

    key: Key
    """The prefix that ends where the block begins, and the block's own tokens."""
    block: int
    """Where the keys and values of the last tokens are."""
    copies: list[int] = field(default_factory=list)
    """Other blocks that hold the same: sequences which ran side by side computed it twice."""


class PrefixIndex:
    """Finds full blocks by their tokens and all tokens before them.

    A hit is never wrong: hashes only say where to look, the dictionary then compares the tokens themselves and the
    identity of the prefix before them.
    """

    def __init__(self, total: int) -> None:
        self._known: dict[Key, Prefix] = {}
        self._held: list[Prefix | None] = [None] * total

    def find(self, tokens: list[int], block_size: int) -> list[int]:
        """The blocks of the longest known prefix of ``tokens`` that leaves at least one token to compute."""
        found: list[int] = []
        prefix = None
        for start in range(0, len(tokens) - block_size, block_size):
            prefix = self._known.get((prefix, tuple(tokens[start : start + block_size])))
            if prefix is None:
                break
            found.append(prefix.block)
        return found

    def add(self, blocks: list[int], tokens: list[int], block_size: int) -> None:
        """Makes a sequence's first blocks findable, as many as are given. Those that are known already cost nothing."""
        first = len(blocks)
        while first and self._held[blocks[first - 1]] is None:
            first -= 1
        before = self._held[blocks[first - 1]] if first else None
        for index in range(first, len(blocks)):
            block, start = blocks[index], index * block_size
            key = (before, tuple(tokens[start : start + block_size]))
            prefix = self._known.get(key)
            if prefix is None:
                prefix = self._known[key] = Prefix(key, block)
            else:
                prefix.copies.append(block)
            self._held[block] = before = prefix

    def home(self, block: int) -> int | None:
        """The block in which the tokens of ``block`` are found, itself or another; None if they are not."""
        prefix = self._held[block]
        return prefix.block if prefix else None

    def forget(self, block: int) -> None:
        """Takes a findable block out; its tokens stay findable where a copy of it is."""
        prefix = self._held[block]
        assert prefix is not None
        self._held[block] = None
        if block != prefix.block:
            prefix.copies.remove(block)
        elif prefix.copies:
            prefix.block = prefix.copies.pop()
        else:
            del self._known[prefix.key]
