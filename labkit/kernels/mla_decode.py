"""Multi-head latent attention of one token a sequence, absorbed, over the paged latents: the Triton kernel.

All heads meet the same latents, which are keys and values at once: a tile of them is loaded once and multiplied twice.
Latents take the rows of both products and heads the columns, since the tensor cores of Hopper multiply 64 rows at a
time but as few as 8 columns: 16 heads waste nothing. The context is split over programs so that a small batch fills the
GPU (split-KV; Flash-Decoding, Dao et al. 2023); a second kernel joins the parts. Grids depend on shapes alone.
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
def _part(context, split, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """First tile of a part of the context, and the tile past its last."""
    tiles = tl.cdiv(context, BLOCK_N)
    each = tl.maximum(tl.cdiv(tiles, SPLITS), LEAST)
    return tl.minimum(split * each, tiles), tl.minimum((split + 1) * each, tiles)


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["block_tables", "contexts"])
def _decode_kernel(  # type: ignore[no-untyped-def]
    absorbed,
    rotated,
    cache,
    block_tables,
    contexts,
    out,
    log_sums,
    scale,
    absorbed_sequence,
    absorbed_head,
    rotated_sequence,
    rotated_head,
    table_stride,
    heads,
    RANK: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of heads over a part of a sequence; out [SPLITS, sequences, heads, RANK], log_sums [SPLITS, sequences,
    heads] base 2, ``scale`` for base 2."""
    sequence, split = tl.program_id(1), tl.program_id(2)
    context = tl.load(contexts + sequence)
    first, last = _part(context, split, BLOCK_N, SPLITS, LEAST)
    if SPLITS > 1:
        if first >= last:
            return
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.arange(0, RANK)
    rotary = tl.arange(0, ROTARY)
    is_head = head < heads
    query = tl.load(
        absorbed + sequence * absorbed_sequence + head[:, None] * absorbed_head + column[None, :],
        mask=is_head[:, None],
        other=0.0,
    )
    rotated_query = tl.load(
        rotated + sequence * rotated_sequence + head[:, None] * rotated_head + rotary[None, :],
        mask=is_head[:, None],
        other=0.0,
    )
    table = block_tables + sequence * table_stride
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    sums = tl.zeros([RANK, BLOCK_H], tl.float32)
    for tile in range(first, last):
        token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        is_token = token < context
        block = tl.load(table + token // BLOCK_SIZE, mask=is_token, other=0).to(tl.int64)
        row = cache + (block * BLOCK_SIZE + token % BLOCK_SIZE) * (RANK + ROTARY)
        latents = tl.load(row[:, None] + column[None, :], mask=is_token[:, None], other=0.0)
        keys = tl.load(row[:, None] + RANK + rotary[None, :], mask=is_token[:, None], other=0.0)
        scores = tl.dot(latents, tl.trans(query), input_precision=PRECISION)
        scores = tl.dot(keys, tl.trans(rotated_query), scores, input_precision=PRECISION)
        scores = tl.where(is_token[:, None], scores * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 0))
        fade = tl.exp2(top - higher)
        shares = tl.exp2(scores - higher[None, :])
        total = total * fade + tl.sum(shares, 0)
        sums = tl.dot(tl.trans(latents), shares.to(latents.dtype), sums * fade[None, :], input_precision=PRECISION)
        top = higher
    total = tl.where(total == 0, 1.0, total)
    place = (split * tl.num_programs(1) + sequence).to(tl.int64) * heads + head
    result = sums / total[None, :]
    tl.store(out + place[None, :] * RANK + column[:, None], result.to(out.dtype.element_ty), mask=is_head[None, :])
    if SPLITS > 1:
        tl.store(log_sums + place, top + tl.log2(total), mask=is_head)


