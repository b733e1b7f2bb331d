"""CUDA graphs of whole steps: one launch for a step's hundreds of kernels, for sizes on a dense grid."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from labkit.runner.inputs import Size

CHUNKS = 16
"""Most prompts in a graph that prefills; a step with more is launched kernel by kernel."""
CHUNK_TOKENS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
"""Prefill tokens of the graphs that prefill; with more a GPU is busy for longer than launching takes."""
MIXED_DECODES = (0, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def decode_sizes(most: int) -> list[int]:
    """Batch sizes of the decode graphs, rising to ``most``: the padding stays below an eighth, or below eight rows."""
    dense = [1, 2, 3, 4, 6, *range(8, 256, 8), *range(256, 512, 16), *range(512, most, 32)]
    return [*(size for size in dense if size < most), most]


def mixed_sizes(max_batch: int, token_budget: int) -> list[Size]:
    """Sizes of the graphs that prefill, alone or beside decodes."""
    decodes = [each for each in MIXED_DECODES if each <= max_batch]
    tokens = [each for each in CHUNK_TOKENS if each <= token_budget]
    return [Size(rows, CHUNKS, chunk) for rows in decodes for chunk in tokens]


class GraphPool:
    """Graphs of steps by size. A step runs in the smallest that holds it."""

    def __init__(self, sizes: Sequence[Size]) -> None:
        """``sizes``: every pairing of the decodes and the chunk tokens among those that have chunks must be there."""
        # The largest is captured first, so that the smaller ones find room in its memory.
        self.sizes = sorted(sizes, key=lambda size: size.tokens, reverse=True)
        self._decodes = sorted(size.decodes for size in sizes if not size.chunks)
        self._mixed_decodes = sorted({size.decodes for size in sizes if size.chunks})
        self._chunk_tokens = sorted({size.chunk_tokens for size in sizes if size.chunks})
        self._graphs: dict[Size, torch.cuda.CUDAGraph] = {}
        self._outputs: dict[Size, tuple[Tensor, Tensor]] = {}
        self._memory: Any = None

    def fit(self, size: Size) -> Size | None:
        """The size of the pool that ``size`` is padded to; None if it is larger than all."""
        if not size.chunks:
            decodes = _at_least(self._decodes, size.decodes)
            return None if decodes is None else Size(decodes)
        decodes = _at_least(self._mixed_decodes, size.decodes)
        tokens = _at_least(self._chunk_tokens, size.chunk_tokens)
        if decodes is None or tokens is None or size.chunks > CHUNKS:
            return None
        return Size(decodes, CHUNKS, tokens)

    def capture(self, size: Size, forward: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Captures ``forward``, which must read from addresses that stay. What it returns takes memory as long as the
        graph is there, so that large results should be in memory that graphs share.

        It is run once before, because Triton compiles at the first call.
        """
        self._memory = self._memory or torch.cuda.graph_pool_handle()
        forward()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            self._outputs[size] = forward()
        self._graphs[size] = graph

    def replay(self, size: Size) -> tuple[Tensor, Tensor]:
        """Runs a captured step; what it returned at capture holds the results."""
        self._graphs[size].replay()
        return self._outputs[size]

    def clear(self) -> None:
        """Frees all that was captured."""
        self._graphs.clear()
        self._outputs.clear()

    def __contains__(self, size: Size | None) -> bool:
        return size in self._graphs


def _at_least(rising: list[int], value: int) -> int | None:
    place = bisect_left(rising, value)
    return rising[place] if place < len(rising) else None
