"""The inputs of one step: built with numpy, sent to the device in one copy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from labkit.kernels.attention import AttentionMetadata
from labkit.runner.sequence import Work


@dataclass(frozen=True)
class StepInputs:
    """What the model needs for one step; all tensors int64 on the device."""

    token_ids: Tensor
    """[tokens]"""
    positions: Tensor
    """[tokens]"""
    sample_rows: Tensor
    """[samples]: where in the token stream the sampled positions are, in the order of the work."""
    attention: AttentionMetadata


def pack(work: list[Work], block_size: int, device: torch.device) -> StepInputs:
    """``work`` must list shares of one token first and own the blocks that its new tokens go to."""
    starts = [share.sequence.computed for share in work]
    lengths = [share.tokens for share in work]
    contexts = [start + length for start, length in zip(starts, lengths, strict=True)]
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    token_ids: list[int] = []
    for share, start, end in zip(work, starts, contexts, strict=True):
        token_ids += share.sequence.tokens[start:end]
    owner = np.repeat(np.arange(len(work)), lengths)
    positions = np.arange(total) - (ends - lengths)[owner] + np.asarray(starts)[owner]
    tables = _block_tables(work)
    slots = tables[owner, positions // block_size] * block_size + positions % block_size
    sample_rows = [int(end) - 1 for share, end in zip(work, ends, strict=True) if share.samples]
    parts = (
        np.asarray(token_ids),
        positions,
        slots,
        np.asarray(sample_rows, np.int64),
        np.asarray(contexts),
        tables.ravel(),
    )
    sent = torch.from_numpy(np.concatenate(parts)).to(device, non_blocking=True)
    ids, places, slot, rows, context, table = sent.split([len(part) for part in parts])
    meta = AttentionMetadata(lengths, contexts, context, table.view(tables.shape), slot)
    return StepInputs(ids, places, rows, meta)


def _block_tables(work: list[Work]) -> np.ndarray:
    """[sequences, widest] int64, padded with block 0."""
    tables = np.zeros((len(work), max(len(share.sequence.blocks) for share in work)), np.int64)
    for row, share in zip(tables, work, strict=True):
        row[: len(share.sequence.blocks)] = share.sequence.blocks
    return tables
