"""Who holds which KV block, and which blocks are kept for what they hold."""

from __future__ import annotations

from collections import OrderedDict

from labkit.runner.prefix import PrefixIndex


class BlockManager:
    """Hands out KV blocks by number, and counts who holds each.

    A block is taken by one sequence, and may be shared by others that begin with the same tokens once it is full and
    committed. A committed block that nobody holds keeps what is in it until its room is needed, the longest unused
    first: it is free, and can still be found.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._holders = [0] * total
        self._empty = list(range(total - 1, -1, -1))
        self._unused: OrderedDict[int, None] = OrderedDict()
        self._index = PrefixIndex(total)

    @property
    def free(self) -> int:
        return len(self._empty) + len(self._unused)

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self.total - self.free

    def take(self, count: int) -> list[int]:
        """``count`` blocks, the caller's until released. Raises ValueError if fewer are free; then none is taken."""
        if count > self.free:
            raise ValueError(f"{count} KV blocks wanted, {self.free} free")
        while len(self._empty) < count:
            block, _ = self._unused.popitem(last=False)
            self._index.forget(block)
            self._empty.append(block)
        taken = []
        for _ in range(count):
            block = self._empty.pop()
            self._holders[block] = 1
            taken.append(block)
        return taken

    def match(self, tokens: list[int], block_size: int) -> list[int]:
        """Blocks that hold the beginning of ``tokens``, as much of it as is known; the caller's too until released.

        At least one token is left to compute. What is in the blocks must not be overwritten.
        """
        found = self._index.find(tokens, block_size)
        for block in found:
            if self._holders[block] == 0:
                del self._unused[block]
            self._holders[block] += 1
        return found

    def commit(self, blocks: list[int], tokens: list[int], block_size: int) -> None:
        """Lets others find the blocks at a sequence's beginning, all of them full.

        Their tokens must be known, and computed by steps that the device runs before any step yet to come. The cost is
        that of the blocks not committed before.
        """
        self._index.add(blocks, tokens, block_size)

    def release(self, blocks: list[int]) -> None:
        """Takes back all blocks of a sequence, in the order of its tokens.

        Raises ValueError for one that nobody holds, before any is released.
        """
        if len(set(blocks)) != len(blocks) or not all(0 <= b < self.total and self._holders[b] for b in blocks):
            raise ValueError(f"released KV blocks that nobody holds: {blocks}")
        # The last first, so that a beginning, which more sequences share, is evicted after what continues it.
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._retire(block)

    def _retire(self, block: int) -> None:
        home = self._index.home(block)
        if home == block:
            self._unused[block] = None
            return
        if home is not None:
            self._index.forget(block)
            if home in self._unused:
                self._unused.move_to_end(home)
        self._empty.append(block)
