from __future__ import annotations

import numpy as np
import pytest
import torch

from labkit.kernels import attention
from labkit.kernels.attention import paged_attention
from labkit.kernels.metadata import AttentionMetadata


def reference(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Causal attention of the last tokens of one sequence in float64, head by head, token by token."""
    new, heads, head_dim = query.shape
    length, kv_heads, _ = keys.shape
    out = np.zeros((new, heads, head_dim))
    for token in range(new):
        seen = length - new + token + 1
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = keys[:seen, kv].astype(np.float64) @ query[token, head] / np.sqrt(head_dim)
            weights = np.exp(scores - scores.max())
            out[token, head] = weights @ values[:seen, kv] / weights.sum()
    return out


def run(
    lengths: list[tuple[int, int]], heads: int, kv_heads: int, head_dim: int, block_size: int
) -> tuple[torch.Tensor, np.ndarray]:
    """Attention over sequences of (new, context) tokens in scattered blocks: what the kernel gives, the reference."""
    rng = np.random.default_rng(0)
    counts = [-(-context // block_size) for _, context in lengths]
    order = iter(rng.permutation(sum(counts) + 3).tolist())
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    # Garbage where nothing was written: it must not reach any output.
    cache = torch.full((2, kv_heads, sum(counts) + 3, block_size, head_dim), 1e4)
    queries, slots, expected = [], [], []
    for row, (new, context) in enumerate(lengths):
        tables[row, : counts[row]] = torch.tensor([next(order) for _ in range(counts[row])])
        keys, values = rng.normal(size=(2, context, kv_heads, head_dim)).astype(np.float32)
        query = rng.normal(size=(new, heads, head_dim)).astype(np.float32)
        place = tables[row, torch.arange(context) // block_size] * block_size + torch.arange(context) % block_size
        for plane, written in zip(cache, (keys, values), strict=True):
            plane.view(kv_heads, -1, head_dim)[:, place] = torch.from_numpy(written).transpose(0, 1)
        queries.append(torch.from_numpy(query))
        slots.append(place[context - new :])
        expected.append(reference(query, keys, values))
    contexts = [context for _, context in lengths]
    new_tokens = [new for new, _ in lengths]
    starts = torch.tensor([0, *np.cumsum(new_tokens)], dtype=torch.int32)
    decodes = (
        new_tokens.index(next((new for new in new_tokens if new > 1), None)) if max(new_tokens) > 1 else len(lengths)
    )
    meta = AttentionMetadata(
        new_tokens, contexts, torch.tensor(contexts, dtype=torch.int32), starts, tables, torch.cat(slots), decodes
    )
    return paged_attention(torch.cat(queries), cache, meta), np.concatenate(expected)


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(1, 1, 16), (4, 1, 8), (6, 2, 64), (7, 7, 16), (12, 2, 128)])
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 1)],
        [(1, 15), (1, 16), (1, 17), (1, 40)],
        [(15, 15)],
        [(16, 16), (17, 17)],
        [(1, 33), (5, 5), (5, 21), (16, 32), (2, 50)],
    ],
)
def test_attention_is_causal_attention(
    lengths: list[tuple[int, int]], heads: int, kv_heads: int, head_dim: int
) -> None:
    found, expected = run(lengths, heads, kv_heads, head_dim, block_size=16)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_any_block_size(block_size: int) -> None:
    found, expected = run([(1, 10), (4, 9), (7, 7)], 4, 2, 16, block_size)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


def test_the_padded_decode_batch_of_cuda_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_at_once(queries: torch.Tensor, cache: torch.Tensor, meta: AttentionMetadata) -> torch.Tensor:
        longest = max(meta.context_lens)
        return attention._decode_batch(
            queries, cache, meta.block_tables, meta.contexts, longest, queries.shape[-1] ** -0.5
        )

    monkeypatch.setattr(attention, "paged_attention", all_at_once)
    monkeypatch.setitem(globals(), "paged_attention", all_at_once)
    found, expected = run([(1, 1), (1, 16), (1, 17), (1, 100)], 6, 2, 16, block_size=16)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


def test_the_masked_chunk_of_cuda_agrees() -> None:
    queries, keys, values = (torch.randn(2, 3, tokens, 16) for tokens in (5, 40, 40))
    mask = attention._causal_mask(5, 40, queries)
    masked = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    torch.testing.assert_close(attention._attend_past_and_new(queries, keys, values), masked, atol=1e-5, rtol=1e-5)


def test_decode_batches_are_bounded_and_leave_nobody_out() -> None:
    assert list(attention._pieces([], 10)) == []
    assert list(attention._pieces([3, 3, 3, 9, 1, 1, 50, 2], 10)) == [
        slice(0, 3),
        slice(3, 4),
        slice(4, 6),
        slice(6, 7),
        slice(7, 8),
    ]
