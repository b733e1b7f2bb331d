"""Multi-head latent attention of single tokens, absorbed, over the paged latents: the Triton kernels.

All heads meet the same latents, which are keys and values at once: a tile of them is loaded once and multiplied twice.
Latents take the rows of both products and heads the columns, since the tensor cores of Hopper multiply 64 rows at a
time but as few as 8 columns: 16 heads waste nothing. The context is split over programs so that a small batch fills the
GPU (split-KV; Flash-Decoding, Dao et al. 2023); a second kernel joins the parts. Grids depend on shapes alone.

The tokens of a chunk of a prompt can be taken one by one as well, each with the context that ends with it.
"""

from __future__ import annotations

from functools import cache as once
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit.kernels.compile_check import CompileCase

LOG2E = 1.4426950408889634
LEAST_TILES = 4
"""A part has at least this many tiles: fewer, and its result costs more traffic than its latents."""
MOST_SPLITS = 64


FEW_HEADS = {"BLOCK_H": 16, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
MANY_HEADS = {"BLOCK_H": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
"""Tuning table: heads and latents of a tile. 64 heads a tile would halve the reads again, but spill registers."""


def _config(heads: int) -> dict[str, int]:
    return FEW_HEADS if heads <= 16 else MANY_HEADS


@triton.jit
def _context_of(  # type: ignore[no-untyped-def]
    row, contexts, query_starts, sequences, CHUNKED: tl.constexpr
):
    """The sequence of a row and the tokens that it sees, none if it is padding. Without CHUNKED each row is one
    sequence; with it, query_starts [sequences + 1] tell whose it is, counted from the first of them."""
    sequence = row
    context = tl.load(contexts + row, mask=row < sequences, other=0)
    if CHUNKED:
        base = tl.load(query_starts)
        sequence = -1
        for low in range(0, sequences, 128):
            i = low + tl.arange(0, 128)
            begin = tl.load(query_starts + i, mask=i < sequences, other=0) - base
            sequence += tl.sum(((i < sequences) & (begin <= row)).to(tl.int32), 0)
        later = tl.load(query_starts + sequence + 1) - base - 1 - row
        context = tl.where(later < 0, 0, tl.load(contexts + sequence) - later)
    return sequence, context


@triton.jit
def _tiles_of_part(context, splits, BLOCK_N: tl.constexpr, LEAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tiles of a context, and of each of its parts but the last."""
    tiles = tl.cdiv(context, BLOCK_N)
    return tiles, tl.maximum(tl.cdiv(tiles, splits), LEAST)


@triton.jit
def _rows_of(table, tile, context, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the tokens of a tile lie, in rows of the cache: [BLOCK_N] int64."""
    token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.load(table + token // BLOCK_SIZE, mask=token < context, other=0)
    return block.to(tl.int64) * BLOCK_SIZE + token % BLOCK_SIZE


@triton.jit(
    do_not_specialize=["table_stride", "sequences"],
    do_not_specialize_on_alignment=["block_tables", "contexts", "query_starts"],
)
def _decode_kernel(  # type: ignore[no-untyped-def]
    absorbed,
    rotated,
    cache,
    block_tables,
    contexts,
    query_starts,
    out,
    log_sums,
    scale,
    absorbed_row,
    absorbed_head,
    rotated_row,
    rotated_head,
    table_stride,
    sequences,
    heads,
    RANK: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNKED: tl.constexpr,
    LEAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of heads of one row over a part of its context; out [splits, rows, heads, RANK], log_sums [splits, rows,
    heads] base 2, ``scale`` for base 2."""
    row, split = tl.program_id(1), tl.program_id(2)
    sequence, context = _context_of(row, contexts, query_starts, sequences, CHUNKED)
    tiles, each = _tiles_of_part(context, tl.num_programs(2), BLOCK_N, LEAST)
    first, last = tl.minimum(split * each, tiles), tl.minimum((split + 1) * each, tiles)
    if SPLIT:
        if first >= last:
            return
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.arange(0, RANK)
    rotary = tl.arange(0, ROTARY)
    is_head = head < heads
    query_at = absorbed + row.to(tl.int64) * absorbed_row + head.to(tl.int64)[:, None] * absorbed_head + column[None, :]
    query = tl.load(query_at, mask=is_head[:, None], other=0.0)
    rotated_at = rotated + row.to(tl.int64) * rotated_row + head[:, None] * rotated_head + rotary[None, :]
    rotated_query = tl.load(rotated_at, mask=is_head[:, None], other=0.0)
    table = block_tables + sequence.to(tl.int64) * table_stride
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    sums = tl.zeros([RANK, BLOCK_H], tl.float32)
    # Rows pass from one iteration to the next: where latents hang on a load of the same iteration, Triton's pipeliner
    # gives half of its stages to that load.
    at = _rows_of(table, first, context, BLOCK_SIZE, BLOCK_N)
    for tile in range(first, last):
        place = cache + at[:, None] * (RANK + ROTARY)
        at = _rows_of(table, tile + 1, context, BLOCK_SIZE, BLOCK_N)
        is_token = (tile * BLOCK_N + tl.arange(0, BLOCK_N) < context)[:, None]
        latents = tl.load(place + column[None, :], mask=is_token, other=0.0)
        keys = tl.load(place + RANK + rotary[None, :], mask=is_token, other=0.0)
        scores = tl.dot(latents, tl.trans(query), input_precision=PRECISION)
        scores = tl.dot(keys, tl.trans(rotated_query), scores, input_precision=PRECISION)
        scores = tl.where(is_token, scores * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 0))
        fade = tl.exp2(top - higher)
        shares = tl.exp2(scores - higher[None, :])
        total = total * fade + tl.sum(shares, 0)
        sums = tl.dot(tl.trans(latents), shares.to(latents.dtype), sums * fade[None, :], input_precision=PRECISION)
        top = higher
    total = tl.where(total == 0, 1.0, total)
    target = (split * tl.num_programs(1) + row).to(tl.int64) * heads + head
    result = (sums / total[None, :]).to(out.dtype.element_ty)
    tl.store(out + target[None, :] * RANK + column[:, None], result, mask=is_head[None, :])
    if SPLIT:
        tl.store(log_sums + target, top + tl.log2(total), mask=is_head)


@triton.jit(do_not_specialize=["sequences", "splits"], do_not_specialize_on_alignment=["contexts", "query_starts"])
def _join_kernel(  # type: ignore[no-untyped-def]
    parts,
    log_sums,
    contexts,
    query_starts,
    out,
    sequences,
    heads,
    splits,
    RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    CHUNKED: tl.constexpr,
    LEAST: tl.constexpr,
):
    """The parts of one head of one row, weighed by their sums of exponentials; out [rows, heads, RANK]."""
    row, head = tl.program_id(0), tl.program_id(1)
    _, context = _context_of(row, contexts, query_starts, sequences, CHUNKED)
    tiles, each = _tiles_of_part(context, splits, BLOCK_N, LEAST)
    used = tl.cdiv(tiles, each)
    column = tl.arange(0, RANK)
    split = tl.arange(0, MOST_SPLITS)
    place = row.to(tl.int64) * heads + head
    step = tl.num_programs(0).to(tl.int64) * heads
    logs = tl.load(log_sums + place + split * step, mask=split < used, other=float("-inf"))
    top = tl.where(used == 0, 0.0, tl.max(logs, 0))
    total = tl.sum(tl.exp2(logs - top), 0)
    joined = tl.zeros([RANK], tl.float32)
    for i in range(0, used):
        weight = tl.exp2(tl.load(log_sums + place + i * step) - top) / total
        joined += weight * tl.load(parts + (place + i * step) * RANK + column)
    tl.store(out + place * RANK + column, joined.to(out.dtype.element_ty))


@once
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _splits(programs: int, most_tokens: int, block_n: int, device: torch.device) -> int:
    """Parts of a context so that there are two programs a processor, if it can be that long."""
    processors = _processors(device.index or 0) if device.type == "cuda" else 1
    wanted = triton.cdiv(2 * processors, programs)
    return max(1, min(wanted, triton.cdiv(most_tokens, LEAST_TILES * block_n), MOST_SPLITS))


def mla_decode_triton(
    absorbed: Tensor,
    rotated: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    contexts: Tensor,
    scale: float,
    out: Tensor,
    query_starts: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attention of single tokens over the latents of their sequences, whose weighted sums it puts into ``out``.

    absorbed: [rows, heads, rank], a query times its head's key expansion; rotated: [rows, heads, rotary]; both may have
    any strides but that of the last dimension; rank and rotary: powers of two, at least 16. cache as in
    ``labkit.kernels.mla``; block_tables: [sequences, widest] int32; contexts: [sequences] int32, with the new tokens;
    ``scale``: that of the expanded queries; out: [rows, heads, rank], contiguous, zeros where a row sees nothing.

    A row is a sequence, unless query_starts [sequences + 1] int32 are given: then sequence i has the rows from
    query_starts[i] on, counted from query_starts[0], and the last of them sees its whole context. ``splits`` overrides
    the rule, for tuning.
    """
    rows, heads, rank = absorbed.shape
    block_size = cache.shape[3]
    config = _config(heads)
    block_n = config["BLOCK_N"]
    head_tiles = triton.cdiv(heads, config["BLOCK_H"])
    if splits is None:
        splits = _splits(head_tiles * rows, block_tables.shape[1] * block_size, block_n, out.device)
    parts, log_sums = out, out
    if splits > 1:
        parts = torch.empty((splits, rows, heads, rank), dtype=torch.float32, device=out.device)
        log_sums = torch.empty((splits, rows, heads), dtype=torch.float32, device=out.device)
    chunked = query_starts is not None
    starts = contexts if query_starts is None else query_starts
    _decode_kernel[head_tiles, rows, splits](
        absorbed,
        rotated,
        cache,
        block_tables,
        contexts,
        starts,
        parts,
        log_sums,
        scale * LOG2E,
        absorbed.stride(0),
        absorbed.stride(1),
        rotated.stride(0),
        rotated.stride(1),
        block_tables.stride(0),
        len(contexts),
        heads,
        RANK=rank,
        ROTARY=rotated.shape[2],
        BLOCK_SIZE=block_size,
        SPLIT=splits > 1,
        CHUNKED=chunked,
        LEAST=LEAST_TILES,
        PRECISION="ieee" if out.dtype == torch.float32 else "tf32",
        **config,
    )
    if splits > 1:
        _join_kernel[rows, heads](
            parts,
            log_sums,
            contexts,
            starts,
            out,
            len(contexts),
            heads,
            splits,
            RANK=rank,
            BLOCK_N=block_n,
            MOST_SPLITS=MOST_SPLITS,
            CHUNKED=chunked,
            LEAST=LEAST_TILES,
            num_warps=4,
        )
    return out


def _case(heads: int, split: bool, chunked: bool) -> CompileCase:
    config: dict[str, Any] = dict(_config(heads))
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    strides = ("absorbed_row", "absorbed_head", "rotated_row", "rotated_head", "heads")
    return CompileCase(
        f"mla_decode {heads} heads{', split' if split else ''}{', chunked' if chunked else ''}",
        _decode_kernel,
        {
            **dict.fromkeys(("absorbed", "rotated", "cache"), "*bf16"),
            **dict.fromkeys(("block_tables", "contexts", "query_starts"), "*i32"),
            **dict.fromkeys(("out", "log_sums"), "*fp32" if split else "*bf16"),
            "scale": "fp32",
            **dict.fromkeys(strides, "i32:16"),
            **dict.fromkeys(("table_stride", "sequences"), "i32"),
        },
        {
            "RANK": 512,
            "ROTARY": 64,
            "BLOCK_SIZE": 16,
            "SPLIT": split,
            "CHUNKED": chunked,
            "LEAST": LEAST_TILES,
            "PRECISION": "tf32",
            **config,
        },
        **options,
        hgmma=True,
    )


COMPILE_CASES = [
    *(_case(heads, split, False) for heads in (16, 128) for split in (True, False)),
    *(_case(heads, False, True) for heads in (16, 128)),
    CompileCase(
        "mla_join",
        _join_kernel,
        {
            **dict.fromkeys(("parts", "log_sums"), "*fp32"),
            **dict.fromkeys(("contexts", "query_starts"), "*i32"),
            "out": "*bf16",
            "heads": "i32:16",
            **dict.fromkeys(("sequences", "splits"), "i32"),
        },
        {"RANK": 512, "BLOCK_N": 64, "MOST_SPLITS": MOST_SPLITS, "CHUNKED": True, "LEAST": LEAST_TILES},
    ),
]
