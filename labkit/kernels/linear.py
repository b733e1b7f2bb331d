"""Matrix-vector products at the speed of memory: linear layers for a few rows, with what comes before and after them.

For one row a linear layer reads every weight once and does two operations with it. The kernel therefore has no use for
tensor cores: each program owns a few rows of the weight, every thread multiplies the same columns of all of them, and
the sums across threads are taken once at the end. What counts is how many bytes are under way: about 40 KB for each
multiprocessor, which several programs with several tiles each, copied asynchronously, add up to. The order of every sum
is fixed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from labkit.kernels.activation import silu_mul
from labkit.kernels.compile_check import CompileCase
from labkit.kernels.norm import add_rms_norm, rms_norm
from labkit.kernels.pdl import PDL, begin

MOST_ROWS = 4
"""Up to here the weights are what takes the time; with more rows cuBLAS and its tensor cores win."""
NORM_INPUTS = 2048
"""Inputs whose squares are summed at a time: all of them at 1.5B, so that one wait for memory is enough."""


def is_skinny(x: Tensor) -> bool:
    """The dispatch rule of this file: up to MOST_ROWS contiguous rows on CUDA -> the kernel; anything else ->
    ``F.linear`` (cuBLAS on CUDA) between the ops of the other files."""
    return x.is_cuda and 0 < len(x) <= MOST_ROWS and x.is_contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, inputs] times the transpose of weight [outputs, inputs], plus bias [outputs]: [rows, outputs]."""
    return linear_triton(x, weight, bias) if is_skinny(x) else F.linear(x, weight, bias)


def linear_silu_mul(x: Tensor, gate_up_weight: Tensor) -> Tensor:
    """silu(gate) * up of the projection of x [rows, inputs] by gate_up_weight [2 * inner, inputs]: [rows, inner]."""
    return linear_silu_mul_triton(x, gate_up_weight) if is_skinny(x) else silu_mul(F.linear(x, gate_up_weight))


