"""4-bit linear layers for more rows: the weight is dequantised on its way to the tensor cores.

Weights take the rows of the product, because the tensor cores of Hopper take those from registers, where the levels are
unpacked and scaled; x comes through shared memory. While one tile is multiplied the next is unpacked. A weight is
rounded to x's dtype, as it is where it is dequantised first, after its scale was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit.kernels.compile_check import CompileCase
from labkit.kernels.w4a16_few import INTERPRETED, halves, pair_of_levels
from labkit.kernels.w4a16_layout import Packed


@dataclass(frozen=True)
class Many:
    """How the work is cut: see ``_many``."""

    tiles: int
    rows: int
    splits: int
    warps: int
    stages: int


def many_triton(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """The product of contiguous rows; the inputs fill their tiles."""
    return launch(x, packed, bias, tuning(len(x), packed.outputs, packed.inputs))


def tuning(rows: int, outputs: int, inputs: int) -> Many:
    """The fastest of a sweep on an H200 over squares of 4096 and 8192: some 250 to 500 programs."""
    blocks = inputs // 128
    if rows <= 32:
        return Many(4, 32, min(4 if outputs >= 8192 else 8, blocks), 4, 4)
    if rows <= 64:
        return Many(4, 64, min(4, blocks), 4, 3)
    if outputs >= 8192:
        return Many(8, 128, 1, 8, 3)
    return Many(4, 64, min(2, blocks), 4, 4) if rows <= 128 else Many(4, 128, min(2, blocks), 4, 3)


def launch(x: Tensor, packed: Packed, bias: Tensor | None, cut: Many) -> Tensor:
    rows, inputs = x.shape
    out = torch.empty((rows, packed.outputs), dtype=x.dtype, device=x.device)
    whole = cut.splits == 1
    parts = out if whole else torch.empty((cut.splits, *out.shape), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(packed.outputs, cut.tiles * 16), triton.cdiv(rows, cut.rows), cut.splits)
    _many[grid](
        x, packed.words, packed.scales, bias if whole else None, parts, rows, packed.outputs, INPUTS=inputs,
        BLOCKS=inputs // 128, LAST_TILE=packed.words.shape[0] - 1, BIAS=bias is not None and whole, ROWS=cut.rows,
        TILES=cut.tiles, SPLITS=cut.splits, STAGES=cut.stages, ASSEMBLY=not INTERPRETED, num_warps=cut.warps,
    )  # fmt: skip
    if not whole:
        block = 1024
        _add[(rows, triton.cdiv(packed.outputs, block))](
            parts, bias, out, rows, packed.outputs, BIAS=bias is not None, SPLITS=cut.splits, BLOCK=block
        )
    return out


def dequantize_triton(packed: Packed, dtype: torch.dtype) -> Tensor:
    """``w4a16_layout.dequantize``, but with the scales rounded to the dtype first. The inputs fill their tiles."""
    out = torch.empty((packed.outputs, packed.inputs), dtype=dtype, device=packed.words.device)
    blocks = packed.words.shape[1]
    per = _per(blocks)
    _dequantize[(packed.words.shape[0], blocks // per)](
        packed.words, packed.scales, out, packed.outputs, BLOCKS=blocks, PER=per, ASSEMBLY=not INTERPRETED, num_warps=4
    )
    return out


def _per(blocks: int) -> int:
    return 8 if blocks % 8 == 0 else 4 if blocks % 4 == 0 else 1


@triton.jit
def scaled(words, scale, i: tl.constexpr, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """The weights of the levels ``i`` of words, in a new last dimension; scale: float16, of the words' shape."""
    factor = scale.to(tl.float32).to(dtype)
    pair = pair_of_levels(words, i, dtype, ASSEMBLY)
    if ASSEMBLY:
        half = factor.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        twice = half | (half << 16)
        if dtype == tl.bfloat16:
            pair = tl.inline_asm_elementwise(
                "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [pair, twice], dtype=tl.int32, is_pure=True, pack=1
            )
        else:
            pair = tl.inline_asm_elementwise(
                "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [pair, twice], dtype=tl.int32, is_pure=True, pack=1
            )
        return halves(pair, dtype, True)
    else:
        return halves(pair, dtype, False) * tl.expand_dims(factor, -1)


@triton.jit
def _load_words(at, step):  # type: ignore[no-untyped-def]
    # A lane is to take a word, its neighbours those that follow and then rows: the order of these figures, true or not,
    # says so.
    at = tl.max_contiguous(at + step * 256, (1, 1, 2, 4, 8))
    return tl.load(tl.multiple_of(at, (4, 4, 4, 4, 4)))


