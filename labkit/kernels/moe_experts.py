"""SwiGLU experts as matrix products over groups of tokens: the Triton kernels.

A pair is a token and one of its experts; pair ``i`` is expert ``i % top_k`` of token ``i // top_k``. A first kernel
sorts the pairs by expert into tiles of one expert each, on the device, in a space whose size depends on shapes alone.
The products go over those tiles: gate and up with the gating, then down with the pair's weight; a sum over each
token's pairs ends it, in a fixed order and so without atomics, whose results would vary from run to run.

Weights take the rows of the products and tokens the columns, since the tensor cores of Hopper multiply 64 rows at a
time but as few as 8 columns: few tokens waste nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit.kernels.compile_check import CompileCase

PAIRS_AT_ONCE = 1024
FEW = {"BLOCK_P": 16, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
SOME = {"BLOCK_P": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
MANY = {"BLOCK_P": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


def _config(pairs: int, experts: int) -> dict[str, int]:
    """Tuning table, by the pairs that an expert has on average: pairs, outputs and inputs of a tile."""
    if pairs <= 16 * experts:
        return FEW
    return SOME if pairs <= 96 * experts else MANY


@triton.jit(do_not_specialize=["pairs", "tiles"], do_not_specialize_on_alignment=["tile_experts", "counters", "places"])
def _sort_kernel(  # type: ignore[no-untyped-def]
    expert_ids,
    order,
    tile_experts,
    counters,
    places,
    pairs,
    tiles,
    EXPERTS_PADDED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program. order [tiles * BLOCK_P]: the pairs of each tile, ``pairs`` where it has no more; tile_experts
    [tiles]: -1 past the last; counters [EXPERTS_PADDED] and places [pairs] are for its own use."""
    expert = tl.arange(0, EXPERTS_PADDED)
    tl.store(counters + expert, tl.zeros([EXPERTS_PADDED], tl.int32))
    tl.debug_barrier()
    for start in range(0, pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        is_pair = pair < pairs
        chosen = tl.load(expert_ids + pair, mask=is_pair, other=0)
        tl.store(places + pair, tl.atomic_add(counters + chosen, 1, mask=is_pair, sem="relaxed"), mask=is_pair)
    tl.debug_barrier()
    count = tl.load(counters + expert)
    has = tl.cdiv(count, BLOCK_P)
    first = tl.cumsum(has, 0) - has
    tl.debug_barrier()
    tl.store(counters + expert, first * BLOCK_P)
    for i in range(0, tl.max(has, 0)):
        tl.store(tile_experts + first + i, expert, mask=i < has)
    for i in range(0, BLOCK_P):
        empty = count + i
        tl.store(order + first * BLOCK_P + empty, tl.zeros_like(empty) + pairs, mask=empty < has * BLOCK_P)
    for start in range(tl.sum(has, 0), tiles, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        tl.store(tile_experts + tile, tl.full([CHUNK], -1, tl.int32), mask=tile < tiles)
    tl.debug_barrier()
    for start in range(0, pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        is_pair = pair < pairs
        chosen = tl.load(expert_ids + pair, mask=is_pair, other=0)
        place = tl.load(counters + chosen, mask=is_pair) + tl.load(places + pair, mask=is_pair)
        tl.store(order + place, pair, mask=is_pair)


@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["tile_experts"])
def _product_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    pair_weights,
    order,
    tile_experts,
    out,
    pairs,
    x_stride,
    inputs,
    outputs,
    PAIRS_PER_ROW: tl.constexpr,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of outputs for a tile of pairs; out [pairs, outputs].

    GATED: silu of the first ``outputs`` rows of an expert's weight times the rest; else times pair_weights [pairs].
    EVEN: ``inputs`` is a multiple of BLOCK_K.
    """
    expert = tl.load(tile_experts + tl.program_id(1))
    if expert < 0:
        return
    pair = tl.load(order + tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P))
    is_pair = pair < pairs
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = output < outputs
    one = tl.arange(0, BLOCK_K)
    x_rows = x + (tl.where(is_pair, pair, 0) // PAIRS_PER_ROW).to(tl.int64)[:, None] * x_stride + one[None, :]
    matrix = weight + expert.to(tl.int64) * (outputs * inputs * (2 if GATED else 1))
    rows = matrix + tl.where(is_output, output, 0)[:, None] * inputs + one[None, :]
    sums = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    up_sums = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    for start in range(0, inputs, BLOCK_K):
        # Rows past the last pair or output are read from valid places, and not stored.
        if EVEN:
            part, taken = tl.load(x_rows + start), tl.load(rows + start)
        else:
            is_input = (start + one < inputs)[None, :]
            part = tl.load(x_rows + start, mask=is_input, other=0.0)
            taken = tl.load(rows + start, mask=is_input, other=0.0)
        sums = tl.dot(taken, tl.trans(part), sums, input_precision=PRECISION)
        if GATED:
            if EVEN:
                up = tl.load(rows + outputs * inputs + start)
            else:
                up = tl.load(rows + outputs * inputs + start, mask=(start + one < inputs)[None, :], other=0.0)
            up_sums = tl.dot(up, tl.trans(part), up_sums, input_precision=PRECISION)
    if GATED:
        result = sums / (1.0 + tl.exp(-sums)) * up_sums
    else:
        result = sums * tl.load(pair_weights + pair, mask=is_pair, other=0.0)[None, :]
    places = out + pair.to(tl.int64)[None, :] * outputs + output[:, None]
    tl.store(places, result.to(out.dtype.element_ty), mask=is_pair[None, :] & is_output[:, None])


def _sort(expert_ids: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor]:
    """``order`` [tiles * block] and ``tile_experts`` [tiles], int32, with as many tiles as there could be."""
    pairs = expert_ids.numel()
    tiles = (pairs + min(pairs, experts) * (block - 1)) // block
    padded = triton.next_power_of_2(experts)
    sizes = (tiles * block, tiles, padded, pairs)
    space = torch.empty(sum(sizes), dtype=torch.int32, device=expert_ids.device)
    order, tile_experts, counters, places = space.split(sizes)
    _sort_kernel[(1,)](
        expert_ids,
        order,
        tile_experts,
        counters,
        places,
        pairs,
        tiles,
        EXPERTS_PADDED=padded,
        BLOCK_P=block,
        CHUNK=PAIRS_AT_ONCE,
        num_warps=8,
    )
    return order, tile_experts


def experts_triton(x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """``moe.experts`` in three launches and a sum. expert_ids, expert_weights and the experts must be contiguous."""
    (tokens, hidden), top_k = x.shape, expert_ids.shape[1]
    experts, _, inner = down.shape
    pairs = tokens * top_k
    config = _config(pairs, experts)
    order, tile_experts = _sort(expert_ids, experts, config["BLOCK_P"])
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    gated, parts = x.new_empty(pairs, inner), x.new_empty(pairs, hidden)
    for source, weight, out, per_row in ((x, gate_up, gated, top_k), (gated, down, parts, 1)):
        inputs, outputs = source.shape[1], out.shape[1]
        _product_kernel[triton.cdiv(outputs, config["BLOCK_N"]), len(tile_experts)](
            source,
            weight,
            expert_weights,
            order,
            tile_experts,
            out,
            pairs,
            source.stride(0),
            inputs,
            outputs,
            PAIRS_PER_ROW=per_row,
            GATED=weight is gate_up,
            EVEN=inputs % config["BLOCK_K"] == 0,
            PRECISION=precision,
            **config,
        )
    return parts.view(tokens, top_k, hidden).sum(1)


def _case(name: str, config: dict[str, int], gated: bool, even: bool) -> CompileCase:
    constexprs: dict[str, Any] = dict(config)
    options = {option: constexprs.pop(option) for option in ("num_warps", "num_stages")}
    return CompileCase(
        f"experts {name} {'gate_up' if gated else 'down'}{'' if even else ', odd'}",
        _product_kernel,
        {
            **dict.fromkeys(("x", "weight", "out"), "*bf16"),
            "pair_weights": "*fp32",
            **dict.fromkeys(("order", "tile_experts"), "*i32"),
            "pairs": "i32",
            **dict.fromkeys(("x_stride", "inputs", "outputs"), "i32:16"),
        },
        {"PAIRS_PER_ROW": 8 if gated else 1, "GATED": gated, "EVEN": even, "PRECISION": "tf32", **constexprs},
        **options,
        hgmma=True,
    )


COMPILE_CASES = [
    _case(name, config, gated, even)
    for name, config in (("few", FEW), ("some", SOME), ("many", MANY))
    for gated in (True, False)
    for even in (True, False)
] + [
    CompileCase(
        "experts sort",
        _sort_kernel,
        {
            "expert_ids": "*i64",
            **dict.fromkeys(("order", "tile_experts", "counters", "places"), "*i32"),
            **dict.fromkeys(("pairs", "tiles"), "i32"),
        },
        {"EXPERTS_PADDED": 256, "BLOCK_P": 16, "CHUNK": PAIRS_AT_ONCE},
        8,
    )
]
