"""Multi-head latent attention (DeepSeek-V2 and V3) of a flat token stream over a paged cache of latents.

A layer's cache is one tensor [1, 1, blocks, block_size, rank + rotary]: of each token the latent from which the keys
and values of all heads are expanded, then the rotated key that all heads share (512 + 64 at full size). The weight
``kv_b`` [heads * (nope + value), rank] expands a latent: per head first the key without rotation, then the value.

Decoding is absorbed: a query times its head's key expansion meets the latents themselves, one key head for all queries
(DeepSeek-V2, arXiv 2405.04434, section 2.1.2). Prefill expands, for there a token meets many queries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from labkit.kernels.metadata import AttentionMetadata
from labkit.kernels.mla_decode import mla_decode_triton
from labkit.kernels.mla_prefill import mla_prefill_triton

EXPAND_FROM = 64
"""New tokens of a chunk, on average, from which expanding the latents costs less than meeting them one by one."""


def write_latent(cache: Tensor, latent: Tensor, rotary_key: Tensor, slots: Tensor) -> None:
    """Puts latent [tokens, rank] and rotary_key [tokens, rotary] into a layer's cache at slots [tokens]; not at -1.

    Dispatch: the kernel on CUDA, PyTorch elsewhere.
    """
    write = write_latent_triton if latent.is_cuda else write_latent_reference
    write(cache, latent, rotary_key, slots)


def write_latent_reference(cache: Tensor, latent: Tensor, rotary_key: Tensor, slots: Tensor) -> None:
    """``write_latent`` in PyTorch."""
    kept = slots >= 0
    rows = torch.cat((latent[kept], rotary_key[kept]), dim=-1)
    cache.view(-1, cache.shape[-1]).index_copy_(0, slots[kept], rows)


@triton.jit
def _write_kernel(  # type: ignore[no-untyped-def]
    cache,
    latent,
    rotary_key,
    slots,
    latent_stride,
    rotary_stride,
    RANK: tl.constexpr,
    ROTARY: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    ROTARY_PADDED: tl.constexpr,
):
    """One token."""
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    row = cache + slot * (RANK + ROTARY)
    column, rotary = tl.arange(0, RANK_PADDED), tl.arange(0, ROTARY_PADDED)
    tl.store(row + column, tl.load(latent + token * latent_stride + column, mask=column < RANK), mask=column < RANK)
    key = tl.load(rotary_key + token * rotary_stride + rotary, mask=rotary < ROTARY)
    tl.store(row + RANK + rotary, key, mask=rotary < ROTARY)


def write_latent_triton(cache: Tensor, latent: Tensor, rotary_key: Tensor, slots: Tensor) -> None:
    """``write_latent`` in one launch; the rows of latent and rotary_key may lie apart."""
    tokens, rank = latent.shape
    rotary = rotary_key.shape[1]
    _write_kernel[(tokens,)](
        cache,
        latent,
        rotary_key,
        slots,
        latent.stride(0),
        rotary_key.stride(0),
        RANK=rank,
        ROTARY=rotary,
        RANK_PADDED=triton.next_power_of_2(rank),
        ROTARY_PADDED=triton.next_power_of_2(rotary),
        num_warps=1,
    )


def mla_attention(queries: Tensor, kv_b: Tensor, cache: Tensor, meta: AttentionMetadata, scale: float) -> Tensor:
    """Attention of each new token over its sequence's cache up to and including itself, which must be written already.

    queries: [tokens, heads, nope + rotary], the last part rotated; returns [tokens, heads, value]. Rows of the stream
    past the last sequence are undefined. Dispatch: the kernels on CUDA if their tiles fit and the metadata does not say
    no, PyTorch elsewhere.
    """
    rank, rotary = kv_b.shape[1], cache.shape[-1] - kv_b.shape[1]
    nope = queries.shape[2] - rotary
    widths = (rank, rotary, nope, kv_b.shape[0] // queries.shape[1] - nope)
    if queries.is_cuda and meta.triton and _tiles_fit(widths, queries.dtype):
        return mla_attention_triton(queries, kv_b, cache, meta, scale)
    return mla_attention_reference(queries, kv_b, cache, meta, scale)


def mla_attention_triton(queries: Tensor, kv_b: Tensor, cache: Tensor, meta: AttentionMetadata, scale: float) -> Tensor:
    """``mla_attention`` by the kernels.

    Single tokens are absorbed. So are the chunks in a CUDA graph, which has no lengths on the host by which to size
    their expanded keys, and chunks so short that the latents are expanded for few queries; other chunks are expanded.
    """
    first, tokens = meta.decodes, len(queries)
    chunks = len(meta.contexts) - first
    expanded = chunks > 0 and len(meta.query_lens) > 0 and tokens - first >= EXPAND_FROM * chunks
    rows = first if expanded or not chunks else tokens
    key_part, value_part = _parts(queries, kv_b, cache)
    out = queries.new_empty(tokens, queries.shape[1], value_part.shape[1])
    if rows:
        absorbed, rotated = _absorb(queries[:rows], key_part)
        sums = queries.new_empty(absorbed.shape)
        tables, contexts = meta.block_tables, meta.contexts
        if first:
            singles = absorbed[:first], rotated[:first]
            mla_decode_triton(*singles, cache, tables[:first], contexts[:first], scale, sums[:first])
        if rows > first:
            singles, starts = (absorbed[first:], rotated[first:]), meta.query_starts[first:]
            mla_decode_triton(*singles, cache, tables[first:], contexts[first:], scale, sums[first:], starts)
        out[:rows] = _expand(sums, value_part)
    if expanded:
        mla_prefill_triton(queries, kv_b, cache, meta, scale, out)
    return out


def mla_attention_reference(
    queries: Tensor, kv_b: Tensor, cache: Tensor, meta: AttentionMetadata, scale: float
) -> Tensor:
    """``mla_attention`` in PyTorch, a sequence at a time: single tokens absorbed, chunks expanded.

    Raises ValueError where the host's lengths are missing, as they are in a CUDA graph.
    """
    if len(meta.query_lens) < len(meta.contexts):
        raise ValueError("latent attention in PyTorch cannot be part of a CUDA graph; these sizes have no kernel")
    key_part, value_part = _parts(queries, kv_b, cache)
    out = queries.new_empty(*queries.shape[:2], value_part.shape[1])
    first = meta.decodes
    if first:
        absorbed, rotated = _absorb(queries[:first], key_part)
        contexts = torch.tensor(meta.context_lens[:first])
        sums = mla_decode_reference(absorbed, rotated, cache, meta.block_tables, contexts, scale)
        out[:first] = _expand(sums, value_part)
    mla_prefill_reference(queries, kv_b, cache, meta, scale, out)
    return out


def _parts(queries: Tensor, kv_b: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    """The expansions of keys [heads, nope, rank] and values [heads, value, rank]."""
    heads, rank = queries.shape[1], kv_b.shape[1]
    nope = queries.shape[2] - (cache.shape[-1] - rank)
    by_head = kv_b.view(heads, -1, rank)
    return by_head[:, :nope], by_head[:, nope:]


def _absorb(queries: Tensor, key_part: Tensor) -> tuple[Tensor, Tensor]:
    """Queries that meet latents [tokens, heads, rank], and those that meet rotated keys [tokens, heads, rotary]."""
    nope = key_part.shape[1]
    absorbed = torch.bmm(queries[..., :nope].transpose(0, 1), key_part)
    return absorbed.transpose(0, 1), queries[..., nope:]


def _expand(sums: Tensor, value_part: Tensor) -> Tensor:
    """Weighted sums of values [tokens, heads, value], from those of latents."""
    return torch.bmm(sums.transpose(0, 1), value_part.transpose(1, 2)).transpose(0, 1)


def mla_decode(
    absorbed: Tensor, rotated: Tensor, cache: Tensor, block_tables: Tensor, contexts: Tensor, scale: float
) -> Tensor:
    """Attention of one token a sequence over the latents of its sequence: their weighted sum [sequences, heads, rank].

    absorbed: [sequences, heads, rank], a query times its head's key expansion; rotated: [sequences, heads, rotary];
    block_tables: [sequences, widest]; contexts: [sequences], 0 for padding, whose rows come out as zeros. ``scale`` is
    that of the expanded queries. Dispatch: the kernel on CUDA if its tiles fit, PyTorch elsewhere.
    """
    if absorbed.is_cuda and _tiles_fit((absorbed.shape[2], rotated.shape[2]), absorbed.dtype):
        out = absorbed.new_empty(absorbed.shape)
        return mla_decode_triton(absorbed, rotated, cache, block_tables, contexts, scale, out)
    return mla_decode_reference(absorbed, rotated, cache, block_tables, contexts, scale)


def mla_decode_reference(
    absorbed: Tensor, rotated: Tensor, cache: Tensor, block_tables: Tensor, contexts: Tensor, scale: float
) -> Tensor:
    """``mla_decode`` in PyTorch, a sequence at a time, the softmax in float32; contexts may be on the host."""
    out = torch.zeros(absorbed.shape, dtype=absorbed.dtype, device=absorbed.device)
    for i, context in enumerate(contexts.tolist()):
        if context:
            latents, keys = _gather(cache, block_tables[i], context, absorbed.shape[-1])
            scores = (absorbed[i] @ latents.T + rotated[i] @ keys.T).float() * scale
            out[i] = scores.softmax(-1).to(latents.dtype) @ latents
    return out


def mla_prefill_reference(
    queries: Tensor, kv_b: Tensor, cache: Tensor, meta: AttentionMetadata, scale: float, out: Tensor
) -> None:
    """What ``mla_prefill_triton`` does, a sequence at a time."""
    heads, width = queries.shape[1:]
    rank = kv_b.shape[1]
    begin = meta.decodes
    for i in range(meta.decodes, len(meta.query_lens)):
        new, context = meta.query_lens[i], meta.context_lens[i]
        if not new:
            continue
        latents, rotary_key = _gather(cache, meta.block_tables[i], context, rank)
        expanded = (latents @ kv_b.T).view(context, heads, -1).transpose(0, 1)
        plain, values = expanded.split((width - rotary_key.shape[-1], out.shape[-1]), dim=-1)
        keys = torch.cat((plain, rotary_key.expand(heads, -1, -1)), dim=-1)
        seen = torch.ones(new, context, dtype=torch.bool, device=queries.device).tril_(context - new)
        query = queries[begin : begin + new].transpose(0, 1)
        found = F.scaled_dot_product_attention(query[None], keys[None], values[None], attn_mask=seen, scale=scale)
        out[begin : begin + new] = found[0].transpose(0, 1)
        begin += new


def _gather(cache: Tensor, block_table: Tensor, length: int, rank: int) -> tuple[Tensor, Tensor]:
    """Latents [length, rank] and rotated keys [length, rotary] of one sequence."""
    blocks, block_size, width = cache.shape[2:]
    used = -(-length // block_size)
    rows = cache.view(blocks, block_size, width).index_select(0, block_table[:used]).view(-1, width)[:length]
    return rows[:, :rank], rows[:, rank:]


def _tiles_fit(widths: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether the kernels can have tiles this wide: powers of two, in float32 only narrow ones for want of memory."""
    most = 64 if dtype == torch.float32 else 512
    return all(16 <= width <= most and width & (width - 1) == 0 for width in widths)
