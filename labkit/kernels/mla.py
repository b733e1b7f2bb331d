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

    queries: [tokens, heads, nope + rotary], the last part rotated; returns [tokens, heads, value]. Dispatch: sequences
    with one new token are absorbed, the others expanded. Rows of the stream past the last sequence are undefined.
    """
    tokens, heads, _ = queries.shape
    rank = kv_b.shape[1]
    rotary = cache.shape[-1] - rank
    nope = queries.shape[-1] - rotary
    out = queries.new_empty(tokens, heads, kv_b.shape[0] // heads - nope)
    decodes = meta.decodes
    if decodes:
        key_part, value_part = kv_b.view(heads, -1, rank).split((nope, out.shape[-1]), dim=1)
        plain, rotated = queries[:decodes].split((nope, rotary), dim=-1)
        absorbed = torch.bmm(plain.transpose(0, 1), key_part).transpose(0, 1)
        latents = mla_decode(absorbed, rotated, cache, meta.block_tables[:decodes], meta.contexts[:decodes], scale)
        out[:decodes] = torch.bmm(latents.transpose(0, 1), value_part.transpose(1, 2)).transpose(0, 1)
    if decodes < len(meta.query_lens):
        mla_prefill(queries, kv_b, cache, meta, scale, out)
    return out


def mla_decode(
    absorbed: Tensor, rotated: Tensor, cache: Tensor, block_tables: Tensor, contexts: Tensor, scale: float
) -> Tensor:
    """Attention of one token a sequence over the latents of its sequence: their weighted sum [sequences, heads, rank].

    absorbed: [sequences, heads, rank], a query times its head's key expansion; rotated: [sequences, heads, rotary];
    block_tables: [sequences, widest]; contexts: [sequences], 0 for padding, whose rows come out as zeros. ``scale`` is
    that of the expanded queries. Dispatch: the kernel on CUDA if its tiles fit; PyTorch, which reads the contexts back
    and so cannot be part of a CUDA graph, elsewhere.
    """
    on_gpu = absorbed.is_cuda and _tiles_fit(absorbed.shape[2], rotated.shape[2])
    decode = mla_decode_triton if on_gpu else mla_decode_reference
    return decode(absorbed, rotated, cache, block_tables, contexts, scale)


def mla_decode_reference(
    absorbed: Tensor, rotated: Tensor, cache: Tensor, block_tables: Tensor, contexts: Tensor, scale: float
) -> Tensor:
    """``mla_decode`` in PyTorch, a sequence at a time, the softmax in float32."""
    out = torch.zeros(absorbed.shape, dtype=absorbed.dtype, device=absorbed.device)
    for i, context in enumerate(contexts.tolist()):
        if context:
            latents, keys = _gather(cache, block_tables[i], context, absorbed.shape[-1])
            scores = (absorbed[i] @ latents.T + rotated[i] @ keys.T).float() * scale
            out[i] = scores.softmax(-1).to(latents.dtype) @ latents
    return out


def mla_prefill(
    queries: Tensor, kv_b: Tensor, cache: Tensor, meta: AttentionMetadata, scale: float, out: Tensor
) -> None:
    """Causal attention of the sequences past ``meta.decodes`` over their expanded keys and values, into ``out``.

    queries: [tokens, heads, nope + rotary] and out: [tokens, heads, value] of the whole stream. The sizes come from the
    host's lists, so this cannot be part of a CUDA graph. Dispatch: the kernel on CUDA if its tiles fit, SDPA elsewhere.
    """
    rotary = cache.shape[-1] - kv_b.shape[1]
    on_gpu = queries.is_cuda and _tiles_fit(queries.shape[2] - rotary, rotary, out.shape[2])
    prefill = mla_prefill_triton if on_gpu else mla_prefill_reference
    prefill(queries, kv_b, cache, meta, scale, out)


def mla_prefill_reference(
    queries: Tensor, kv_b: Tensor, cache: Tensor, meta: AttentionMetadata, scale: float, out: Tensor
) -> None:
    """``mla_prefill`` in PyTorch, a sequence at a time."""
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


def _tiles_fit(*widths: int) -> bool:
    """Whether the kernels can have tiles this wide."""
    return all(width >= 16 and width & (width - 1) == 0 for width in widths)
