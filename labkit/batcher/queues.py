"""The two queues that every batching policy works on: who waits, and who runs and owns KV blocks."""

from __future__ import annotations

from collections import deque

from labkit.runner.blocks import BlockManager
from labkit.runner.sequence import Sequence


class Queues:
    """Waiting and running sequences, each in order of arrival; everyone who runs arrived before everyone who waits."""

    def __init__(self, blocks: BlockManager, block_size: int, max_batch: int) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.blocks = blocks
        self.block_size = block_size
        self.max_batch = max_batch
        self.preemptions = 0

    def admit(self) -> Sequence | None:
        """Moves the first who waits to those who run, with blocks for all its tokens; None if it has to wait on."""
        if not self.waiting or len(self.running) >= self.max_batch:
            return None
        sequence = self.waiting[0]
        need = self._blocks_for(len(sequence.tokens))
        # Each of the running may want a block soon; taking the last ones now would only get someone preempted.
        if need + len(self.running) > self.blocks.free:
            return None
        sequence.blocks = self.blocks.take(need)
        self.running.append(self.waiting.popleft())
        return sequence

    def grow(self, sequence: Sequence) -> bool:
        """Gives a running sequence blocks for all its tokens, taking them from the latest arrivals where none is free.

        False if the sequence itself was the latest and had to go back to waiting.
        """
        while (lacking := self._blocks_for(len(sequence.tokens)) - len(sequence.blocks)) > self.blocks.free:
            latest = self.running[-1]
            self._preempt(latest)
            if latest is sequence:
                return False
        if lacking > 0:
            sequence.blocks += self.blocks.take(lacking)
        return True

    def leave(self, sequence: Sequence) -> None:
        """Takes a sequence out of whichever queue it is in; its blocks are free at once."""
        if sequence.blocks:
            self._release(sequence)
        (self.running if sequence in self.running else self.waiting).remove(sequence)

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of that many tokens could ever be held, were it alone."""
        return self._blocks_for(tokens) <= self.blocks.total

    def _preempt(self, sequence: Sequence) -> None:
        # Recomputing is cheaper than it looks (one prefill), and the tokens generated so far are kept.
        self._release(sequence)
        sequence.computed = 0
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks)
        sequence.blocks = []

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)