def norm_linear(
    x: Tensor, residual: Tensor | None, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``linear`` of the RMSNorm of the sum of x and residual, both [rows, inputs]; returns (product, sum).

    norm: [inputs], the weight of the norm. Without a residual the sum is x itself.
    """
    if is_skinny(x):
        return norm_linear_triton(x, residual, norm, eps, weight, bias)
    normed, total = _norm(x, residual, norm, eps)
    return F.linear(normed, weight, bias), total


def norm_linear_silu_mul(
    x: Tensor, residual: Tensor | None, norm: Tensor, eps: float, gate_up_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """``linear_silu_mul`` of the RMSNorm of the sum of x and residual, as in ``norm_linear``."""
    if is_skinny(x):
        return norm_linear_silu_mul_triton(x, residual, norm, eps, gate_up_weight)
    normed, total = _norm(x, residual, norm, eps)
    return silu_mul(F.linear(normed, gate_up_weight)), total


def _norm(x: Tensor, residual: Tensor | None, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return (rms_norm(x, norm, eps), x) if residual is None else add_rms_norm(x, residual, norm, eps)


def linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear`` of up to 8 rows, contiguous like the weight."""
    return _launch(x, weight, bias)[0]


def linear_silu_mul_triton(x: Tensor, gate_up_weight: Tensor) -> Tensor:
    """``linear_silu_mul`` of up to 8 rows, contiguous like the weight."""
    return _launch(x, gate_up_weight, silu=True)[0]


def norm_linear_triton(
    x: Tensor, residual: Tensor | None, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``norm_linear`` of up to 8 rows; each program takes the norm again, which is cheaper than a launch for it."""
    return _launch(x, weight, bias, residual=residual, norm=norm, eps=eps)


def norm_linear_silu_mul_triton(
    x: Tensor, residual: Tensor | None, norm: Tensor, eps: float, gate_up_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """``norm_linear_silu_mul`` of up to 8 rows, as ``norm_linear_triton``."""
    return _launch(x, gate_up_weight, residual=residual, norm=norm, eps=eps, silu=True)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    silu: bool = False,
) -> tuple[Tensor, Tensor]:
    """The product and, where there is a residual, its sum with x; else x itself."""
    rows, inputs = x.shape
    outputs = len(weight) // 2 if silu else len(weight)
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(x)
    padded, tile_outputs, tile_inputs, stages, warps = tuning(rows, outputs, inputs, silu)
    prefetch = x.is_cuda and (PDL or norm is not None)
    _skinny[(triton.cdiv(outputs, tile_outputs),)](
        x, residual, norm, weight, bias, out, total, rows, outputs, eps,
        INPUTS=inputs, NORM=norm is not None, RESIDUAL=residual is not None, BIAS=bias is not None, SILU=silu,
        ROWS=padded, OUT=tile_outputs, IN=tile_inputs, NORM_IN=NORM_INPUTS, STAGES=stages, PREFETCH=prefetch,
        PDL=PDL, num_warps=warps, launch_pdl=PDL,
    )  # fmt: skip
    return out, total


def tuning(rows: int, outputs: int, inputs: int, silu: bool) -> tuple[int, int, int, int, int]:
    """(rows, outputs and inputs of a tile, tiles under way at a time plus one, warps).

    Two warps side by side cover 512 inputs with loads of 16 bytes. Outputs a tile: few enough that the smallest layers
    (1536 outputs) still make several programs for each of the 132 multiprocessors, and that sums fit in registers;
    many enough that x is read and normed for more than one.
    """
    padded = triton.next_power_of_2(rows)
    tile = (4 if outputs >= 65536 and not silu else 2) // (2 if padded == 8 else 1)
    return padded, tile, 512, 4 if inputs <= 4096 else 6, 2


@triton.jit
def _skinny(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    total_ptr,
    rows,
    outputs,
    eps,
    INPUTS: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    NORM_IN: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tiles are [ROWS, OUT, IN]: rows of x, rows of the weight, columns of both."""
    first_output = tl.program_id(0) * OUT
    if PREFETCH:
        _prefetch(weight_ptr, first_output, outputs, INPUTS, OUT)
        if SILU:
            _prefetch(weight_ptr, first_output + outputs, 2 * outputs, INPUTS, OUT)
    begin(PDL)
    output = (first_output + tl.arange(0, OUT))[None, :, None]
    if NORM:
        scale = _norm_scale(x_ptr, residual_ptr, total_ptr, rows, eps, INPUTS, RESIDUAL, ROWS, NORM_IN)
    sums = tl.zeros((ROWS, OUT, IN), dtype=tl.float32)
    up_sums = tl.zeros((ROWS, OUT, IN), dtype=tl.float32)
    weights = weight_ptr + output.to(tl.int64) * INPUTS
    up_weights = weight_ptr + (outputs + output).to(tl.int64) * INPUTS
    for start in tl.range(0, INPUTS, IN, num_stages=STAGES):
        column = start + tl.arange(0, IN)[None, None, :]
        inside = (output < outputs) & (column < INPUTS)
        weight = tl.load(weights + column, mask=inside, other=0.0, eviction_policy="evict_first")
        x = _sum(x_ptr, residual_ptr, start, rows, INPUTS, RESIDUAL, ROWS, IN)
        wide = x.to(tl.float32)
        if NORM:
            norm = tl.load(norm_ptr + column, mask=column < INPUTS, other=0.0).to(tl.float32)
            wide = ((wide * scale).to(x.dtype).to(tl.float32) * norm).to(x.dtype).to(tl.float32)
        sums += weight.to(tl.float32) * wide
        if SILU:
            up_weight = tl.load(up_weights + column, mask=inside, other=0.0, eviction_policy="evict_first")
            up_sums += up_weight.to(tl.float32) * wide
    result = tl.sum(sums, axis=2)
    row = tl.arange(0, ROWS)[:, None]
    output = (first_output + tl.arange(0, OUT))[None, :]
    if BIAS:
        result += tl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)
    if SILU:
        # Rounded where the separate ops round: the projection, the activation, the product.
        dtype = out_ptr.dtype.element_ty
        gate = result.to(dtype).to(tl.float32)
        up_result = tl.sum(up_sums, axis=2).to(dtype).to(tl.float32)
        result = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up_result
    stored = (row < rows) & (output < outputs)
    tl.store(out_ptr + row * outputs + output, result.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _norm_scale(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,
    total_ptr,
    rows,
    eps,
    INPUTS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    NORM_IN: tl.constexpr,
):
    """One over the root mean square of each row, [ROWS, 1, 1]; the first program also keeps x + residual."""
    row = tl.arange(0, ROWS)[:, None, None]
    squares = tl.zeros((ROWS, 1, 1), dtype=tl.float32)
    for start in tl.static_range(0, INPUTS, NORM_IN):
        total = _sum(x_ptr, residual_ptr, start, rows, INPUTS, RESIDUAL, ROWS, NORM_IN)
        squares += tl.sum(total.to(tl.float32) * total.to(tl.float32), axis=2, keep_dims=True)
        if RESIDUAL:
            if tl.program_id(0) == 0:
                column = start + tl.arange(0, NORM_IN)[None, None, :]
                tl.store(total_ptr + row * INPUTS + column, total, mask=(row < rows) & (column < INPUTS))
    return tl.rsqrt(squares / INPUTS + eps)


@triton.jit
def _sum(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, start, rows, INPUTS: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, IN: tl.constexpr
):
    """x, or x + residual in x's dtype, from column ``start`` on: [ROWS, 1, IN]."""
    row = tl.arange(0, ROWS)[:, None, None]
    column = start + tl.arange(0, IN)[None, None, :]
    inside = (row < rows) & (column < INPUTS)
    x = tl.load(x_ptr + row * INPUTS + column, mask=inside, other=0.0)
    if RESIDUAL:
        residual = tl.load(residual_ptr + row * INPUTS + column, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _prefetch(weight_ptr, first_output, outputs, INPUTS: tl.constexpr, OUT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Brings the first 4,096 columns of a program's weights, in steps of 64, to the L2 cache.

    It may run before the kernel before has ended: nothing is read, and the cache is coherent.
    """
    output = tl.minimum(first_output + tl.arange(0, OUT), outputs - 1)[:, None]
    column = tl.minimum(tl.arange(0, 64) * 64, INPUTS - 1)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [weight_ptr + output.to(tl.int64) * INPUTS + column],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def _case(outputs: int, inputs: int, rows: int = 1, norm: bool = False, silu: bool = False) -> CompileCase:
    padded, tile_outputs, tile_inputs, stages, warps = tuning(rows, outputs, inputs, silu)
    types = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "out_ptr": "*bf16", "total_ptr": "*bf16"}
    types |= {"outputs": "i32:16", "eps": "fp32"} | ({"residual_ptr": "*bf16", "norm_ptr": "*bf16"} if norm else {})
    types |= {} if rows == 1 else {"rows": "i32"}
    constants: dict[str, Any] = {"INPUTS": inputs, "NORM": norm, "RESIDUAL": norm, "BIAS": False, "SILU": silu}
    constants |= {"ROWS": padded, "OUT": tile_outputs, "IN": tile_inputs, "NORM_IN": NORM_INPUTS}
    constants |= {"STAGES": stages, "PREFETCH": True, "PDL": True}
    constants |= {"bias_ptr": None} | ({} if norm else {"residual_ptr": None, "norm_ptr": None})
    constants |= {"rows": 1} if rows == 1 else {}
    name = f"linear {rows} x {inputs} x {outputs}{' norm' if norm else ''}{' silu' if silu else ''}"
    return CompileCase(name, _skinny, types, constants, num_warps=warps)


COMPILE_CASES = [
    _case(2048, 1536, norm=True),
    _case(1536, 1536),
    _case(8960, 1536, norm=True, silu=True),
    _case(1536, 8960),
    _case(151936, 1536, norm=True),
    _case(18944, 3584, norm=True, silu=True),
    _case(3584, 18944),
    _case(4608, 3584, rows=2, norm=True),
    _case(3584, 3584, rows=3),
    _case(18944, 3584, rows=4, silu=True),
    _case(1536, 8960, rows=8),
]
