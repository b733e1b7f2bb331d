"""Matrix-vector products at the speed of memory: linear layers for a few rows, with what comes before and after them.

For one row a linear layer reads every weight once and does two operations with it. The kernels therefore have no use
for tensor cores: each program owns a few rows of the weight, every thread multiplies the same columns of all of them,
and the sums across threads are taken once at the end. What counts is how many bytes are under way: about 40 KB for each
multiprocessor, which several programs add up to. ``_whole`` has all of its weights under way before anything else,
even before the norm of x; ``_looped``, for several rows of x or long ones, copies tile after tile asynchronously. The
order of every sum is fixed.
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
from labkit.kernels.overlap import gdc_launch_dependents, overlaps

MOST_ROWS = 2
"""Up to here the weights are what takes the time; with more rows cuBLAS and its tensor cores win."""
MOST_WHOLE_INPUTS = 8192
"""Up to here a row of x is one tile, which a program can norm."""


def is_skinny(x: Tensor) -> bool:
    """The dispatch rule of this file: up to MOST_ROWS contiguous rows on CUDA -> the kernels; anything else ->
    ``F.linear`` (cuBLAS on CUDA) between the ops of the other files."""
    return x.is_cuda and 0 < len(x) <= MOST_ROWS and x.is_contiguous()


def is_whole(x: Tensor) -> bool:
    """Whether x [rows, inputs] is one row that fits a tile: then the norm before costs no launch of its own."""
    return len(x) == 1 and x.shape[1] <= MOST_WHOLE_INPUTS


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x [rows, inputs] times the transpose of weight [outputs, inputs], plus bias [outputs]: [rows, outputs], in
    ``out`` if it is given."""
    if is_skinny(x):
        return linear_triton(x, weight, bias, out)
    if out is None:
        return F.linear(x, weight, bias)
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def linear_silu_mul(x: Tensor, gate_up_weight: Tensor) -> Tensor:
    """silu(gate) * up of the projection of x [rows, inputs] by gate_up_weight [2 * inner, inputs]: [rows, inner]."""
    return linear_silu_mul_triton(x, gate_up_weight) if is_skinny(x) else silu_mul(F.linear(x, gate_up_weight))


