"""Causal attention of a flat token stream over a paged KV cache.

A layer's cache is one tensor [2 (keys, values), kv_heads, blocks, block_size, head_dim]. Heads come first so that the
blocks of one sequence, once gathered, lie contiguous per head, which is what the CPU's attention kernel reads fastest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from labkit.kernels.attention_decode import decode_attention
from labkit.kernels.attention_prefill import prefill_attention
from labkit.kernels.metadata import AttentionMetadata

DECODE_BATCH_TOKENS = 2**18
"""Most tokens, padding included, whose keys and values are gathered at once for decoding on CUDA: half a GB at 7B."""
ALIKE_TOKENS = 768
"""Longest context that is decoded together with others on the CPU; of longer ones each call is work enough."""


# cuDNN is left out: it takes a tenth of a second to plan for every shape not seen before, and these never repeat.
CUDA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def paged_attention(queries: Tensor, cache: Tensor, meta: AttentionMetadata, scale: float | None = None) -> Tensor:
    """Attention of each new token over its sequence's cache up to and including itself, which must be written already.

    queries: [tokens, heads, head_dim], heads a multiple of the cache's kv_heads; returns the same shape, contiguous.
    ``scale`` of the scores is head_dim ** -0.5 if None.
    Dispatch: this project's kernels on CUDA unless the metadata says no, PyTorch's everywhere else.
    """
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    if queries.is_cuda and meta.triton:
        return paged_attention_triton(queries, cache, meta, scale)
    return paged_attention_reference(queries, cache, meta, scale)


def paged_attention_triton(queries: Tensor, cache: Tensor, meta: AttentionMetadata, scale: float) -> Tensor:
    """Decodes in one kernel, chunks in another; nothing here depends on what the tensors hold."""
    out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    first = meta.decodes
    if first:
        decode_attention(queries[:first], cache, meta.block_tables[:first], meta.contexts[:first], scale, out[:first])
    if len(meta.contexts) > first:
        tables, contexts, starts = meta.block_tables[first:], meta.contexts[first:], meta.query_starts[first:]
        prefill_attention(queries, cache, tables, contexts, starts, scale, out)
    return out


def paged_attention_reference(queries: Tensor, cache: Tensor, meta: AttentionMetadata, scale: float) -> Tensor:
    """Chunks one by one. Decodes in padded batches on CUDA, where launches cost more than padding; on the CPU, where
    padding costs more, those together whose contexts are short and about as long."""
    lengths, first = meta.context_lens, meta.decodes
    groups = [] if queries.is_cuda else _groups(meta, cache.shape[3], queries.dtype)
    if len(groups) == 1 and first == len(lengths) and isinstance(groups[0].rows, slice):
        return _decode_together(queries, cache, groups[0], scale)
    out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    if queries.is_cuda:
        for piece in _pieces(lengths[:first], DECODE_BATCH_TOKENS):
            longest = max(lengths[piece])
            out[piece] = _decode_batch(
                queries[piece], cache, meta.block_tables[piece], meta.contexts[piece], longest, scale
            )
    for group in groups:
        out[group.rows] = _decode_together(queries[group.rows], cache, group, scale)
    begin = first
    for i in range(first, len(meta.query_lens)):
        end = begin + meta.query_lens[i]
        keys, values = _gather(cache, meta.block_tables[i], lengths[i])
        out[begin:end] = _attend(queries[begin:end], keys, values, scale)
        begin = end
    return out


def _gather(cache: Tensor, block_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence, each [kv_heads, length, head_dim]."""
    _, kv_heads, blocks, block_size, head_dim = cache.shape
    used = -(-length // block_size)
    found = cache.view(2 * kv_heads, blocks, -1).index_select(1, block_table[:used])
    keys, values = found.view(2, kv_heads, used * block_size, head_dim)[:, :, :length]
    return keys, values


def _attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float | None = None) -> Tensor:
    """Attention of the last tokens of one sequence: queries [new, heads, head_dim], keys and values [kv_heads, length,
    head_dim]."""
    new, heads, head_dim = queries.shape
    kv_heads, length, _ = keys.shape
    group = heads // kv_heads
    grouped = queries.view(new, kv_heads, group, head_dim)
    if new == 1:
        # The query heads that share a key head act as that head's queries: no repetition, no mask.
        out = F.scaled_dot_product_attention(grouped.permute(1, 0, 2, 3), keys[:, None], values[:, None], scale=scale)
        return out.view(1, heads, head_dim)
    if queries.is_cuda:
        return _attend_on_cuda(queries, keys, values, scale)
    # Key heads take the batch dimension so that repeating them for their group is a stride of zero, not a copy.
    spread = (kv_heads, group, length, head_dim)
    keys, values = keys[:, None].expand(spread), values[:, None].expand(spread)
    spread_queries = grouped.permute(1, 2, 0, 3)
    if new == length:
        out = F.scaled_dot_product_attention(spread_queries, keys, values, is_causal=True, scale=scale)
    else:
        out = _attend_past_and_new(spread_queries, keys, values, scale)
    return out.permute(2, 0, 1, 3).reshape(new, heads, head_dim)


