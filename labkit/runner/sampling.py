"""What goes into sampling and what comes with a token: random numbers, and log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from labkit.request import SamplingParams, TokenLogprob

_MASK = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """A multiple of 2**-53 in [0, 1) that looks random and depends on its arguments only (SplitMix64, twice)."""
    return (_mix(_mix(seed) ^ position) >> 11) / 2**53


class Logprobs(NamedTuple):
    """Log-probabilities that some rows ask for, still on the device."""

    rows: list[int]
    chosen: Tensor
    """[rows asked] float32: that of each row's token."""
    values: Tensor
    """[rows asked, widest] float32: those of the likeliest tokens, falling."""
    ids: Tensor
    """[rows asked, widest] int64: which tokens these are."""


def gather_logprobs(logits: Tensor, tokens: Tensor, sampling: Mapping[int, SamplingParams]) -> Logprobs | None:
    """What the ``logprobs`` of some rows ask for; None where none asks. logits: [rows, vocab], tokens: [rows]."""
    asked = [row for row, params in sampling.items() if params.logprobs is not None]
    if not asked:
        return None
    rows = torch.tensor(asked, device=logits.device)
    logprobs = logits[rows].float().log_softmax(-1)
    widest = min(max(sampling[row].logprobs or 0 for row in asked), logits.shape[-1])
    values, ids = logprobs.topk(widest, -1)
    return Logprobs(asked, logprobs.gather(-1, tokens[rows][:, None])[:, 0], values, ids)


def read_logprobs(
    found: Logprobs | None, tokens: Sequence[int], sampling: Mapping[int, SamplingParams]
) -> dict[int, TokenLogprob]:
    """The log-probabilities of rows that asked for them, on the host. Waits for the device."""
    read: dict[int, TokenLogprob] = {}
    if found is None:
        return read
    chosen, values, ids = found.chosen.tolist(), found.values.tolist(), found.ids.tolist()
    for i, row in enumerate(found.rows):
        count = sampling[row].logprobs or 0
        top = tuple(zip(ids[i][:count], values[i][:count], strict=True))
        read[row] = TokenLogprob(tokens[row], chosen[i], top)
    return read


def token_logprobs(logits: Tensor, tokens: Tensor, sampling: Sequence[SamplingParams]) -> list[TokenLogprob | None]:
    """``gather_logprobs`` and ``read_logprobs`` at once, for all rows; None for those that ask for none."""
    asked = dict(enumerate(sampling))
    read = read_logprobs(gather_logprobs(logits, tokens, asked), tokens.tolist(), asked)
    return [read.get(row) for row in asked]


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
