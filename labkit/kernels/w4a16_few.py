"""4-bit linear layers for a few rows, at the speed of memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit.kernels.compile_check import CompileCase
from labkit.kernels.overlap import gdc_launch_dependents, gdc_wait, overlaps
from labkit.kernels.w4a16_layout import Packed

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""The interpreter knows no assembly, and computes the same without."""


@dataclass(frozen=True)
class Few:
    """How the work is cut: see ``_few``."""

    tiles: int
    warps: int
    depth: int
    splits: int = 1

    def outputs(self, silu: bool) -> int:
        """Outputs of a program, after the gate if there is one."""
        return 16 * (self.tiles // 2 if silu else self.tiles)


def few_triton(x: Tensor, packed: Packed, bias: Tensor | None = None, silu: bool = False) -> Tensor:
    """The product of up to 16 contiguous rows; with ``silu``, silu(first half of the outputs) * the rest."""
    outputs = packed.outputs // 2 if silu else packed.outputs
    return launch(x, packed, bias, silu, tuning(len(x), outputs, packed.inputs, silu))


def launch(x: Tensor, packed: Packed, bias: Tensor | None, silu: bool, cut: Few) -> Tensor:
    rows, inputs = x.shape
    outputs = packed.outputs // 2 if silu else packed.outputs
    cut = fitted(cut, outputs, silu)
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    programs = triton.cdiv(outputs, cut.outputs(silu))
    # the parts of each program's sums: [program, split, output, row]
    sums = (programs, cut.splits, cut.tiles * 16, 8 if rows <= 8 else 16)
    parts = None if cut.splits == 1 else torch.empty(sums, dtype=torch.float32, device=x.device)
    _few[(programs * cut.splits,)](
        x, packed.words, packed.scales, bias, out, parts, packed.arrivals, rows, outputs, INPUTS=inputs,
        BLOCKS=packed.words.shape[1], BIAS=bias is not None, SILU=silu, ROWS=padded(rows), TILES=cut.tiles,
        WARPS=cut.warps, DEPTH=cut.depth, SPLITS=cut.splits, ASSEMBLY=not INTERPRETED,
        OVERLAP=overlaps(), launch_pdl=overlaps(), num_warps=cut.warps,
    )  # fmt: skip
    return out


def fitted(cut: Few, outputs: int, silu: bool) -> Few:
    """The cut with the fewest tiles where its own do not divide the outputs: the last program would read past them."""
    return replace(cut, tiles=2 if silu else 1) if outputs % cut.outputs(silu) else cut


def padded(rows: int) -> int:
    """The rows that the tensor cores multiply; 1 of them only counts as 8."""
    return 1 if rows == 1 else 8 if rows <= 8 else 16


def tuning(rows: int, outputs: int, inputs: int, silu: bool) -> Few:
    """The fastest of a sweep on an H200 over the matrices of Qwen2.5 1.5B and 7B and squares of 4096 and 8192; with a
    gate, ``outputs`` are those after it."""
    long = inputs > 2 * outputs
    if padded(rows) == 16:
        if silu:
            return Few(2, 4, 2)
        return Few(2, 2, 2, splits=7) if long else Few(2, 1, 4, splits=8) if inputs <= 4096 else Few(4, 1, 1, splits=8)
    if silu:
        return Few(2, 2, 2) if outputs >= 16384 else Few(2, 4, 4)
    if long:
        return Few(1, 1, 2, splits=14)
    if inputs <= 2048:
        return Few(1, 4, 2)
    return Few(1, 2, 1, splits=8) if inputs <= 4096 else Few(1, 8, 1)


_PAIR = """{{
    .reg .b32 pair, zero;
    mov.b32 zero, 0x{zero:08x};
    lop3.b32 pair, $1, 0x000f000f, 0x{magic:08x}, 0xea;
    sub.rn.{kind} $0, pair, zero;
}}"""
BFLOAT16_PAIR = tl.constexpr(_PAIR.format(kind="bf16x2", magic=0x43004300, zero=0x43084308))
FLOAT16_PAIR = tl.constexpr(_PAIR.format(kind="f16x2", magic=0x64006400, zero=0x64086408))


@triton.jit
def pair_of_levels(words, i: tl.constexpr, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two levels less 8 of each word, as the two halves of an int32: the numbers of ``dtype`` next to each other.

    With the exponent of 128, whose last bits count ones, a level n makes 128 + n; of 1024 in float16.
    """
    shifted = words >> (4 * i)
    if ASSEMBLY:
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(BFLOAT16_PAIR, "=r,r", [shifted], dtype=tl.int32, is_pure=True, pack=1)
        else:
            return tl.inline_asm_elementwise(FLOAT16_PAIR, "=r,r", [shifted], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return (shifted & 0x000F000F) | (0x43004300 if dtype == tl.bfloat16 else 0x64006400)


@triton.jit
def halves(pair, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """The numbers of ``pair_of_levels`` in a new last dimension."""
    low = pair.to(tl.int16).to(dtype, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(dtype, bitcast=True)
    both = tl.join(low, high)
    if not ASSEMBLY:
        if dtype == tl.bfloat16:
            both = both - tl.full([1], 136.0, dtype)
        else:
            both = both - tl.full([1], 1032.0, dtype)
    return both


@triton.jit
def _load_scales(at, pitch, half, known, TILES: tl.constexpr):  # type: ignore[no-untyped-def]
    """[warps, TILES * 16] float16 from pointers [warps, 16] to the first tile; small loads, which go where they are
    used without a detour."""
    scales = tl.load(at, mask=known, other=0.0)
    if TILES == 2:
        s1 = tl.load(at + half, mask=known, other=0.0)
        scales = tl.permute(tl.join(scales, s1), (0, 2, 1)).reshape(scales.shape[0], 32)
    elif TILES == 4:
        s1 = tl.load(at + pitch, mask=known, other=0.0)
        s2 = tl.load(at + half, mask=known, other=0.0)
        s3 = tl.load(at + half + pitch, mask=known, other=0.0)
        pairs = tl.join(tl.join(scales, s2), tl.join(s1, s3))
        scales = tl.permute(pairs, (0, 2, 3, 1)).reshape(scales.shape[0], 64)
    return scales


@triton.jit
def _few(  # type: ignore[no-untyped-def]
    x_ptr,
    words_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    arrivals_ptr,
    rows,
    outputs,
    INPUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """TILES tiles of outputs, and of the inputs one of SPLITS parts; each warp multiplies every WARPS-th tile of them.

    ROWS: 1, 8 or 16. DEPTH: how many tiles ahead a warp loads into registers: 1, 2 or 4.
    The last to arrive of the programs with the same outputs adds the parts, always in the same order.
    """
    PART: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    COLUMNS: tl.constexpr = 8 if ROWS == 1 else ROWS
    HIGH: tl.constexpr = COLUMNS // 8
    # With a gate the second half of the tiles are those of up, ``outputs`` further on.
    GATED: tl.constexpr = 2 if SILU else 1
    EACH: tl.constexpr = TILES // GATED
    program = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    first_tile = program * EACH
    first_block = split * PART
    end = tl.minimum(first_block + PART, BLOCKS)
    half = (outputs // 16 if SILU else TILES // 2) * (BLOCKS * 16)
    # words: [row / 8, tile, warp, row % 8, word]
    part = tl.arange(0, TILES)
    tile = first_tile + part % EACH + (part // EACH) * (outputs // 16)
    tile_at = tile[None, :, None, None, None].to(tl.int64) * BLOCKS
    block = tl.arange(0, WARPS)[None, None, :, None, None]
    row = tl.arange(0, 2)[:, None, None, None, None] * 8 + tl.arange(0, 8)[None, None, None, :, None]
    words_at = words_ptr + (tile_at + block) * 256 + row * 16 + tl.arange(0, 16)[None, None, None, None, :]
    words_at = tl.max_contiguous(words_at, (1, 1, 4, 8, 16))
    # x: [row / 8, warp, row % 8, input]; rows past the last are read as the last, and not stored.
    x_row = tl.arange(0, HIGH)[:, None, None, None] * 8 + tl.arange(0, 8)[None, None, :, None]
    x_row = tl.minimum(x_row, rows - 1)
    x_block = first_block + tl.arange(0, WARPS)[None, :, None, None]
    x_input = tl.arange(0, 32)[None, None, None, :]
    # scales: [warp, output]
    warp = tl.arange(0, WARPS)[:, None]
    scales_at = scales_ptr + (first_tile.to(tl.int64) * BLOCKS + first_block + warp) * 16 + tl.arange(0, 16)[None, :]
    words_at += first_block * 256
    blocks = end - first_block

    total = tl.zeros([WARPS, TILES * 16, COLUMNS], tl.float32)
    w0 = _load_words(words_at, block, 0, blocks, WARPS)
    s0 = _load_scales(scales_at, BLOCKS * 16, half, warp < blocks, TILES)
    if DEPTH >= 2:
        w1 = _load_words(words_at, block, WARPS, blocks, WARPS)
        s1 = _load_scales(scales_at + WARPS * 16, BLOCKS * 16, half, warp + WARPS < blocks, TILES)
    if DEPTH >= 3:
        w2 = _load_words(words_at, block, 2 * WARPS, blocks, WARPS)
        s2 = _load_scales(scales_at + 2 * WARPS * 16, BLOCKS * 16, half, warp + 2 * WARPS < blocks, TILES)
        w3 = _load_words(words_at, block, 3 * WARPS, blocks, WARPS)
        s3 = _load_scales(scales_at + 3 * WARPS * 16, BLOCKS * 16, half, warp + 3 * WARPS < blocks, TILES)
    if OVERLAP:
        gdc_wait()
    for step in tl.range(0, PART, WARPS, num_stages=1):
        ahead = step + DEPTH * WARPS
        next_words = _load_words(words_at, block, ahead, blocks, WARPS)
        next_scales = _load_scales(scales_at + ahead * 16, BLOCKS * 16, half, warp + ahead < blocks, TILES)
        # All of x is under way before any of it is used; past the last block the scales are 0, whatever is read here.
        # That the loads are spelt out is what Triton's analysis of addresses wants.
        x_at = x_row * INPUTS + tl.minimum(x_block + step, BLOCKS - 1) * 128
        x0 = tl.load(x_ptr + tl.max_contiguous(x_at + x_input, (1, 4, 8, 32)))
        x1 = tl.load(x_ptr + tl.max_contiguous(x_at + (x_input + 32), (1, 4, 8, 32)))
        x2 = tl.load(x_ptr + tl.max_contiguous(x_at + (x_input + 64), (1, 4, 8, 32)))
        x3 = tl.load(x_ptr + tl.max_contiguous(x_at + (x_input + 96), (1, 4, 8, 32)))
        parts_of_x = (x0, x1, x2, x3)
        words = tl.reshape(w0, (2, TILES, WARPS, 8, 4, 4))
        sums = tl.zeros([WARPS, TILES * 16, COLUMNS], tl.float32)
        for i in tl.static_range(4):
            numbers = halves(pair_of_levels(words, i, dtype, ASSEMBLY), dtype, ASSEMBLY)
            # The order of the inputs in which no number has to move: [word / 2, chunk, word % 2, half].
            numbers = tl.reshape(numbers, (2, TILES, WARPS, 8, 4, 2, 4))
            a = tl.permute(numbers, (2, 1, 0, 3, 5, 4, 6)).reshape(WARPS, TILES * 16, 32)
            x = tl.reshape(parts_of_x[i], (HIGH, WARPS, 8, 4, 2, 4))
            b = tl.permute(x, (1, 4, 3, 5, 0, 2)).reshape(WARPS, 32, COLUMNS)
            sums = tl.dot(a, b, sums)
        total += sums * s0.to(tl.float32)[:, :, None]
        if DEPTH == 1:
            w0 = next_words
            s0 = next_scales
        elif DEPTH == 2:
            w0 = w1
            s0 = s1
            w1 = next_words
            s1 = next_scales
        elif DEPTH == 4:
            w0 = w1
            s0 = s1
            w1 = w2
            s1 = s2
            w2 = w3
            s2 = s3
            w3 = next_words
            s3 = next_scales
    if OVERLAP:
        gdc_launch_dependents()
    result = tl.sum(total, axis=0)
    if SPLITS == 1:
        _store(result, out_ptr, bias_ptr, first_tile, rows, outputs, EACH, COLUMNS, BIAS, SILU, dtype)
    else:
        part_at = tl.arange(0, TILES * 16)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        part_at += program * (SPLITS * TILES * 16 * COLUMNS)
        needed = tl.arange(0, COLUMNS)[None, :] < rows
        tl.store(parts_ptr + split * (TILES * 16 * COLUMNS) + part_at, result, mask=needed)
        tl.debug_barrier()  # all threads' parts are there before one of them says so
        if tl.atomic_add(arrivals_ptr + program, 1) == SPLITS - 1:
            result = tl.zeros([TILES * 16, COLUMNS], tl.float32)
            for i in tl.static_range(SPLITS):
                at = parts_ptr + i * (TILES * 16 * COLUMNS) + part_at
                result += tl.load(at, mask=needed, other=0.0, cache_modifier=".cg")
            _store(result, out_ptr, bias_ptr, first_tile, rows, outputs, EACH, COLUMNS, BIAS, SILU, dtype)
            tl.store(arrivals_ptr + program, 0)


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    result,
    out_ptr,
    bias_ptr,
    first_tile,
    rows,
    outputs,
    EACH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    dtype: tl.constexpr,
):
    output = first_tile * 16 + tl.arange(0, EACH * 16)
    if SILU:
        gate, up = tl.permute(result.reshape(2, EACH * 16, COLUMNS), (1, 2, 0)).split()
        gate = gate.to(dtype).to(tl.float32)
        result = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
    if BIAS:
        result += tl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    known = (output < outputs)[:, None] & (column < rows)
    tl.store(out_ptr + column * outputs + output[:, None], result.to(dtype), mask=known)


@triton.jit
def _load_words(at, block, step, blocks, WARPS: tl.constexpr):  # type: ignore[no-untyped-def]
    # Lanes are to lie along words and rows, warps along blocks: the order of these figures, true or not, says so.
    at = tl.max_contiguous(at + step * 256, (1, 1, 4, 8, 16))
    return tl.load(at, mask=step + block < blocks, other=0, eviction_policy="evict_first")


def _case(rows: int, outputs: int, inputs: int, silu: bool = False) -> CompileCase:
    cut = tuning(rows, outputs, inputs, silu)
    types = {"x_ptr": "*bf16", "words_ptr": "*i32", "scales_ptr": "*fp16", "out_ptr": "*bf16", "outputs": "i32:16"}
    types |= {"arrivals_ptr": "*i32"}
    constants: dict[str, Any] = {"bias_ptr": None, "BIAS": False, "SILU": silu, "INPUTS": inputs}
    constants |= {"BLOCKS": inputs // 128, "ROWS": padded(rows), "TILES": cut.tiles, "WARPS": cut.warps}
    constants |= {"DEPTH": cut.depth, "SPLITS": cut.splits, "ASSEMBLY": True, "OVERLAP": True}
    if rows == 1:
        constants["rows"] = 1
    else:
        types["rows"] = "i32"
    if cut.splits == 1:
        constants["parts_ptr"] = None
    else:
        types["parts_ptr"] = "*fp32"
    name = f"w4a16 {rows} rows {inputs} -> {outputs}{' silu' if silu else ''}"
    return CompileCase(name, _few, types, constants, num_warps=cut.warps, spills=32 if cut.tiles == 4 else 0)


COMPILE_CASES = [
    _case(1, 8192, 8192),
    _case(1, 2048, 1536),
    _case(1, 17920 // 2, 1536, silu=True),
    _case(1, 1536, 8960),
    _case(1, 37888 // 2, 3584, silu=True),
    _case(1, 4608, 3584),
    _case(1, 3584, 18944),
    _case(8, 8192, 8192),
    _case(16, 8192, 8192),
    _case(16, 4096, 4096),
    _case(16, 37888 // 2, 3584, silu=True),
]