def _attend_on_cuda(queries: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
    """``_attend`` as one batch of repeated heads.

    With key heads as the batch, the memory-efficient kernel of torch 2.11 misreads a mask of 64 k + 1 rows.
    """
    new, heads, _ = queries.shape
    kv_heads, length, _ = keys.shape
    mask = None if new == length else _causal_mask(new, length, queries)
    keys, values = (each.repeat_interleave(heads // kv_heads, dim=0)[None] for each in (keys, values))
    with sdpa_kernel(CUDA_BACKENDS):
        out = F.scaled_dot_product_attention(
            queries.transpose(0, 1)[None], keys, values, attn_mask=mask, is_causal=mask is None, scale=scale
        )
    return out[0].transpose(0, 1)


def _attend_past_and_new(queries: Tensor, keys: Tensor, values: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention of the last tokens, in two calls that need no mask: over what was cached, and among themselves.

    A third faster than one call with a mask, on the CPU. queries: [kv_heads, group, new, head_dim], keys and values:
    [kv_heads, group, length, head_dim].
    """
    past = keys.shape[2] - queries.shape[2]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    before, before_log_sum = flash(queries, keys[:, :, :past], values[:, :, :past], 0.0, False, scale=scale)
    among, among_log_sum = flash(queries, keys[:, :, past:], values[:, :, past:], 0.0, True, scale=scale)
    share = torch.sigmoid(among_log_sum - before_log_sum)[..., None]
    return torch.lerp(before.float(), among.float(), share).to(queries.dtype)


def _causal_mask(new: int, length: int, like: Tensor) -> Tensor:
    """[new, length] additive mask by which the last ``new`` of ``length`` tokens see themselves and all before."""
    mask = torch.full((new, length), float("-inf"), dtype=like.dtype, device=like.device)
    return mask.triu_(length - new + 1)


def _pieces(context_lens: list[int], most: int) -> Iterator[slice]:
    """Runs of sequences that, padded to the longest of the run, come to ``most`` tokens; at least one sequence each."""
    begin = longest = 0
    for i, length in enumerate(context_lens):
        if i > begin and max(longest, length) * (i + 1 - begin) > most:
            yield slice(begin, i)
            begin, longest = i, 0
        longest = max(longest, length)
    if context_lens:
        yield slice(begin, len(context_lens))


def _alike(context_lens: list[int]) -> Iterator[list[int]]:
    """Sequences by length, in groups that waste little by being padded to their longest, which comes last."""
    order = sorted(range(len(context_lens)), key=context_lens.__getitem__)
    group: list[int] = []
    for i in order:
        length = context_lens[i]
        if group and (length > ALIKE_TOKENS or length > 1.25 * context_lens[group[0]] + 16):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


class Together(NamedTuple):
    """Sequences that the CPU decodes in one call, each padded to the longest of them."""

    rows: slice | Tensor
    """Where they are in the step; all of them in order is a slice, of which no copies are made."""
    blocks: Tensor
    """[sequences * blocks of the longest] int32."""
    mask: Tensor
    """[sequences, 1, 1, tokens of those blocks], to be added to the scores: 0 in a sequence's context, -inf past it."""
    longest: int


def _groups(meta: AttentionMetadata, block_size: int, dtype: torch.dtype) -> list[Together]:
    """The sequences that decode, in groups; worked out in the first layer for all."""
    if block_size not in meta.plans:
        alike = _alike(meta.context_lens[: meta.decodes])
        meta.plans[block_size] = [_together(meta, each, block_size, dtype) for each in alike]
    found: list[Together] = meta.plans[block_size]
    return found


def _together(meta: AttentionMetadata, alike: list[int], block_size: int, dtype: torch.dtype) -> Together:
    first, count = alike[0], len(alike)
    in_order = alike == list(range(first, first + count))
    rows = slice(first, first + count) if in_order else torch.tensor(alike)
    longest = meta.context_lens[alike[-1]]
    used = -(-longest // block_size)
    past = torch.arange(used * block_size) >= meta.contexts[rows][:, None]
    mask = torch.zeros(past.shape, dtype=dtype).masked_fill_(past, float("-inf"))
    return Together(rows, meta.block_tables[rows, :used].reshape(-1), mask[:, None, None], longest)


def _decode_together(queries: Tensor, cache: Tensor, group: Together, scale: float) -> Tensor:
    """One query token per sequence, [sequences, heads, head_dim]."""
    sequences, heads, head_dim = queries.shape
    if sequences == 1:
        return _attend(queries, *_gather(cache, group.blocks, group.longest), scale)
    _, kv_heads, blocks, _, _ = cache.shape
    # A block as one run of numbers: PyTorch copies those a third faster than the same as a matrix.
    found = cache.view(2 * kv_heads, blocks, -1).index_select(1, group.blocks)
    keys, values = found.view(2, kv_heads, sequences, -1, head_dim).transpose(1, 2)
    grouped = queries.view(sequences, kv_heads, -1, head_dim)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=group.mask, scale=scale)
    return out.view(sequences, heads, head_dim)


def _decode_batch(
    queries: Tensor, cache: Tensor, block_tables: Tensor, contexts: Tensor, longest: int, scale: float
) -> Tensor:
    """One query token per sequence, padded to the longest context. queries: [sequences, heads, head_dim]."""
    sequences, heads, head_dim = queries.shape
    _, kv_heads, _, block_size, _ = cache.shape
    used = -(-longest // block_size)
    found = cache.index_select(2, block_tables[:, :used].reshape(-1))
    found = found.view(2, kv_heads, sequences, used * block_size, head_dim).transpose(1, 2)
    beyond = torch.arange(used * block_size, device=queries.device) >= contexts[:, None]
    grouped = queries.view(sequences, kv_heads, -1, head_dim)
    scores = (grouped @ found[0].transpose(-1, -2)).float() * scale
    shares = scores.masked_fill(beyond[:, None, None], float("-inf")).softmax(-1).to(queries.dtype)
    return (shares @ found[1]).view(sequences, heads, head_dim)