@triton.jit(do_not_specialize_on_alignment=["contexts"])
def _join_kernel(  # type: ignore[no-untyped-def]
    parts,
    log_sums,
    contexts,
    out,
    heads,
    RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
):
    """The parts of one head of one sequence, weighed by their sums of exponentials; out [sequences, heads, RANK]."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    tiles = tl.cdiv(tl.load(contexts + sequence), BLOCK_N)
    used = tl.cdiv(tiles, tl.maximum(tl.cdiv(tiles, SPLITS), LEAST))
    column = tl.arange(0, RANK)
    split = tl.arange(0, SPLITS)
    place = (sequence * heads + head).to(tl.int64)
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
    """Parts of a context so that there are two programs a processor, if it can be that long; a power of two."""
    processors = _processors(device.index or 0) if device.type == "cuda" else 1
    wanted = triton.cdiv(2 * processors, programs)
    possible = triton.cdiv(most_tokens, LEAST_TILES * block_n)
    return min(triton.next_power_of_2(min(wanted, possible)), MOST_SPLITS)


def mla_decode_triton(
    absorbed: Tensor,
    rotated: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    contexts: Tensor,
    scale: float,
    splits: int | None = None,
) -> Tensor:
    """``mla.mla_decode``; rank and rotary must be powers of two, at least 16. ``splits``: parts, a power of
    two; without it, those of the rule."""
    sequences, heads, rank = absorbed.shape
    rotary, block_size = rotated.shape[2], cache.shape[3]
    config = _config(heads)
    block_n = config["BLOCK_N"]
    head_tiles = triton.cdiv(heads, config["BLOCK_H"])
    if splits is None:
        splits = _splits(head_tiles * sequences, block_tables.shape[1] * block_size, block_n, absorbed.device)
    out = absorbed.new_empty(sequences, heads, rank)
    parts, log_sums = out, out
    if splits > 1:
        parts = torch.empty((splits, sequences, heads, rank), dtype=torch.float32, device=out.device)
        log_sums = torch.empty((splits, sequences, heads), dtype=torch.float32, device=out.device)
    _decode_kernel[head_tiles, sequences, splits](
        absorbed,
        rotated,
        cache,
        block_tables,
        contexts,
        parts,
        log_sums,
        scale * LOG2E,
        absorbed.stride(0),
        absorbed.stride(1),
        rotated.stride(0),
        rotated.stride(1),
        block_tables.stride(0),
        heads,
        RANK=rank,
        ROTARY=rotary,
        BLOCK_SIZE=block_size,
        SPLITS=splits,
        LEAST=LEAST_TILES,
        PRECISION="ieee" if out.dtype == torch.float32 else "tf32",
        **config,
    )
    if splits > 1:
        _join_kernel[sequences, heads](
            parts,
            log_sums,
            contexts,
            out,
            heads,
            RANK=rank,
            BLOCK_N=block_n,
            SPLITS=splits,
            LEAST=LEAST_TILES,
            num_warps=4,
        )
    return out


def _case(heads: int, splits: int) -> CompileCase:
    strides = ("absorbed_sequence", "absorbed_head", "rotated_sequence", "rotated_head")
    config: dict[str, Any] = dict(_config(heads))
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    return CompileCase(
        f"mla_decode {heads} heads, {splits} splits",
        _decode_kernel,
        {
            **dict.fromkeys(("absorbed", "rotated", "cache"), "*bf16"),
            **dict.fromkeys(("block_tables", "contexts"), "*i32"),
            "out": "*bf16" if splits == 1 else "*fp32",
            "log_sums": "*bf16" if splits == 1 else "*fp32",
            "scale": "fp32",
            **dict.fromkeys((*strides, "heads"), "i32:16"),
            "table_stride": "i32",
        },
        {
            "RANK": 512,
            "ROTARY": 64,
            "BLOCK_SIZE": 16,
            "SPLITS": splits,
            "LEAST": LEAST_TILES,
            "PRECISION": "tf32",
            **config,
        },
        **options,
        hgmma=True,
    )


COMPILE_CASES = [_case(heads, splits) for heads in (16, 128) for splits in (1, 8)]
COMPILE_CASES.append(
    CompileCase(
        "mla_join",
        _join_kernel,
        {**dict.fromkeys(("parts", "log_sums"), "*fp32"), "contexts": "*i32", "out": "*bf16", "heads": "i32:16"},
        {"RANK": 512, "BLOCK_N": 64, "SPLITS": 8, "LEAST": LEAST_TILES},
    )
)