@triton.jit
def _many(  # type: ignore[no-untyped-def]
    x_ptr,
    words_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    rows,
    outputs,
    INPUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LAST_TILE: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """A tile [TILES * 16 outputs, ROWS] of the product, over one of SPLITS parts of the inputs."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    first = tl.program_id(2) * BLOCKS // SPLITS
    last = (tl.program_id(2) + 1) * BLOCKS // SPLITS - 1
    # words: [row / 8, chunk, tile, row % 8, word]. Tiles past the last are read as the last, and not stored.
    octave = tl.arange(0, 2)[:, None, None, None, None]
    chunk = tl.arange(0, 4)[None, :, None, None, None]
    tile = tl.minimum(tl.program_id(0) * TILES + tl.arange(0, TILES), LAST_TILE)[None, None, :, None, None]
    row = octave * 8 + tl.arange(0, 8)[None, None, None, :, None]
    word = tl.arange(0, 4)[None, None, None, None, :]
    words_at = words_ptr + tile.to(tl.int64) * (BLOCKS * 256) + row * 16 + chunk * 4 + word
    scales_at = scales_ptr + tile.to(tl.int64) * (BLOCKS * 16) + row
    x_row = tl.minimum(tl.program_id(1) * ROWS + tl.arange(0, ROWS), rows - 1)
    x_at = x_ptr + x_row[:, None] * INPUTS + tl.arange(0, 128)[None, :]
    words = _load_words(words_at, first)
    scale = tl.load(scales_at + first * 16)
    sums = tl.zeros([TILES * 16, ROWS], tl.float32)
    for step in tl.range(first, last + 1, num_stages=STAGES):
        x = tl.load(x_at + step * 128)
        following = tl.minimum(step + 1, last)
        next_words = _load_words(words_at, following)
        next_scale = tl.load(scales_at + following * 16)
        # The inputs in their order: [row / 8, chunk, tile, row % 8, word, half, i / 2, i % 2].
        even = tl.join(scaled(words, scale, 0, dtype, ASSEMBLY), scaled(words, scale, 2, dtype, ASSEMBLY))
        odd = tl.join(scaled(words, scale, 1, dtype, ASSEMBLY), scaled(words, scale, 3, dtype, ASSEMBLY))
        weight = tl.permute(tl.join(even, odd), (2, 0, 3, 6, 7, 1, 4, 5)).reshape(TILES * 16, 128)
        sums = tl.dot(weight, tl.trans(x), sums)
        words = next_words
        scale = next_scale
    output = tl.program_id(0) * TILES * 16 + tl.arange(0, TILES * 16)[:, None]
    if BIAS:
        sums += tl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)
    out_row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[None, :]
    at = out_ptr + (tl.program_id(2) * rows + out_row).to(tl.int64) * outputs + output
    tl.store(at, sums.to(out_ptr.dtype.element_ty), mask=(output < outputs) & (out_row < rows))


@triton.jit
def _add(  # type: ignore[no-untyped-def]
    parts_ptr, bias_ptr, out_ptr, rows, outputs, BIAS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of parts [SPLITS, rows, outputs] in their order."""
    output = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = output < outputs
    at = parts_ptr + tl.program_id(0).to(tl.int64) * outputs + output
    total = tl.load(at, mask=known, other=0.0)
    for part in tl.static_range(1, SPLITS):
        total += tl.load(at + (rows * part).to(tl.int64) * outputs, mask=known, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + output, mask=known, other=0.0).to(tl.float32)
    out = out_ptr + tl.program_id(0).to(tl.int64) * outputs + output
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=known)


@triton.jit
def _dequantize(  # type: ignore[no-untyped-def]
    words_ptr, scales_ptr, out_ptr, outputs, BLOCKS: tl.constexpr, PER: tl.constexpr, ASSEMBLY: tl.constexpr
):
    """PER tiles of the same outputs."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tile, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * PER
    # [output, block, chunk, word]
    row = tl.arange(0, 16)[:, None, None, None]
    block = first + tl.arange(0, PER)[None, :, None, None]
    place = tl.arange(0, 4)[None, None, :, None] * 4 + tl.arange(0, 4)[None, None, None, :]
    words = tl.load(words_ptr + (tile * BLOCKS + block) * 256 + row * 16 + place)
    scale = tl.load(scales_ptr + (tile * BLOCKS + block) * 16 + row)
    even = tl.join(scaled(words, scale, 0, dtype, ASSEMBLY), scaled(words, scale, 2, dtype, ASSEMBLY))
    odd = tl.join(scaled(words, scale, 1, dtype, ASSEMBLY), scaled(words, scale, 3, dtype, ASSEMBLY))
    weight = tl.permute(tl.join(even, odd), (0, 1, 5, 6, 2, 3, 4)).reshape(16, PER * 128)
    output = tile * 16 + tl.arange(0, 16)[:, None]
    at = out_ptr + output * (BLOCKS * 128) + first * 128 + tl.arange(0, PER * 128)[None, :]
    tl.store(at, weight, mask=output < outputs)


def _case(rows: int, outputs: int, inputs: int) -> CompileCase:
    cut = tuning(rows, outputs, inputs)
    types = {"x_ptr": "*bf16", "words_ptr": "*i32", "scales_ptr": "*fp16", "outputs": "i32:16", "rows": "i32:16"}
    types |= {"out_ptr": "*bf16" if cut.splits == 1 else "*fp32"}
    constants: dict[str, Any] = {"INPUTS": inputs, "BLOCKS": inputs // 128, "LAST_TILE": outputs // 16 - 1}
    constants |= {"BIAS": False, "ROWS": cut.rows, "TILES": cut.tiles, "SPLITS": cut.splits, "STAGES": cut.stages}
    constants |= {"ASSEMBLY": True, "bias_ptr": None}
    return CompileCase(f"w4a16 {rows} rows {inputs} -> {outputs}", _many, types, constants, cut.warps, hgmma=True)


def _dequantize_case(inputs: int) -> CompileCase:
    types = {"words_ptr": "*i32", "scales_ptr": "*fp16", "out_ptr": "*bf16", "outputs": "i32:16"}
    return CompileCase(
        f"dequantise {inputs}",
        _dequantize,
        types,
        {"BLOCKS": inputs // 128, "PER": _per(inputs // 128), "ASSEMBLY": True},
    )


COMPILE_CASES = [
    _case(32, 4096, 4096),
    _case(64, 8192, 8192),
    _case(64, 3584, 18944),
    _case(256, 4096, 4096),
    _case(256, 17920, 1536),
    _case(128, 8192, 8192),
    _dequantize_case(8192),
]
