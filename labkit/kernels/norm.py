"""RMSNorm, alone and with the residual added first."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit.kernels.compile_check import CompileCase
from labkit.kernels.overlap import gdc_launch_dependents, gdc_wait, overlaps


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension. x: [tokens, hidden]; the mean square is taken in float32.

    The quotient is rounded to x's dtype before the weight is applied, as the published models were trained.
    Dispatch: CUDA -> the kernel, anything else -> the reference.
    """
    return rms_norm_triton(x, weight, eps) if x.is_cuda else rms_norm_reference(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Adds x to the residual stream and normalises the sum. Both [tokens, hidden]; returns (normed, new residual).

    Dispatch: CUDA -> the kernel, anything else -> the reference.
    """
    if x.is_cuda:
        return add_rms_norm_triton(x, residual, weight, eps)
    return add_rms_norm_reference(x, residual, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition of ``rms_norm``; x may have any number of dimensions."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).to(x.dtype).mul_(weight)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The definition of ``add_rms_norm``."""
    residual = residual + x
    return rms_norm_reference(residual, weight, eps), residual


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm`` of rows whose elements are contiguous; the rows themselves may lie apart."""
    tokens, hidden = x.shape
    normed = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    if tokens:
        block, rows, warps = tuning(hidden)
        _norm[(triton.cdiv(tokens, rows),)](
            x, x, weight, normed, normed, tokens, x.stride(0), hidden, eps,
            RESIDUAL=False, BLOCK=block, ROWS=rows, OVERLAP=overlaps(),
            launch_pdl=overlaps(), num_warps=warps,
        )  # fmt: skip
    return normed


def add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``add_rms_norm`` in one pass over memory; x as for ``rms_norm_triton``, the residual contiguous."""
    tokens, hidden = x.shape
    normed = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    total = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    if tokens:
        block, rows, warps = tuning(hidden)
        _norm[(triton.cdiv(tokens, rows),)](
            x, residual, weight, normed, total, tokens, x.stride(0), hidden, eps,
            RESIDUAL=True, BLOCK=block, ROWS=rows, OVERLAP=overlaps(),
            launch_pdl=overlaps(), num_warps=warps,
        )  # fmt: skip
    return normed, total


def tuning(hidden: int) -> tuple[int, int, int]:
    """(columns of a tile, rows of a tile, warps): a row is held in registers, 16 to 32 elements a thread, so that four
    or more programs fit on a multiprocessor, which keeps enough bytes in flight."""
    block = triton.next_power_of_2(hidden)
    return block, max(1, 1024 // block), min(max(block // 512, 4), 8 if block <= 8192 else 16)


@triton.jit(do_not_specialize=["tokens"])
def _norm(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    total_ptr,
    tokens,
    x_stride,
    hidden,
    eps,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < tokens) & (column < hidden)
    weight = tl.load(weight_ptr + column, mask=column < hidden, other=0.0, eviction_policy="evict_last")
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0, eviction_policy="evict_first")
    wide = x.to(tl.float32)
    if RESIDUAL:
        before = tl.load(residual_ptr + row * hidden + column, mask=inside, other=0.0, eviction_policy="evict_first")
        # The mean square is that of the sum as it is kept, in the residual's precision.
        total = (wide + before.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * hidden + column, total, mask=inside)
        wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / hidden + eps)
    quotient = (wide * scale[:, None]).to(x.dtype).to(tl.float32)
    tl.store(normed_ptr + row * hidden + column, (quotient * weight.to(tl.float32)).to(x.dtype), mask=inside)


def _case(hidden: int, residual: bool) -> CompileCase:
    block, rows, warps = tuning(hidden)
    pointers = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "normed_ptr", "total_ptr"), "*bf16")
    sizes: dict[str, Any] = {"tokens": "i32", "x_stride": "i32:16", "hidden": "i32:16", "eps": "fp32"}
    constants = {"RESIDUAL": residual, "BLOCK": block, "ROWS": rows, "OVERLAP": True}
    name = f"norm {hidden}{' with residual' if residual else ''}"
    return CompileCase(name, _norm, {**pointers, **sizes}, constants, num_warps=warps)


COMPILE_CASES = [
    _case(hidden, residual) for hidden in (384, 1536, 3584, 5120, 8192, 16384) for residual in (False, True)
]
