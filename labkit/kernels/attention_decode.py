"""Attention of one new token a sequence over the paged KV cache, split along the context (split-KV, "flash decoding").

A program reads a part of one sequence's keys and values of one key-value head, once, for all the query heads that share
it: they are the rows of one tile. Parts leave a running maximum, a sum and an unscaled output in float32, which a
second kernel combines. The grid depends on shapes alone, and each program works out its part from the context lengths
on the device, so that a captured CUDA graph serves any lengths.

After Dao et al., "Flash-Decoding for long-context inference" (2023), and vLLM's Triton attention (arXiv 2511.11581).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit.kernels.compile_check import CompileCase
from labkit.kernels.overlap import gdc_launch_dependents, gdc_wait, overlaps

LOG2_E = 1.4426950408889634

RESIDENT_PROGRAMS = 2 * 132
"""Programs that an H100 or H200 runs at once: two on each multiprocessor, by their shared memory."""
MOST_SPLITS = 128
CHUNK = {"few": 64, "many": 256}
"""Fewest tokens of a part. Where sequences are few, latency counts; where they fill the GPU, what each part costs."""
FEW = 32


class Tile(NamedTuple):
    """How a program goes over its part of the context."""

    tokens: int
    num_warps: int
    num_stages: int


TILES = {64: Tile(128, 4, 3), 128: Tile(64, 4, 3), 256: Tile(32, 4, 3)}
"""By head size, rounded up to a power of two: 32 KiB of keys and values a stage and three buffers of that, so that two
programs share a multiprocessor and each keeps 64 KiB under way. For types of 16 bits; float32 takes half the tokens."""


def decode_attention(
    queries: Tensor, cache: Tensor, block_tables: Tensor, contexts: Tensor, scale: float, out: Tensor | None = None
) -> Tensor:
    """softmax(queries · keys * scale) · values over each sequence's context; a context of 0 gives zeros.

    queries: [sequences, heads, head_dim], rows may lie apart; cache: [2, kv_heads, blocks, block_size, head_dim];
    block_tables: [sequences, widest] int32; contexts: [sequences] int32; returns ``out`` or a new tensor like queries.
    Dispatch: the Triton kernel on CUDA, the reference elsewhere.
    """
    if queries.is_cuda:
        return decode_attention_triton(queries, cache, block_tables, contexts, scale, out)
    found = decode_attention_reference(queries, cache, block_tables, contexts, scale)
    return found if out is None else out.copy_(found)


def decode_attention_reference(
    queries: Tensor, cache: Tensor, block_tables: Tensor, contexts: Tensor, scale: float
) -> Tensor:
    """The definition, in float32, over the whole width of the block tables."""
    sequences, heads, head_dim = queries.shape
    _, kv_heads, _, block_size, _ = cache.shape
    widest = block_tables.shape[1] * block_size
    found = cache[:, :, block_tables.long()].transpose(1, 2).reshape(2, sequences, kv_heads, widest, head_dim)
    beyond = (torch.arange(widest, device=queries.device) >= contexts[:, None])[:, None, :, None]
    keys, values = found.float().masked_fill(beyond, 0)
    grouped = queries.float().view(sequences, kv_heads, heads // kv_heads, head_dim)
    scores = (grouped @ keys.transpose(-1, -2) * scale).masked_fill(beyond.transpose(-1, -2), float("-inf"))
    shares = scores.softmax(-1).nan_to_num(0)
    return (shares @ values).view(sequences, heads, head_dim).to(queries.dtype)


def splits_for(programs: int, tokens: int) -> tuple[int, int]:
    """Into how many parts contexts are cut at most, and the fewest tokens of a part.

    programs: sequences times key-value heads; tokens: the longest context that the block tables have room for.
    Measured on an H200: as soon as whole contexts nearly fill the GPU, cutting them costs more than it evens out.
    """
    chunk = CHUNK["few" if programs < FEW else "many"]
    nearly_full = programs >= 3 * RESIDENT_PROGRAMS // 4
    wanted = 1 if nearly_full else triton.cdiv(3 * RESIDENT_PROGRAMS, 2 * programs)
    return max(1, min(wanted, triton.cdiv(tokens, chunk), MOST_SPLITS)), chunk


def decode_attention_triton(
    queries: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    contexts: Tensor,
    scale: float,
    out: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """``decode_attention`` on the GPU. ``splits`` overrides the rule of ``splits_for``, for tuning."""
    sequences, heads, head_dim = queries.shape
    _, kv_heads, blocks, block_size, _ = cache.shape
    if out is None:
        out = torch.empty((sequences, heads, head_dim), dtype=queries.dtype, device=queries.device)
    if not sequences:
        return out
    most, chunk = splits_for(sequences * kv_heads, block_tables.shape[1] * block_size)
    splits = splits or most
    padded = triton.next_power_of_2(head_dim)
    tile = TILES.get(padded, TILES[64])
    tokens = tile.tokens * 2 // queries.element_size()
    parts = out
    if splits > 1:
        parts = torch.empty(splits * sequences * heads * (padded + 2), dtype=torch.float32, device=queries.device)
    group = heads // kv_heads
    _decode[(sequences, kv_heads, splits)](
        queries, cache, block_tables, contexts, out, parts,
        scale * LOG2_E, queries.stride(0), out.stride(0), block_tables.stride(0), blocks,
        GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), HEAD_DIM=head_dim, PADDED_DIM=padded,
        BLOCK_SIZE=block_size, TILE=tokens, CHUNK=max(chunk, tokens), SPLIT=splits > 1,
        PRECISION=precision(queries.dtype),
        OVERLAP=overlaps(), launch_pdl=overlaps(), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        _combine[(sequences, heads)](
            parts, contexts, out, out.stride(0), splits,
            HEAD_DIM=head_dim, PADDED_DIM=padded, TILE=tokens, CHUNK=max(chunk, tokens), SPLITS_AT_ONCE=16,
            OVERLAP=overlaps(), launch_pdl=overlaps(), num_warps=4,
        )  # fmt: skip
    return out


def precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies: float32 as three products in TF32, good to about 1e-6; other types know one way only.

    One product in TF32 would be good to 1e-3; float32 outside the tensor cores spills registers by the kilobyte.
    """
    return "tf32x3" if dtype == torch.float32 else "tf32"


