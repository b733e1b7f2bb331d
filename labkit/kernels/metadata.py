"""Where the sequences of a step lie in the token stream and in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class AttentionMetadata:
    """Sequences with one new token come first, in the order of the token stream.

    The host's lists serve loops and grids on the CPU. A captured CUDA graph sees the tensors alone, padded to the
    graph's size: padded rows have context 0, slot -1 and no tokens.
    """

    query_lens: list[int]
    """New tokens of each sequence in this step."""
    context_lens: list[int]
    """Tokens of each sequence in the cache once this step's are written."""
    contexts: Tensor
    """[sequences] int32: the same, on the device."""
    query_starts: Tensor
    """[sequences + 1] int32: where each sequence's new tokens begin in the stream; the last is where they end."""
    block_tables: Tensor
    """[sequences, widest] int32: the cache blocks of each sequence; entries past its context are any valid block."""
    slots: Tensor
    """[tokens] int64: where each new token's key and value go, block * block_size + offset; -1 for padding."""
    decodes: int
    """How many sequences, all at the front, have a single new token that is attended to by the decode kernel."""
    triton: bool = True
    """Whether CUDA attends with this project's kernels; if not, with PyTorch's."""
    plans: dict[int, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What is worked out in one layer and serves all: by the size of the cache's blocks."""
