"""The two queues that every batching policy works on: who waits, and who runs and owns KV blocks."""

from __future__ import annotations

from collections import deque

from labkit.runner.blocks import BlockManager
from labkit.runner.sequence import PLACEHOLDER, Sequence, Work


class Queues:
    """Waiting and running sequences, each in order of arrival; everyone who runs arrived before everyone who waits.

    Who runs has a row in the runner's tables, below ``max_batch``, and blocks for all its tokens; while it runs, its
    ``blocks`` only ever grow at the end.
    """

    def __init__(self, blocks: BlockManager, block_size: int, max_batch: int, prefix_cache: bool = False) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: dict[Sequence, Work] = {}
        """Each with the share that it has in a step in which it decodes."""
        self.prompts: list[Sequence] = []
        """Those whose prompts the last step was for."""
        self.blocks = blocks
        self.block_size = block_size
        self.max_batch = max_batch
        self.prefix_cache = prefix_cache
        self.preemptions = 0
        self.cached_tokens = 0
        """Tokens that were not computed because the prefix cache had them."""
        self._rows = list(range(max_batch - 1, -1, -1))

    def admit(self) -> Sequence | None:
        """Moves the first who waits to those who run, with blocks for all its tokens; None if it has to wait on.

        What the prefix cache has of it counts as computed.
        """
        if not self.waiting or len(self.running) >= self.max_batch:
            return None
        sequence = self.waiting[0]
        # Preempted while its last token was on the way; where the token was on the device belongs to someone else now.
        if sequence.tokens[-1] == PLACEHOLDER:
            return None
        blocks = self._blocks_within_reach(sequence)
        if blocks is None:
            return None
        self.waiting.popleft()
        sequence.blocks, sequence.copied = blocks, 0
        sequence.row = self._rows.pop()
        self.running[sequence] = Work(sequence, 1)
        return sequence

    def grow(self, sequence: Sequence) -> bool:
        """Gives a running sequence blocks for all its tokens, taking them from the latest arrivals where none is free.

        False if the sequence itself was the latest and had to go back to waiting, or went there before.
        """
        if sequence.row < 0:
            return False
        lacking = self._blocks_for(len(sequence.tokens)) - len(sequence.blocks)
        if lacking <= 0:
            return True
        while lacking > self.blocks.free:
            latest = next(reversed(self.running))
            self._preempt(latest)
            if latest is sequence:
                return False
        sequence.blocks += self.blocks.take(lacking)
        return True

    def leave(self, sequence: Sequence) -> None:
        """Takes a sequence out of whichever queue it is in; its blocks are free at once.

        What it has ``computed`` is kept for others to find. So a step that failed must not be counted there.
        """
        if sequence in self.running:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of that many tokens could ever be held, were it alone."""
        return self._blocks_for(tokens) <= self.blocks.total

    def remember_prompts(self) -> None:
        """Lets others find what the last step has computed of prompts."""
        for sequence in self.prompts:
            if sequence in self.running:
                self._remember(sequence)
        self.prompts = []

    def _remember(self, sequence: Sequence) -> None:
        """Lets others find the blocks that a running sequence has computed in full, and whose tokens are known."""
        if not self.prefix_cache:
            return
        full = sequence.computed // self.block_size
        while full and sequence.tokens[full * self.block_size - 1] == PLACEHOLDER:
            full -= 1
        self.blocks.commit(sequence.blocks[:full], sequence.tokens, self.block_size)

    def _blocks_within_reach(self, sequence: Sequence) -> list[int] | None:
        """Takes blocks for all tokens of one who waits, as many as possible with its tokens in them; None if too few.

        Each of the running may want a block soon; taking the last ones now would only get someone preempted.
        """
        if self.blocks.free <= len(self.running):
            return None
        found = self.blocks.match(sequence.tokens, self.block_size) if self.prefix_cache else []
        need = self._blocks_for(len(sequence.tokens)) - len(found)
        if self.blocks.free < len(self.running) + need:
            self.blocks.release(found)
            return None
        sequence.computed = len(found) * self.block_size
        self.cached_tokens += sequence.computed
        return found + self.blocks.take(need)

    def _preempt(self, sequence: Sequence) -> None:
        # Recomputing is cheaper than it looks (one prefill), and the tokens generated so far are kept.
        self._stop(sequence)
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _stop(self, sequence: Sequence) -> None:
        self._remember(sequence)
        del self.running[sequence]
        self.blocks.release(sequence.blocks)
        sequence.blocks = []
        self._rows.append(sequence.row)
        sequence.row = -1

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)
