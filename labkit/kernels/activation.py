"""Activations, alone or as the gate over a packed projection; computed in float32, rounded before they gate."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from labkit.kernels.compile_check import CompileCase

Approximate = Literal["tanh", "none"]
GELU = {"tanh": "gelu_tanh", "none": "gelu_erf"}
BLOCK, WARPS = 2048, 4
"""Columns of a program and its warps: 16 elements a thread, two loads of 16 bytes from each half."""


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where gate_up [tokens, 2 * inner] holds gate in its first half; returns [tokens, inner].

    Dispatch, here and below: CUDA -> the kernel, anything else -> the reference.
    """
    return silu_mul_triton(gate_up) if gate_up.is_cuda else silu_mul_reference(gate_up)


def gelu(x: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """gelu of x [tokens, inner]; returns a new tensor. ``approximate`` as in torch: "tanh", or "none" for erf."""
    return gelu_triton(x, approximate) if x.is_cuda else gelu_reference(x, approximate)


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """The definition of ``silu_mul``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_reference(x: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """The definition of ``gelu``."""
    return F.gelu(x, approximate=approximate)


def silu_mul_triton(gate_up: Tensor) -> Tensor:
    """``silu_mul`` of a contiguous tensor."""
    return _launch(gate_up, "silu", packed=True)


def gelu_triton(x: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """``gelu`` of a contiguous tensor."""
    return _launch(x, GELU[approximate], packed=False)


def _launch(x: Tensor, activation: str, packed: bool) -> Tensor:
    tokens, width = x.shape
    inner = width // 2 if packed else width
    out = torch.empty((tokens, inner), dtype=x.dtype, device=x.device)
    if tokens:
        _activate[(tokens, triton.cdiv(inner, BLOCK))](
            x, out, inner, ACTIVATION=activation, PACKED=packed, BLOCK=BLOCK, num_warps=WARPS
        )
    return out


@triton.jit
def _activate(  # type: ignore[no-untyped-def]
    x_ptr,
    out_ptr,
    inner,
    ACTIVATION: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    x_ptr += row * inner * (2 if PACKED else 1)
    x = tl.load(x_ptr + column, mask=inside, other=0.0, eviction_policy="evict_first")
    result = activate(x.to(tl.float32), ACTIVATION)
    if PACKED:
        up = tl.load(x_ptr + inner + column, mask=inside, other=0.0, eviction_policy="evict_first")
        result = result.to(x.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * inner + column, result.to(x.dtype), mask=inside)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activation named (silu, gelu_tanh, gelu_erf) of float32 values."""
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(y)) / 2 is sigmoid(2 y); 1.5957691 is twice the root of 2 / pi.
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


COMPILE_CASES = [
    CompileCase(
        f"{activation}{' packed' if packed else ''}",
        _activate,
        {"x_ptr": "*bf16", "out_ptr": "*bf16", "inner": "i32:16"},
        {"ACTIVATION": activation, "PACKED": packed, "BLOCK": BLOCK},
        num_warps=WARPS,
    )
    for activation, packed in (("silu", True), ("gelu_tanh", False), ("gelu_erf", False))
]
