"""Causal attention of a flat token stream over a paged KV cache.

A layer's cache is one tensor [2 (keys, values), kv_heads, blocks, block_size, head_dim]. Heads come first so that the
blocks of one sequence, once gathered, lie contiguous per head, which is what the CPU's attention kernel reads fastest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

DECODE_BATCH_TOKENS = 2**18
"""Most tokens, padding included, whose keys and values are gathered at once for decoding on CUDA: half a GB at 7B."""


# cuDNN is left out: it takes a tenth of a second to plan for every shape not seen before, and these never repeat.
CUDA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class AttentionMetadata:
    """Where the sequences lie in the token stream and in the KV cache. Sequences with one new token come first.

    Lengths are Python lists, for loops and shapes need them on the host, and reading them from a GPU would stall it.
    """

    query_lens: list[int]
    """New tokens of each sequence in this step."""
    context_lens: list[int]
    """Tokens of each sequence in the cache once this step's are written."""
    contexts: Tensor
    """[sequences] int64: the same, on the device."""
    block_tables: Tensor
    """[sequences, widest] int64: the cache blocks of each sequence; entries past its context are any valid block."""
    slots: Tensor
    """[tokens] int64: where each new token's key and value go, block * block_size + offset."""

    @property
    def decodes(self) -> int:
        """How many sequences, all at the front, have a single new token."""
        return sum(1 for length in self.query_lens if length == 1)


def write_kv(cache: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Puts keys and values [tokens, kv_heads, head_dim] into a layer's cache at ``slots`` [tokens]."""
    flat = cache.view(2, cache.shape[1], -1, cache.shape[-1])
    flat[0].index_copy_(1, slots, keys.transpose(0, 1))
    flat[1].index_copy_(1, slots, values.transpose(0, 1))


def paged_attention(queries: Tensor, cache: Tensor, meta: AttentionMetadata) -> Tensor:
    """Attention of each new token over its sequence's cache up to and including itself, which must be written already.

    queries: [tokens, heads, head_dim], heads a multiple of the cache's kv_heads; returns the same shape.
    Dispatch: decodes one by one on the CPU, where padding costs more than calls, and in one padded batch on CUDA, where
    launches cost more than padding; prefill chunks one by one on both.
    """
    out = torch.empty_like(queries)
    first = begin = meta.decodes if queries.is_cuda else 0
    for piece in _pieces(meta.context_lens[:first], DECODE_BATCH_TOKENS):
        longest = max(meta.context_lens[piece])
        out[piece] = _decode_batch(queries[piece], cache, meta.block_tables[piece], meta.contexts[piece], longest)
    for i in range(first, len(meta.query_lens)):
        end = begin + meta.query_lens[i]
        keys, values = _gather(cache, meta.block_tables[i], meta.context_lens[i])
        out[begin:end] = _attend(queries[begin:end], keys, values)
        begin = end
    return out


def _gather(cache: Tensor, block_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence, each [kv_heads, length, head_dim]."""
    _, kv_heads, blocks, block_size, head_dim = cache.shape
    used = -(-length // block_size)
    found = cache.view(2 * kv_heads, blocks, -1).index_select(1, block_table[:used])
    keys, values = found.view(2, kv_heads, used * block_size, head_dim)[:, :, :length]
    return keys, values


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of the last tokens of one sequence: queries [new, heads, head_dim], keys and values [kv_heads, length,
    head_dim]."""
    new, heads, head_dim = queries.shape
    kv_heads, length, _ = keys.shape
    group = heads // kv_heads
    grouped = queries.view(new, kv_heads, group, head_dim)
    if new == 1:
        # The query heads that share a key head act as that head's queries: no repetition, no mask.
        out = F.scaled_dot_product_attention(grouped.permute(1, 0, 2, 3), keys[:, None], values[:, None])
        return out.view(1, heads, head_dim)
    if queries.is_cuda:
        return _attend_on_cuda(queries, keys, values)
    # Key heads take the batch dimension so that repeating them for their group is a stride of zero, not a copy.
    spread = (kv_heads, group, length, head_dim)
    keys, values = keys[:, None].expand(spread), values[:, None].expand(spread)
    spread_queries = grouped.permute(1, 2, 0, 3)
    if new == length:
        out = F.scaled_dot_product_attention(spread_queries, keys, values, is_causal=True)
    else:
        out = _attend_past_and_new(spread_queries, keys, values)
    return out.permute(2, 0, 1, 3).reshape(new, heads, head_dim)


def _attend_on_cuda(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """``_attend`` as one batch of repeated heads.

    With key heads as the batch, the memory-efficient kernel of torch 2.11 misreads a mask of 64 k + 1 rows.
    """
    new, heads, _ = queries.shape
    kv_heads, length, _ = keys.shape
    mask = None if new == length else _causal_mask(new, length, queries)
    keys, values = (each.repeat_interleave(heads // kv_heads, dim=0)[None] for each in (keys, values))
    with sdpa_kernel(CUDA_BACKENDS):
        out = F.scaled_dot_product_attention(
            queries.transpose(0, 1)[None], keys, values, attn_mask=mask, is_causal=mask is None
        )
    return out[0].transpose(0, 1)


def _attend_past_and_new(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of the last tokens, in two calls that need no mask: over what was cached, and among themselves.

    A third faster than one call with a mask, on the CPU. queries: [kv_heads, group, new, head_dim], keys and values:
    [kv_heads, group, length, head_dim].
    """
    past = keys.shape[2] - queries.shape[2]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    before, before_log_sum = flash(queries, keys[:, :, :past], values[:, :, :past], 0.0, False)
    among, among_log_sum = flash(queries, keys[:, :, past:], values[:, :, past:], 0.0, True)
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


def _decode_batch(queries: Tensor, cache: Tensor, block_tables: Tensor, contexts: Tensor, longest: int) -> Tensor:
    """One query token per sequence, padded to the longest context. queries: [sequences, heads, head_dim]."""
    sequences, heads, head_dim = queries.shape
    _, kv_heads, _, block_size, _ = cache.shape
    used = -(-longest // block_size)
    found = cache.index_select(2, block_tables[:, :used].reshape(-1))
    found = found.view(2, kv_heads, sequences, used * block_size, head_dim).transpose(1, 2)
    beyond = torch.arange(used * block_size, device=queries.device) >= contexts[:, None]
    grouped = queries.view(sequences, kv_heads, -1, head_dim)
    scores = (grouped @ found[0].transpose(-1, -2)).float() * head_dim**-0.5
    shares = scores.masked_fill(beyond[:, None, None], float("-inf")).softmax(-1).to(queries.dtype)
    return (shares @ found[1]).view(sequences, heads, head_dim)
