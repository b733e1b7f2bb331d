"""Choosing the next tokens of a whole batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from labkit.request import SamplingParams, TokenLogprob

COLDEST = 1e-5
"""Below this temperature the likeliest token is taken: dividing by less could overflow float32."""

_MASK = 2**64 - 1


def sample(logits: Tensor, sampling: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """The next token of each row: [rows] int64. logits: [rows, vocab] float32; uniforms: one number in [0, 1) a row.

    A row's token depends on that row alone, so it is the same in any batch.
    """
    tokens = logits.argmax(-1)
    drawn = [row for row, params in enumerate(sampling) if params.temperature >= COLDEST]
    if not drawn:
        return tokens
    rows = torch.tensor(drawn, device=logits.device)
    scores = filtered_scores(logits[rows], [sampling[row] for row in drawn])
    # Inverse of the cumulative distribution: one random number a row. In float64 the largest one, 1 - 2**-53, times the
    # total stays below the total, so that the search never runs past the last token that may be drawn.
    cumulative = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
    total = cumulative[:, -1:]
    point = torch.tensor([uniforms[row] for row in drawn], dtype=torch.float64, device=logits.device)[:, None] * total
    tokens[rows] = torch.searchsorted(cumulative, point, right=True)[:, 0]
    return tokens


def filtered_scores(logits: Tensor, sampling: Sequence[SamplingParams]) -> Tensor:
    """logits / temperature, with what top-k, top-p and min-p exclude at -inf. Both [rows, vocab]; tokens tied with the
    last one kept are kept too."""
    column = lambda values: torch.tensor(values, dtype=logits.dtype, device=logits.device)[:, None]  # noqa: E731
    scores = logits / column([params.temperature for params in sampling])
    lowest = torch.full_like(scores[:, :1], float("-inf"))
    vocab = scores.shape[-1]
    top_k = [params.top_k if 0 < params.top_k < vocab else vocab for params in sampling]
    top_p = [params.top_p for params in sampling]
    if min(top_k) < vocab or min(top_p) < 1:
        ordered = scores.sort(-1, descending=True).values
        lowest = ordered.gather(-1, torch.tensor(top_k, device=logits.device)[:, None] - 1)
        if min(top_p) < 1:
            likely = ordered.masked_fill(ordered < lowest, float("-inf")).softmax(-1)
            # A token is kept while those before it have not reached top_p; the first always is.
            kept = (likely.cumsum(-1) - likely < column(top_p)).sum(-1, keepdim=True).clamp_(min=1)
            nucleus = ordered.gather(-1, kept - 1)
            lowest = torch.maximum(lowest, torch.where(column(top_p) < 1, nucleus, float("-inf")))
    min_p = [params.min_p for params in sampling]
    if max(min_p) > 0:
        lowest = torch.maximum(lowest, scores.amax(-1, keepdim=True) + column(min_p).log())
    return scores.masked_fill(scores < lowest, float("-inf"))


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


def gather_logprobs(logits: Tensor, tokens: Tensor, sampling: Sequence[SamplingParams]) -> Logprobs | None:
    """What each row's ``logprobs`` asks for; None where no row asks. logits: [rows, vocab], tokens: [rows]."""
    asked = [row for row, params in enumerate(sampling) if params.logprobs is not None]
    if not asked:
        return None
    rows = torch.tensor(asked, device=logits.device)
    logprobs = logits[rows].float().log_softmax(-1)
    widest = min(max(sampling[row].logprobs or 0 for row in asked), logits.shape[-1])
    values, ids = logprobs.topk(widest, -1)
    return Logprobs(asked, logprobs.gather(-1, tokens[rows][:, None])[:, 0], values, ids)


def read_logprobs(
    found: Logprobs | None, tokens: Sequence[int], sampling: Sequence[SamplingParams]
) -> list[TokenLogprob | None]:
    """A row's log-probabilities on the host, None where it asked for none. Waits for the device."""
    read: list[TokenLogprob | None] = [None] * len(tokens)
    if found is None:
        return read
    chosen, values, ids = found.chosen.tolist(), found.values.tolist(), found.ids.tolist()
    for i, row in enumerate(found.rows):
        count = sampling[row].logprobs or 0
        top = tuple(zip(ids[i][:count], values[i][:count], strict=True))
        read[row] = TokenLogprob(tokens[row], chosen[i], top)
    return read


def token_logprobs(logits: Tensor, tokens: Tensor, sampling: Sequence[SamplingParams]) -> list[TokenLogprob | None]:
    """``gather_logprobs`` and ``read_logprobs`` at once."""
    return read_logprobs(gather_logprobs(logits, tokens, sampling), tokens.tolist(), sampling)


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
