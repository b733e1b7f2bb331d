"""The inputs of one step: built with numpy, sent to the device in one copy, taken apart there without copying."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from labkit.kernels.metadata import AttentionMetadata
from labkit.kernels.sampling import COLDEST
from labkit.runner.sampling import uniform
from labkit.runner.sequence import PLACEHOLDER, Sequence, Work

ALIGNMENT = 16
"""Bytes to which every part of the packed inputs is aligned, as wide loads on a GPU want it."""

MOST_INT32 = 2**31 - 1

SAMPLING_TYPES = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "uniforms": np.float64,
}
"""The parts of ``StepInputs`` that say how to sample."""


class Size(NamedTuple):
    """What a step is made of, padding included: sequences with one new token, then chunks and their tokens."""

    decodes: int
    chunks: int = 0
    chunk_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.decodes + self.chunk_tokens

    @property
    def sequences(self) -> int:
        return self.decodes + self.chunks


def size_of(work: list[Work]) -> Size:
    """The size without padding of work that lists shares of one token first."""
    decodes = sum(1 for share in work if share.tokens == 1)
    return Size(decodes, len(work) - decodes, sum(share.tokens for share in work[decodes:]))


def places_of(work: list[Work], size: Size) -> list[int]:
    """Where each share's sequence is among those of a step padded to ``size``."""
    decodes = size_of(work).decodes
    return [*range(decodes), *range(size.decodes, size.decodes + len(work) - decodes)]


@dataclass(frozen=True)
class StepInputs:
    """What the model needs for one step, on the device."""

    token_ids: Tensor
    """[tokens] int64; ``-1 - row`` stands for the token last sampled for the sequence at that row of the tables."""
    positions: Tensor
    """[tokens] int64"""
    slots: Tensor
    """[tokens] int64: where keys and values go, block * block_size + offset; -1 for padding."""
    rows: Tensor
    """[sequences] int64: each sequence's row in the tables."""
    contexts: Tensor
    """[sequences] int32"""
    query_starts: Tensor
    """[sequences + 1] int32"""
    ends: Tensor
    """[sequences] int64: where in the token stream each sequence's last new token is."""
    temperature: Tensor
    """[sequences] float32; this and the four that follow are empty where every sequence takes its likeliest token."""
    top_k: Tensor
    """[sequences] int32"""
    top_p: Tensor
    """[sequences] float32"""
    min_p: Tensor
    """[sequences] float32"""
    uniforms: Tensor
    """[sequences] float64: a random number in [0, 1) for each."""
    new_places: Tensor
    """[new blocks] int64: where in the flattened block tables blocks were added."""
    new_blocks: Tensor
    """[new blocks] int32: which."""