@triton.jit
def _chunk_of(context, splits, TILE: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tokens of a part: an equal share of the context, in whole tiles."""
    return tl.maximum(tl.cdiv(tl.cdiv(context, splits), TILE) * TILE, CHUNK)


@triton.jit
def _scales_of(parts, sequences, heads, splits, PADDED_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the maximum and the sum of each part lie, pair by pair: behind all the outputs."""
    return parts + (splits * sequences).to(tl.int64) * heads * PADDED_DIM


@triton.jit
def _rows_of(table, start, end, tokens, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the rows of a tile begin, counted in rows of the cache: [TILE] int64, or a scalar if one block holds it."""
    if BLOCK_SIZE % TILE == 0:
        block = tl.load(table + start // BLOCK_SIZE, mask=start < end, other=0)
        return block.to(tl.int64) * BLOCK_SIZE + start % BLOCK_SIZE
    else:
        at = start + tokens
        block = tl.load(table + at // BLOCK_SIZE, mask=at < end, other=0)
        return block.to(tl.int64) * BLOCK_SIZE + at % BLOCK_SIZE - tokens


@triton.jit(do_not_specialize=["table_stride", "blocks"], do_not_specialize_on_alignment=["block_tables", "contexts"])
def _decode(  # type: ignore[no-untyped-def]
    queries, cache, block_tables, contexts, out, parts,
    scale, query_stride, out_stride, table_stride, blocks,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context = tl.load(contexts + sequence)
    chunk = _chunk_of(context, tl.num_programs(2), TILE, CHUNK)
    lower = split * chunk
    upper = tl.minimum(lower + chunk, context)
    if SPLIT:
        if lower >= context:
            return
    rows, dims, tokens = tl.arange(0, ROWS), tl.arange(0, PADDED_DIM), tl.arange(0, TILE)
    heads = kv_head * GROUP + rows
    in_head = dims < HEAD_DIM
    query_at = queries + sequence.to(tl.int64) * query_stride + heads[:, None] * HEAD_DIM + dims[None, :]
    query = tl.load(query_at, mask=(rows < GROUP)[:, None] & in_head[None, :], other=0.0)

    # Block ids pass from one iteration to the next: where keys and values hang on a load of the same iteration,
    # Triton's pipeliner gives half of its stages to that load.
    table = block_tables + sequence.to(tl.int64) * table_stride
    keys = cache + kv_head.to(tl.int64) * blocks * (BLOCK_SIZE * HEAD_DIM)
    values = keys + tl.num_programs(1).to(tl.int64) * blocks * (BLOCK_SIZE * HEAD_DIM)
    offsets = tokens[:, None] * HEAD_DIM + dims[None, :]
    first = _rows_of(table, lower, upper, tokens, BLOCK_SIZE, TILE)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    # Sums stay apart by column until the end: one reduction across warps less an iteration.
    sums = tl.zeros([ROWS, TILE], tl.float32)
    acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    for start in tl.range(lower, upper, TILE):
        if BLOCK_SIZE % TILE == 0:
            at = first * HEAD_DIM + offsets
        else:
            at = first[:, None] * HEAD_DIM + offsets
        first = _rows_of(table, start + TILE, upper, tokens, BLOCK_SIZE, TILE)
        seen = start + tokens < upper
        if HEAD_DIM == PADDED_DIM:
            wanted = seen[:, None]
        else:
            wanted = seen[:, None] & in_head[None, :]
        key = tl.load(keys + at, mask=wanted, other=0.0)
        value = tl.load(values + at, mask=wanted, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shares = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        sums = sums * shrink[:, None] + shares
        acc = tl.dot(shares.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    total = tl.sum(sums, 1)
    if SPLIT:
        row = (split * tl.num_programs(0) + sequence).to(tl.int64) * (tl.num_programs(1) * GROUP) + heads
        tl.store(parts + row[:, None] * PADDED_DIM + dims[None, :], acc, mask=(rows < GROUP)[:, None])
        scales = _scales_of(parts, tl.num_programs(0), tl.num_programs(1) * GROUP, tl.num_programs(2), PADDED_DIM)
        tl.store(scales + 2 * row, top, mask=rows < GROUP)
        tl.store(scales + 2 * row + 1, total, mask=rows < GROUP)
    else:
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        out_at = out + sequence.to(tl.int64) * out_stride + heads[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_at, result.to(out.dtype.element_ty), mask=(rows < GROUP)[:, None] & in_head[None, :])


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["contexts"])
def _combine(  # type: ignore[no-untyped-def]
    parts, contexts, out, out_stride, splits,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Weighs the parts of one query head by their sums, which are brought to a common maximum."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    sequence, head = tl.program_id(0), tl.program_id(1)
    context = tl.load(contexts + sequence)
    used = tl.cdiv(context, _chunk_of(context, splits, TILE, CHUNK))
    dims = tl.arange(0, PADDED_DIM)
    scales = _scales_of(parts, tl.num_programs(0), tl.num_programs(1), splits, PADDED_DIM)
    top, total = float("-inf"), 0.0
    acc = tl.zeros([PADDED_DIM], tl.float32)
    for start in range(0, used, SPLITS_AT_ONCE):
        split = start + tl.arange(0, SPLITS_AT_ONCE)
        exists = split < used
        row = (split * tl.num_programs(0) + sequence).to(tl.int64) * tl.num_programs(1) + head
        tops = tl.load(scales + 2 * row, mask=exists, other=float("-inf"))
        sums = tl.load(scales + 2 * row + 1, mask=exists, other=0.0)
        part = tl.load(parts + row[:, None] * PADDED_DIM + dims[None, :], mask=exists[:, None], other=0.0)
        new_top = tl.maximum(top, tl.max(tops, 0))
        weights = tl.exp2(tops - new_top)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(sums * weights, 0)
        acc = acc * shrink + tl.sum(part * weights[:, None], 0)
        top = new_top
    result = acc / tl.where(total > 0, total, 1.0)
    out_at = out + sequence.to(tl.int64) * out_stride + head * HEAD_DIM + dims
    tl.store(out_at, result.to(out.dtype.element_ty), mask=dims < HEAD_DIM)


def _case(group: int, head_dim: int, block_size: int, split: bool) -> CompileCase:
    padded = triton.next_power_of_2(head_dim)
    tile = TILES[padded]
    pointers = {"queries": "*bf16", "cache": "*bf16", "block_tables": "*i32", "contexts": "*i32", "out": "*bf16"}
    numbers = {
        "scale": "fp32",
        "query_stride": "i32:16",
        "out_stride": "i32:16",
        "table_stride": "i32",
        "blocks": "i32",
    }
    constexprs: dict[str, Any] = {
        "GROUP": group, "ROWS": 16, "HEAD_DIM": head_dim, "PADDED_DIM": padded, "BLOCK_SIZE": block_size,
        "TILE": tile.tokens, "CHUNK": 512, "SPLIT": split, "PRECISION": "tf32", "OVERLAP": True,
    }  # fmt: skip
    name = f"decode group {group} d{head_dim} block {block_size}{' split' if split else ''}"
    signature = {**pointers, "parts": "*fp32", **numbers}
    return CompileCase(name, _decode, signature, constexprs, tile.num_warps, tile.num_stages)


COMPILE_CASES = [
    _case(4, 128, 16, split=True),
    _case(6, 128, 64, split=True),
    _case(7, 128, 64, split=False),
    _case(4, 96, 16, split=True),
    _case(4, 64, 16, split=True),
    CompileCase(
        "decode, parts combined",
        _combine,
        {"parts": "*fp32", "contexts": "*i32", "out": "*bf16", "out_stride": "i32:16", "splits": "i32"},
        {"HEAD_DIM": 128, "PADDED_DIM": 128, "TILE": 64, "CHUNK": 512, "SPLITS_AT_ONCE": 16, "OVERLAP": True},
    ),
]
