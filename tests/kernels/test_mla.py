"""Multi-head latent attention against its definition in float64, head by head, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from labkit.kernels import mla
from labkit.kernels.metadata import AttentionMetadata

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Sizes:
    heads: int = 2
    rank: int = 16
    nope: int = 16
    rotary: int = 16
    value: int = 16
    block_size: int = 16


@dataclass(frozen=True)
class Case:
    """What ``mla_attention`` takes, and what it must give."""

    queries: torch.Tensor
    kv_b: torch.Tensor
    cache: torch.Tensor
    meta: AttentionMetadata
    scale: float
    expected: np.ndarray


def attend(query: np.ndarray, stored: np.ndarray, kv_b: np.ndarray, sizes: Sizes, scale: float) -> np.ndarray:
    """Causal attention of the last tokens of one sequence, expanded: query [new, heads, nope + rotary], stored
    [context, rank + rotary]."""
    new, context = len(query), len(stored)
    out = np.zeros((new, sizes.heads, sizes.value))
    for head, weight in enumerate(kv_b.reshape(sizes.heads, sizes.nope + sizes.value, sizes.rank)):
        expanded = stored[:, : sizes.rank] @ weight.T
        keys = np.concatenate((expanded[:, : sizes.nope], stored[:, sizes.rank :]), axis=1)
        for token in range(new):
            seen = context - new + token + 1
            scores = keys[:seen] @ query[token, head] * scale
            shares = np.exp(scores - scores.max())
            out[token, head] = shares @ expanded[:seen, sizes.nope :] / shares.sum()
    return out


def make(lengths: list[tuple[int, int]], sizes: Sizes, dtype: torch.dtype = torch.float32) -> Case:
    """Sequences of (new, context) tokens in scattered blocks; those with one new token, or none, come first."""
    generator = torch.Generator().manual_seed(0)
    counts = [-(-context // sizes.block_size) for _, context in lengths]
    blocks = sum(counts) + 3
    order = iter(torch.randperm(blocks, generator=generator).tolist())
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    width = sizes.rank + sizes.rotary
    # Garbage where nothing was written: it must not reach any output.
    cache = torch.full((1, 1, blocks, sizes.block_size, width), 1e4, dtype=dtype)
    kv_b = torch.randn(sizes.heads * (sizes.nope + sizes.value), sizes.rank, generator=generator)
    kv_b = (kv_b / sizes.rank**0.5).to(dtype)
    scale = 0.7 * (sizes.nope + sizes.rotary) ** -0.5
    queries, slots, expected = [], [], []
    for row, (new, context) in enumerate(lengths):
        tables[row, : counts[row]] = torch.tensor([next(order) for _ in range(counts[row])])
        stored = torch.randn(context, width, generator=generator).to(dtype)
        token = torch.arange(context)
        place = tables[row, token // sizes.block_size].long() * sizes.block_size + token % sizes.block_size
        cache.view(-1, width)[place] = stored
        rows = new if context else 1
        query = torch.randn(rows, sizes.heads, sizes.nope + sizes.rotary, generator=generator).to(dtype)
        queries.append(query)
        slots.append(place[context - new :] if context else torch.tensor([-1]))
        if context:
            expected.append(attend(*(each.double().numpy() for each in (query, stored, kv_b)), sizes, scale))
        else:
            expected.append(np.zeros((1, sizes.heads, sizes.value)))
    taken = torch.tensor([0, *(len(each) for each in queries)])
    meta = AttentionMetadata(
        query_lens=[new for new, _ in lengths],
        context_lens=[context for _, context in lengths],
        contexts=torch.tensor([context for _, context in lengths], dtype=torch.int32, device=DEVICE),
        query_starts=taken.cumsum(0).to(torch.int32).to(DEVICE),
        block_tables=tables.to(DEVICE),
        slots=torch.cat(slots).to(DEVICE),
        decodes=sum(1 for new, _ in lengths if new == 1),
    )
    return Case(torch.cat(queries).to(DEVICE), kv_b.to(DEVICE), cache.to(DEVICE), meta, scale, np.concatenate(expected))


def close(found: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(found.double().cpu().numpy(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(heads=3, rank=32, nope=24, rotary=8, value=40, block_size=3)])
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 1), (1, 15), (1, 16), (1, 17), (1, 40), (1, 0)],
        [(15, 15)],
        [(1, 33), (5, 5), (5, 21), (16, 32), (2, 50)],
    ],
)
def test_attention_is_that_of_the_expanded_keys(lengths: list[tuple[int, int]], sizes: Sizes) -> None:
    case = make(lengths, sizes)
    found = mla.mla_attention(case.queries, case.kv_b, case.cache, case.meta, case.scale)
    close(found, case.expected, 2e-5)


def test_padding_is_not_written() -> None:
    cache = torch.zeros(1, 1, 3, 4, 6, device=DEVICE)
    latent = torch.randn(5, 4, device=DEVICE)
    rotary_key = torch.randn(5, 2, device=DEVICE)
    slots = torch.tensor([9, -1, 0, 3, -1], device=DEVICE)
    mla.write_latent(cache, latent, rotary_key, slots)
    rows = cache.view(12, 6)
    for token, slot in ((0, 9), (2, 0), (3, 3)):
        assert torch.equal(rows[slot], torch.cat((latent[token], rotary_key[token])))
        rows[slot] = 0
    assert not rows.any()
