"""Calibration text on its way through a model: the hidden states of all its sequences, from layer to layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.kernels.metadata import AttentionMetadata
from labkit.kernels.rope import RopeTable
from labkit.models.decoder import Layer
from labkit.models.layers import Step
from labkit.models.shape import ModelShape
from labkit.quantizer.watch import Seen

Half = Literal["attention", "mlp"]
HALVES: tuple[Half, Half] = ("attention", "mlp")
BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens that go through a layer together: at 7B their activations take 2 GB."""
_BLOCK = 16
_DEVICE_SHARE = 0.25
"""Of the GPU's free memory that the hidden states may take; where they would take more, they stay on the host."""


@dataclass
class Batch:
    """Some of the sequences, and what the layers so far made of them."""

    step: Step
    blocks: int
    """Of the cache of keys and values."""
    x: Tensor
    """[tokens, hidden]: what is yet to be added to ``residual``."""
    residual: Tensor | None = None
    """None before the first layer."""


class Stream:
    """All sequences, in batches. One half of a layer after the other is to be given to ``advance``."""

    def __init__(
        self,
        sequences: list[Tensor],
        embedding: Tensor,
        shape: ModelShape,
        device: torch.device,
        dtype: torch.dtype,
        batch_tokens: int | None = None,
    ) -> None:
        """sequences: [length] int64 each, of at least 2 tokens. embedding: [vocab, hidden], anywhere.

        Layers compute on ``device`` in ``dtype``.
        """
        self._shape, self._device, self._dtype = shape, device, dtype
        table = RopeTable.build(shape.rope, shape.rotary_dim, shape.max_positions, device).cos_sin
        tokens = sum(len(sequence) for sequence in sequences)
        self._home = _home(device, 2 * tokens * shape.hidden_size * dtype.itemsize)
        self._batches = []
        for part in _batches(sequences, batch_tokens or BATCH_TOKENS[device.type]):
            step, blocks = _step([len(sequence) for sequence in part], table)
            x = F.embedding(torch.cat(part).to(embedding.device), embedding)
            self._batches.append(Batch(step, blocks, x.to(self._home, dtype)))

    def __len__(self) -> int:
        """Batches, each a pass through a layer."""
        return len(self._batches)

    def look(self, layer: Layer, half: Half, passed: Callable[[], None] = lambda: None) -> None:
        """Runs all batches through half of a layer, which is watched, and keeps nothing. ``passed`` is called after
        each."""
        for batch in self._batches:
            try:
                self._through(layer, half, batch)
            except Seen:
                pass
            passed()

    def advance(self, layer: Layer, half: Half) -> None:
        """Runs all batches through half of a layer; what comes out is what goes into the next half."""
        for batch in self._batches:
            x, residual = self._through(layer, half, batch)
            batch.x, batch.residual = x.to(self._home), residual.to(self._home)

    @torch.inference_mode()
    def _through(self, layer: Layer, half: Half, batch: Batch) -> tuple[Tensor, Tensor]:
        if half == "mlp":
            assert batch.residual is not None
            found: tuple[Tensor, Tensor] = layer.mlp(batch.x.to(self._device), batch.residual.to(self._device))
            return found
        shape = self._shape
        size = (shape.cache_planes, shape.cache_heads, batch.blocks, _BLOCK, shape.cache_width)
        cache = torch.zeros(size, dtype=self._dtype, device=self._device)
        residual = None if batch.residual is None else batch.residual.to(self._device)
        found = layer.attention(batch.x.to(self._device), residual, cache, batch.step)
        return found


def _home(device: torch.device, wanted: int) -> torch.device:
    if device.type == "cuda" and wanted > _DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return torch.device("cpu")
    return device


def _batches(sequences: list[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Sequences in their order, together as long as they have ``most`` tokens at most."""
    part: list[Tensor] = []
    for sequence in sequences:
        if part and sum(map(len, part)) + len(sequence) > most:
            yield part
            part = []
        part.append(sequence)
    if part:
        yield part


def _step(lengths: list[int], table: Tensor) -> tuple[Step, int]:
    """What layers need to know of a batch whose sequences all begin at their first token, and the blocks it takes."""
    device = table.device
    needed = [-(-length // _BLOCK) for length in lengths]
    tables = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
    slots, first = [], 0
    for row, (length, blocks) in enumerate(zip(lengths, needed, strict=True)):
        tables[row, :blocks] = torch.arange(first, first + blocks)
        slots.append(torch.arange(length) + first * _BLOCK)
        first += blocks
    meta = AttentionMetadata(
        query_lens=lengths,
        context_lens=lengths,
        contexts=torch.tensor(lengths, dtype=torch.int32, device=device),
        query_starts=torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32),
        block_tables=tables.to(device),
        slots=torch.cat(slots).to(device),
        decodes=0,
    )
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    return Step(positions, table, meta), first
