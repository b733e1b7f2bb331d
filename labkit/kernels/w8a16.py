"""Linear layers with weights of 8 bits and a scale for each output: for the projection to the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from labkit.kernels.compile_check import CompileCase

MOST_ROWS = 256
"""Up to here the kernels win; with more it is cheaper to dequantise first."""


def pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [outputs, inputs] -> (int8 [outputs, inputs], float32 [outputs]), the largest of a row at +-127."""
    scale = weight.abs().amax(dim=1).float() / 127
    levels = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for at in range(0, len(weight), 4096):  # a vocabulary in float32 would take much memory
        part = weight[at : at + 4096].float() / scale[at : at + 4096, None].clamp_min(1e-30)
        levels[at : at + 4096] = part.round().to(torch.int8)
    return levels, scale


def w8a16_linear_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, inputs] times the transpose of weight int8 [outputs, inputs] times scale [outputs], plus bias [outputs]:
    [rows, outputs] in x's dtype, to which the weight is rounded before."""
    return F.linear(x, (weight.float() * scale[:, None]).to(x.dtype), bias)


def w8a16_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """``w8a16_linear_reference``, by the kernel for this many rows: up to 256 in 16 bits on CUDA -> Triton, else the
    reference. The product is written to ``out`` if it is given."""
    if x.is_cuda and 0 < len(x) <= MOST_ROWS and x.dtype != torch.float32 and x.is_contiguous():
        return w8a16_linear_triton(x, weight, scale, bias, out)
    product = w8a16_linear_reference(x, weight, scale, bias)
    return product if out is None else out.copy_(product)


@dataclass(frozen=True)
class One:
    """``_one``: outputs and inputs of a tile."""

    outputs: int
    inputs: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Some:
    """``_some``: outputs, rows and inputs of a tile."""

    outputs: int
    rows: int
    inputs: int
    warps: int
    stages: int


def tuning(rows: int, inputs: int) -> One | Some:
    """The fastest of a sweep on an H200 over the output heads of Qwen2.5 1.5B, 7B and 14B."""
    if rows == 1 and inputs > 2048:
        return One(1, 4096 if inputs <= 4096 else 2048, 2, 1)
    if rows <= 16:
        return Some(64, 16, 128, 4, 3) if inputs > 2048 else Some(128, 16, 128, 8, 3)
    return Some(128, 64, 128, 8, 4) if rows <= 64 else Some(64, 128, 128, 4, 3)


def w8a16_linear_triton(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    return launch(x, weight, scale, bias, tuning(*x.shape), out)


def launch(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, cut: One | Some, out: Tensor | None = None
) -> Tensor:
    (rows, inputs), outputs = x.shape, len(weight)
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device) if out is None else out
    if isinstance(cut, One):
        _one[(triton.cdiv(outputs, cut.outputs),)](
            x, weight, scale, bias, out, outputs, INPUTS=inputs, BIAS=bias is not None, OUT=cut.outputs, IN=cut.inputs,
            STAGES=cut.stages, num_warps=cut.warps,
        )  # fmt: skip
        return out
    # Programs side by side have the same weights, so that they are read from memory once.
    _some[(triton.cdiv(rows, cut.rows), triton.cdiv(outputs, cut.outputs))](
        x, weight, scale, bias, out, rows, outputs, INPUTS=inputs, BIAS=bias is not None, OUT=cut.outputs,
        ROWS=cut.rows, IN=cut.inputs, STAGES=cut.stages, num_warps=cut.warps,
    )  # fmt: skip
    return out


@triton.jit
def _one(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    outputs,
    INPUTS: tl.constexpr,
    BIAS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row of x, as in ``linear.py``: every thread multiplies the same columns of a few rows of the weight."""
    output = tl.program_id(0) * OUT + tl.arange(0, OUT)
    column = tl.arange(0, IN)[None, :]
    weights = weight_ptr + output[:, None].to(tl.int64) * INPUTS + column
    sums = tl.zeros([OUT, IN], tl.float32)
    for start in tl.range(0, INPUTS, IN, num_stages=STAGES):
        if INPUTS % IN == 0:
            weight = tl.load(weights + start, mask=output[:, None] < outputs, other=0)
            x = tl.load(x_ptr + start + column)
        else:
            known = start + column < INPUTS
            weight = tl.load(weights + start, mask=(output[:, None] < outputs) & known, other=0)
            x = tl.load(x_ptr + start + column, mask=known, other=0.0)
        sums += weight.to(tl.float32) * x.to(tl.float32)
    known_output = output < outputs
    result = tl.sum(sums, axis=1) * tl.load(scale_ptr + output, mask=known_output, other=0.0)
    if BIAS:
        result += tl.load(bias_ptr + output, mask=known_output, other=0.0).to(tl.float32)
    tl.store(out_ptr + output, result.to(x_ptr.dtype.element_ty), mask=known_output)


@triton.jit
def _some(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    rows,
    outputs,
    INPUTS: tl.constexpr,
    BIAS: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    IN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile [OUT, ROWS] of the product, on tensor cores; the scale comes after the sum."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    output = tl.program_id(1) * OUT + tl.arange(0, OUT)[:, None]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, IN)[None, :]
    # Rows past the last are read as the last, and not stored.
    weights = weight_ptr + tl.minimum(output, outputs - 1).to(tl.int64) * INPUTS + column
    x_at = x_ptr + tl.minimum(row, rows - 1)[:, None] * INPUTS + column
    sums = tl.zeros([OUT, ROWS], tl.float32)
    for start in tl.range(0, INPUTS, IN, num_stages=STAGES):
        if INPUTS % IN == 0:
            weight, x = tl.load(weights + start), tl.load(x_at + start)
        else:
            weight = tl.load(weights + start, mask=start + column < INPUTS, other=0)
            x = tl.load(x_at + start, mask=start + column < INPUTS, other=0.0)
        sums = tl.dot(weight.to(dtype), tl.trans(x), sums)
    known_output = output < outputs
    sums *= tl.load(scale_ptr + output, mask=known_output, other=0.0)
    if BIAS:
        sums += tl.load(bias_ptr + output, mask=known_output, other=0.0).to(tl.float32)
    at = out_ptr + row[None, :].to(tl.int64) * outputs + output
    tl.store(at, sums.to(dtype), mask=known_output & (row < rows)[None, :])


def _case(rows: int, outputs: int, inputs: int) -> CompileCase:
    cut = tuning(rows, inputs)
    types = {"x_ptr": "*bf16", "weight_ptr": "*i8", "scale_ptr": "*fp32", "out_ptr": "*bf16", "outputs": "i32:16"}
    constants: dict[str, Any] = {"INPUTS": inputs, "BIAS": False, "OUT": cut.outputs, "IN": cut.inputs}
    constants |= {"STAGES": cut.stages, "bias_ptr": None}
    name = f"w8a16 {rows} rows {inputs} -> {outputs}"
    if isinstance(cut, One):
        return CompileCase(name, _one, types, constants, cut.warps)
    return CompileCase(name, _some, types | {"rows": "i32:16"}, constants | {"ROWS": cut.rows}, cut.warps, hgmma=True)


COMPILE_CASES = [_case(rows, 152064, 3584) for rows in (1, 16, 64, 256)]
COMPILE_CASES += [_case(1, 152064, 5120), _case(1, 151936, 1536)]