class BlockTables:
    """The KV blocks of every running sequence, a row each, on the host and on the device.

    Only blocks that were added since the last step travel. The last row belongs to nobody: padding points there.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.host = np.zeros((rows + 1, width), np.int32)
        self.device = torch.zeros((rows + 1, width), dtype=torch.int32, device=device)
        self.nobody = rows

    def take_new(self, sequences: list[Sequence]) -> tuple[list[int], list[int]]:
        """Copies blocks that the tables lack to the host's side; returns their places and numbers for the device's."""
        places: list[int] = []
        numbers: list[int] = []
        width = self.host.shape[1]
        for sequence in sequences:
            have, need = sequence.copied, len(sequence.blocks)
            if have < need:
                added = sequence.blocks[have:]
                self.host[sequence.row, have:need] = added
                places += range(sequence.row * width + have, sequence.row * width + need)
                numbers += added
                sequence.copied = need
        return places, numbers


def arrays(work: list[Work], size: Size, tables: BlockTables, block_size: int) -> dict[str, np.ndarray]:
    """The parts of ``StepInputs`` on the host, padded to ``size``. ``work`` must list shares of one token first."""
    sequences = [share.sequence for share in work]
    places, numbers = tables.take_new(sequences)
    decodes = size_of(work).decodes
    ids = np.zeros(size.tokens, np.int64)
    positions = np.zeros(size.tokens, np.int64)
    rows = np.full(size.sequences, tables.nobody, np.int64)
    contexts = np.zeros(size.sequences, np.int32)
    starts = np.full(size.sequences + 1, size.decodes, np.int32)
    owners = np.full(size.tokens, tables.nobody, np.int64)

    ids[:decodes] = [_next_token(sequence) for sequence in sequences[:decodes]]
    positions[:decodes] = [sequence.computed for sequence in sequences[:decodes]]
    rows[:decodes] = owners[:decodes] = [sequence.row for sequence in sequences[:decodes]]
    contexts[:decodes] = positions[:decodes] + 1
    starts[: size.decodes] = np.arange(size.decodes)
    at = size.decodes
    for index, share in enumerate(work[decodes:], size.decodes):
        begin, end = share.sequence.computed, share.sequence.computed + share.tokens
        ids[at : at + share.tokens] = share.sequence.tokens[begin:end]
        positions[at : at + share.tokens] = np.arange(begin, end)
        owners[at : at + share.tokens] = rows[index] = share.sequence.row
        contexts[index] = end
        starts[index] = at
        at += share.tokens
    starts[size.decodes + len(work) - decodes :] = at

    slots = tables.host[owners, positions // block_size].astype(np.int64) * block_size + positions % block_size
    slots[owners == tables.nobody] = -1
    return {
        "token_ids": ids,
        "positions": positions,
        "slots": slots,
        "rows": rows,
        "contexts": contexts,
        "query_starts": starts,
        "ends": np.maximum(starts[1:].astype(np.int64) - 1, 0),
        **_sampling_arrays(sequences, places_of(work, size), size),
        "new_places": np.array(places, np.int64),
        "new_blocks": np.array(numbers, np.int32),
    }


def _sampling_arrays(sequences: list[Sequence], places: list[int], size: Size) -> dict[str, np.ndarray]:
    cold = all(sequence.sampling.temperature < COLDEST for sequence in sequences)
    length = 0 if cold else size.sequences
    parts = {name: np.zeros(length, dtype) for name, dtype in SAMPLING_TYPES.items()}
    if not cold:
        sampling = [sequence.sampling for sequence in sequences]
        parts["temperature"][places] = [params.temperature for params in sampling]
        parts["top_k"][places] = [min(params.top_k, MOST_INT32) for params in sampling]
        parts["top_p"][places] = [params.top_p for params in sampling]
        parts["min_p"][places] = [params.min_p for params in sampling]
        parts["uniforms"][places] = [uniform(sequence.seed, len(sequence.tokens)) for sequence in sequences]
    return parts


class Mailbox:
    """Sends the parts of a step to the device in one copy.

    On CUDA two pinned buffers take turns, for the one of the step before may still be on its way. Steps may be launched
    faster than the device gets to them: a buffer is not written before its last copy has left.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        """``capacity``: bytes that the largest step takes, see ``capacity_bytes``."""
        pinned = device.type == "cuda"
        self._hosts = [torch.zeros(capacity, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._arrays = [host.numpy() for host in self._hosts]
        self._device = torch.zeros(capacity, dtype=torch.uint8, device=device) if pinned else None
        self._left = [torch.cuda.Event() for _ in range(2)] if pinned else []
        self._turn = 0

    def send(self, parts: dict[str, np.ndarray]) -> StepInputs:
        """The parts on the device, good until the call after the next."""
        self._turn ^= 1
        if self._device is not None:
            self._left[self._turn].synchronize()
        array, end = self._arrays[self._turn], 0
        for part, begin in zip(parts.values(), _offsets(parts), strict=True):
            end = begin + part.nbytes
            array[begin:end] = part.view(np.uint8)
        if self._device is not None:
            self._device[:end].copy_(self._hosts[self._turn][:end], non_blocking=True)
            self._left[self._turn].record()
        return self.where(parts)

    def where(self, parts: dict[str, np.ndarray]) -> StepInputs:
        """Where ``send`` puts parts of these sizes; on CUDA always at the same address, so that a captured graph finds
        them."""
        memory = self._hosts[self._turn] if self._device is None else self._device
        found = {}
        for (name, part), begin in zip(parts.items(), _offsets(parts), strict=True):
            found[name] = memory[begin : begin + part.nbytes].view(TORCH_TYPES[part.dtype])
        return StepInputs(**found)


def _offsets(parts: dict[str, np.ndarray]) -> list[int]:
    offsets, at = [], 0
    for part in parts.values():
        offsets.append(at)
        at += -(-part.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets


TORCH_TYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


def capacity_bytes(tokens: int, sequences: int, blocks: int) -> int:
    """Bytes of the packed inputs of at most so many tokens and sequences, and ``blocks`` KV blocks that are new."""
    return 24 * tokens + 96 * sequences + 12 * blocks + 32 * ALIGNMENT


def metadata(
    inputs: StepInputs, tables: BlockTables, size: Size, lens: tuple[list[int], list[int]], triton: bool
) -> AttentionMetadata:
    """``lens``: new tokens and context of each sequence, for the host; empty where only the device reads."""
    block_tables = tables.device.index_select(0, inputs.rows)
    return AttentionMetadata(
        *lens, inputs.contexts, inputs.query_starts, block_tables, inputs.slots, size.decodes, triton
    )


def _next_token(sequence: Sequence) -> int:
    token = sequence.tokens[sequence.computed]
    return -1 - sequence.row if token == PLACEHOLDER else token
