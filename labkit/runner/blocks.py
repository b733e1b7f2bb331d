"""Who owns which KV block."""

from __future__ import annotations


class BlockManager:
    """Hands out KV blocks by number, each to one owner at a time."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._in_use = bytearray(total)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def take(self, count: int) -> list[int]:
        """``count`` blocks, the caller's until released. Raises ValueError if fewer are free; then none is taken."""
        if count > len(self._free):
            raise ValueError(f"{count} KV blocks wanted, {len(self._free)} free")
        if count == 0:
            return []
        taken = self._free[: -count - 1 : -1]
        del self._free[-count:]
        for block in taken:
            self._in_use[block] = 1
        return taken

    def release(self, blocks: list[int]) -> None:
        """Takes blocks back. Raises ValueError for one that nobody holds, before any is released."""
        if len(set(blocks)) != len(blocks) or not all(0 <= b < self.total and self._in_use[b] for b in blocks):
            raise ValueError(f"released KV blocks that nobody holds: {blocks}")
        for block in blocks:
            self._in_use[block] = 0
        self._free.extend(reversed(blocks))