def norm_linear(
    x: Tensor, residual: Tensor | None, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``linear`` of the RMSNorm of the sum of x and residual, both [rows, inputs]; returns (product, sum).

    norm: [inputs], the weight of the norm. Without a residual the sum is x itself.
    """
    if is_skinny(x) and is_whole(x):
        return norm_linear_triton(x, residual, norm, eps, weight, bias)
    normed, total = _norm(x, residual, norm, eps)
    return linear(normed, weight, bias), total


def norm_linear_silu_mul(
    x: Tensor, residual: Tensor | None, norm: Tensor, eps: float, gate_up_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """``linear_silu_mul`` of the RMSNorm of the sum of x and residual, as in ``norm_linear``."""
    if is_skinny(x) and is_whole(x):
        return norm_linear_silu_mul_triton(x, residual, norm, eps, gate_up_weight)
    normed, total = _norm(x, residual, norm, eps)
    return linear_silu_mul(normed, gate_up_weight), total


def _norm(x: Tensor, residual: Tensor | None, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return (rms_norm(x, norm, eps), x) if residual is None else add_rms_norm(x, residual, norm, eps)


def linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``linear`` of up to 8 rows, contiguous like the weight and ``out``."""
    if is_whole(x):
        return _launch_whole(x, weight, bias, out=out)[0]
    return _launch_looped(x, weight, bias, silu=False, out=out)


def linear_silu_mul_triton(x: Tensor, gate_up_weight: Tensor) -> Tensor:
    """``linear_silu_mul`` of up to 8 rows, contiguous like the weight."""
    if is_whole(x):
        return _launch_whole(x, gate_up_weight, silu=True)[0]
    return _launch_looped(x, gate_up_weight, None, silu=True)


def norm_linear_triton(
    x: Tensor, residual: Tensor | None, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``norm_linear`` of one row; each program takes the norm again, which is cheaper than a launch for it."""
    return _launch_whole(x, weight, bias, residual, norm, eps)


def norm_linear_silu_mul_triton(
    x: Tensor, residual: Tensor | None, norm: Tensor, eps: float, gate_up_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """``norm_linear_silu_mul`` of one row, as ``norm_linear_triton``."""
    return _launch_whole(x, gate_up_weight, None, residual, norm, eps, silu=True)


def _launch_whole(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    silu: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The product and, where there is a residual, its sum with x; else x itself."""
    inputs = x.shape[1]
    outputs = len(weight) // 2 if silu else len(weight)
    out = torch.empty((1, outputs), dtype=x.dtype, device=x.device) if out is None else out
    total = x if residual is None else torch.empty_like(x)
    tile_outputs, tile_inputs, warps = whole_tuning(outputs, inputs, silu)
    _whole[(triton.cdiv(outputs, tile_outputs),)](
        x, residual, norm, weight, bias, out, total, outputs, eps,
        INPUTS=inputs, NORM=norm is not None, RESIDUAL=residual is not None, BIAS=bias is not None, SILU=silu,
        OUT=tile_outputs, IN=tile_inputs, OVERLAP=overlaps(), num_warps=warps,
    )  # fmt: skip
    return out, total


def _launch_looped(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, out: Tensor | None = None) -> Tensor:
    rows, inputs = x.shape
    outputs = len(weight) // 2 if silu else len(weight)
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device) if out is None else out
    padded, tile_outputs, tile_inputs, stages, warps = looped_tuning(rows, outputs, inputs)
    _looped[(triton.cdiv(outputs, tile_outputs),)](
        x, weight, bias, out, rows, outputs, INPUTS=inputs, BIAS=bias is not None, SILU=silu,
        ROWS=padded, OUT=tile_outputs, IN=tile_inputs, STAGES=stages, OVERLAP=overlaps(), num_warps=warps,
    )  # fmt: skip
    return out


def whole_tuning(outputs: int, inputs: int, silu: bool) -> tuple[int, int, int]:
    """(outputs and inputs of a tile, warps), measured on an H200 at the shapes of 1.5B and 7B models.

    Outputs a tile: few enough that the smallest layers (1536 outputs) still make several programs for each of the 132
    multiprocessors, many enough that x is read and normed for more than one. A gate counts twice, with its up.
    """
    tile = max(triton.next_power_of_2(inputs), 128)
    if silu:
        return 2, tile, max(tile // 1024, 2)
    if outputs >= 16384:
        return (2, tile, 2) if tile <= 2048 else (4, tile, max(tile // 512, 8))
    return (4 if outputs > inputs else 2), tile, min(max(tile // 512, 8), 16)


def looped_tuning(rows: int, outputs: int, inputs: int) -> tuple[int, int, int, int, int]:
    """(rows, outputs and inputs of a tile, tiles under way at a time plus one, warps): two warps side by side cover 512
    inputs with loads of 16 bytes."""
    padded = triton.next_power_of_2(rows)
    if padded == 1:
        return padded, 4, 512, 5, 2
    return padded, 1 if padded == 8 else 2, 512, 4 if inputs <= 4096 else 6, 2


@triton.jit
def _whole(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    total_ptr,
    outputs,
    eps,
    INPUTS: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row of x. Tiles are [OUT, IN]: rows of the weight, all of their columns."""
    if OVERLAP:
        gdc_launch_dependents()
    output = tl.program_id(0) * OUT + tl.arange(0, OUT)
    column = tl.arange(0, IN)[None, :]
    known = column < INPUTS
    inside = (output[:, None] < outputs) & known
    weights = weight_ptr + output[:, None].to(tl.int64) * INPUTS + column
    weight = tl.load(weights, mask=inside, other=0.0, eviction_policy="evict_first")
    if SILU:
        up_weights = weight_ptr + (outputs + output[:, None]).to(tl.int64) * INPUTS + column
        up_weight = tl.load(up_weights, mask=inside, other=0.0, eviction_policy="evict_first")
    x = tl.load(x_ptr + column, mask=known, other=0.0)
    wide = x.to(tl.float32)
    if RESIDUAL:
        residual = tl.load(residual_ptr + column, mask=known, other=0.0)
        total = (wide + residual.to(tl.float32)).to(x.dtype)
        if tl.program_id(0) == 0:
            tl.store(total_ptr + column, total, mask=known)
        wide = total.to(tl.float32)
    if NORM:
        norm = tl.load(norm_ptr + column, mask=known, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, axis=1, keep_dims=True) / INPUTS + eps)
        wide = ((wide * scale).to(x.dtype).to(tl.float32) * norm).to(x.dtype).to(tl.float32)
    result = tl.sum(weight.to(tl.float32) * wide, axis=1)
    if BIAS:
        result += tl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)
    if SILU:
        result = _gate(result, tl.sum(up_weight.to(tl.float32) * wide, axis=1), x.dtype)
    tl.store(out_ptr + output, result.to(x.dtype), mask=output < outputs)


@triton.jit
def _looped(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    outputs,
    INPUTS: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Tiles are [ROWS, OUT, IN]: rows of x, rows of the weight, columns of both."""
    if OVERLAP:
        gdc_launch_dependents()
    first_output = tl.program_id(0) * OUT
    row = tl.arange(0, ROWS)[:, None, None]
    output = (first_output + tl.arange(0, OUT))[None, :, None]
    weights = weight_ptr + output.to(tl.int64) * INPUTS
    up_weights = weight_ptr + (outputs + output).to(tl.int64) * INPUTS
    sums = tl.zeros((ROWS, OUT, IN), dtype=tl.float32)
    up_sums = tl.zeros((ROWS, OUT, IN), dtype=tl.float32)
    for start in tl.range(0, INPUTS, IN, num_stages=STAGES):
        column = start + tl.arange(0, IN)[None, None, :]
        inside = (output < outputs) & (column < INPUTS)
        weight = tl.load(weights + column, mask=inside, other=0.0)
        x = tl.load(x_ptr + row * INPUTS + column, mask=(row < rows) & (column < INPUTS), other=0.0).to(tl.float32)
        sums += weight.to(tl.float32) * x
        if SILU:
            up_weight = tl.load(up_weights + column, mask=inside, other=0.0)
            up_sums += up_weight.to(tl.float32) * x
    result = tl.sum(sums, axis=2)
    row = tl.arange(0, ROWS)[:, None]
    output = (first_output + tl.arange(0, OUT))[None, :]
    dtype = out_ptr.dtype.element_ty
    if BIAS:
        result += tl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)
    if SILU:
        result = _gate(result, tl.sum(up_sums, axis=2), dtype)
    tl.store(out_ptr + row * outputs + output, result.to(dtype), mask=(row < rows) & (output < outputs))


@triton.jit
def _gate(gate, up, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """silu(gate) * up, rounded where the separate ops round: the projections, the activation, the product."""
    gate = gate.to(dtype).to(tl.float32)
    return (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)


def _whole_case(outputs: int, inputs: int, norm: bool = False, silu: bool = False) -> CompileCase:
    tile_outputs, tile_inputs, warps = whole_tuning(outputs, inputs, silu)
    types = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "out_ptr": "*bf16", "total_ptr": "*bf16"}
    types |= {"outputs": "i32:16", "eps": "fp32"} | ({"residual_ptr": "*bf16", "norm_ptr": "*bf16"} if norm else {})
    constants: dict[str, Any] = {"INPUTS": inputs, "NORM": norm, "RESIDUAL": norm, "BIAS": False, "SILU": silu}
    constants |= {"OUT": tile_outputs, "IN": tile_inputs, "bias_ptr": None, "OVERLAP": True}
    constants |= {} if norm else {"residual_ptr": None, "norm_ptr": None}
    name = f"linear {inputs} -> {outputs}{' norm' if norm else ''}{' silu' if silu else ''}"
    return CompileCase(name, _whole, types, constants, num_warps=warps)


def _looped_case(rows: int, outputs: int, inputs: int, silu: bool = False) -> CompileCase:
    padded, tile_outputs, tile_inputs, stages, warps = looped_tuning(rows, outputs, inputs)
    types = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "out_ptr": "*bf16", "outputs": "i32:16"}
    types |= {} if rows == 1 else {"rows": "i32"}
    constants: dict[str, Any] = {"INPUTS": inputs, "BIAS": False, "SILU": silu, "ROWS": padded, "OUT": tile_outputs}
    constants |= {"IN": tile_inputs, "STAGES": stages, "bias_ptr": None, "OVERLAP": True}
    constants |= {"rows": 1} if rows == 1 else {}
    name = f"linear {rows} rows {inputs} -> {outputs}{' silu' if silu else ''}"
    return CompileCase(name, _looped, types, constants, num_warps=warps)


COMPILE_CASES = [
    _whole_case(2048, 1536, norm=True),
    _whole_case(1536, 1536),
    _whole_case(8960, 1536, norm=True, silu=True),
    _whole_case(151936, 1536, norm=True),
    _whole_case(4608, 3584, norm=True),
    _whole_case(18944, 3584, norm=True, silu=True),
    _whole_case(152064, 3584),
    _whole_case(28672, 8192, norm=True, silu=True),
    _looped_case(1, 1536, 8960),
    _looped_case(1, 3584, 18944),
    _looped_case(2, 4608, 3584),
    _looped_case(4, 3584, 3584),
    _looped_case(4, 18944, 3584, silu=True),
    _looped_case(8, 1536, 8960),
]
