"""The memory-bound neighbours of attention beside eager and compiled PyTorch, products of few rows beside cuBLAS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.bench.operators import Case, compiled
from labkit.deployment import Deployment
from labkit.kernels.activation import gelu, gelu_reference, silu_mul, silu_mul_reference
from labkit.kernels.linear import linear, linear_triton, norm_linear, norm_linear_silu_mul
from labkit.kernels.norm import add_rms_norm, add_rms_norm_reference
from labkit.kernels.rope import RopeTable, rope_write, rope_write_reference
from labkit.kernels.sampling import greedy, sample, sample_reference

ROWS = {"cuda": (16384, 256), "cpu": (64,)}
WIDTHS = {"cuda": (8192, 1536), "cpu": (384,)}
VOCAB = {"cuda": (256, 151936), "cpu": (8, 768)}
"""Rows and width of the logits that are sampled from."""
HEADS = (12, 2, 128)
"""Query heads, key-value heads, head dimension of the 1.5B shape."""
EPS = 1e-6
MATRICES = {
    "1.5B": {
        "qkv": (2048, 1536), "out": (1536, 1536), "gate_up": (17920, 1536), "down": (1536, 8960),
        "head": (151936, 1536),
    },
    "7B": {
        "qkv": (4608, 3584), "out": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944),
        "head": (152064, 3584),
    },
}  # fmt: skip
"""Outputs and inputs of the linear layers of the two Qwen2 shapes."""
SKINNY = (1, 4, 8)


def cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    kind = device.type
    sizes = [(rows, width) for width in WIDTHS[kind] for rows in ROWS[kind]]
    makers = (_add_rms_norm, _silu_mul, _gelu)
    found = [make(rows, width, device, dtype) for make in makers for rows, width in sizes]
    found += [_rope_write(rows, device, dtype) for rows in ROWS[kind]]
    found += [_greedy(*VOCAB[kind], device), _nucleus(*VOCAB[kind], device)]
    shapes = MATRICES if kind == "cuda" else {"small": {"qkv": (640, 384), "gate_up": (512, 384)}}
    for model, matrices in shapes.items():
        found += [
            _linear(f"{model} {name}", rows, *shape, device, dtype)
            for name, shape in matrices.items()
            for rows in SKINNY
        ]
        found += [
            _norm_linear(f"{model} {name}", rows, *matrices[name], device, dtype)
            for name in ("qkv", "gate_up")
            for rows in SKINNY
        ]
    return found


def _add_rms_norm(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Reads x and the residual, writes their sum and what is normed."""
    make = _randoms((rows, width), (rows, width), (width,), device=device, dtype=dtype)

    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm_reference(x, residual, weight, EPS)

    return _case(
        "residual + RMSNorm", rows, width, make, plain, lambda x, r, w: add_rms_norm(x, r, w, EPS), 4, device, dtype
    )


def _silu_mul(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Reads gate and up, each ``width`` wide, writes their product."""
    make = _randoms((rows, 2 * width), device=device, dtype=dtype)
    return _case("SwiGLU", rows, width, make, silu_mul_reference, silu_mul, 3, device, dtype)


def _gelu(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Case:
    make = _randoms((rows, width), device=device, dtype=dtype)
    return _case("GELU (tanh)", rows, width, make, gelu_reference, gelu, 2, device, dtype)


def _case(
    name: str, rows: int, width: int, make: Callable[[int], Any], plain: Callable[..., Any],
    ours: Callable[..., Any], tensors: int, device: torch.device, dtype: torch.dtype,
) -> Case:  # fmt: skip
    """``tensors`` of rows x width are moved. ``plain`` is eager PyTorch, the one that is compiled, and in float32 the
    reference."""

    def wide(*inputs: Tensor) -> Any:
        return plain(*(each.float() for each in inputs))

    return Case(
        workload=f"elementwise: {name}",
        size=f"{rows} x {width}",
        make=make,
        reference=wide,
        contestants={"labkit": ours, "eager": plain, "torch.compile": compiled(plain, device)},
        bytes=tensors * rows * width * dtype.itemsize,
    )


def _rope_write(rows: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Reads queries, keys and values, writes the queries turned and the rest to the cache at slots in random order."""
    heads, kv_heads, dim = HEADS
    block = Deployment().kv_block_size
    table = RopeTable.build({"rope_type": "default", "rope_theta": 1e4}, dim, max(rows, 1024), device).cos_sin
    width = (heads + 2 * kv_heads) * dim

    def make(seed: int) -> tuple[Any, ...]:
        torch.manual_seed(seed)
        qkv = torch.randn(rows, width, device=device, dtype=dtype)
        blocks = -(-rows // block)
        cache = torch.zeros(2, kv_heads, blocks, block, dim, device=device, dtype=dtype)
        positions = torch.arange(rows, device=device)
        slots = torch.randperm(blocks * block, device=device)[:rows]
        return qkv, positions, table, cache, slots

    def ours(qkv: Tensor, positions: Tensor, table: Tensor, cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        return rope_write(qkv, positions, table, cache, slots, heads), cache

    def plain(qkv: Tensor, positions: Tensor, table: Tensor, cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        return rope_write_reference(qkv, positions, table, cache, slots, heads), cache

    return Case(
        workload="elementwise: RoPE + KV write",
        size=f"{rows} tokens, {heads}/{kv_heads} heads",
        make=make,
        reference=plain,
        contestants={"labkit": ours, "eager": plain},
        bytes=rows * (2 * width * dtype.itemsize + table.shape[1] * table.element_size()),
    )


def _greedy(rows: int, vocab: int, device: torch.device) -> Case:
    """Reads the logits once; float32, in which random ones have no ties."""
    return Case(
        workload="elementwise: sampling",
        size=f"greedy, {rows} x {vocab}",
        make=_randoms((rows, vocab), device=device, dtype=torch.float32),
        reference=lambda logits: logits.argmax(-1),
        contestants={"labkit": greedy, "eager": lambda logits: logits.argmax(-1)},
        bytes=4 * rows * vocab,
    )


def _nucleus(rows: int, vocab: int, device: torch.device) -> Case:
    """Temperature 0.7, top-k 50 and top-p 0.95; the reference sorts the vocabulary. The bytes are those of one reading.

    Whether the tokens agree is left to the tests: a random number at the boundary of two tokens may go either way.
    """

    def make(seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        temperature, top_p, min_p = (torch.full((rows,), value, device=device) for value in (0.7, 0.95, 0.0))
        logits, uniforms = torch.randn(rows, vocab, device=device), torch.rand(rows, device=device)
        top_k = torch.full((rows,), 50, dtype=torch.int32, device=device)
        return logits, temperature, top_k, top_p, min_p, uniforms

    return Case(
        workload="elementwise: sampling",
        size=f"top-k and top-p, {rows} x {vocab}",
        make=make,
        reference=sample_reference,
        contestants={"labkit": sample, "eager, sorting": sample_reference},
        bytes=4 * rows * vocab,
        tolerance=float("inf"),
    )


def _linear(name: str, rows: int, outputs: int, inputs: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Few rows times a matrix, which is read once: its bytes."""

    def make(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype) / inputs**0.5
        return torch.randn(rows, inputs, device=device, dtype=dtype), weight

    return Case(
        workload="elementwise: linear of few rows",
        size=f"{name} {outputs} x {inputs}, M={rows}",
        make=make,
        reference=lambda x, weight: F.linear(x.float(), weight.float()),
        contestants={
            "labkit": linear,
            "labkit Triton": linear_triton if device.type == "cuda" else "CUDA only",
            "F.linear": F.linear,
        },
        bytes=outputs * inputs * dtype.itemsize,
    )


def _norm_linear(name: str, rows: int, outputs: int, inputs: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Residual, norm, projection, and SwiGLU after ``gate_up``, as the engine has them. The bytes are the weight's."""
    gated = name.endswith("gate_up")

    def make(seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype) / inputs**0.5
        x, residual = torch.randn(2, rows, inputs, device=device, dtype=dtype)
        return x, residual, torch.randn(inputs, device=device, dtype=dtype), weight

    def ours(x: Tensor, residual: Tensor, norm: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return (norm_linear_silu_mul if gated else norm_linear)(x, residual, norm, EPS, weight)

    def plain(x: Tensor, residual: Tensor, norm: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        normed, total = add_rms_norm_reference(x, residual, norm, EPS)
        product = F.linear(normed, weight)
        return silu_mul_reference(product) if gated else product, total

    return Case(
        workload="elementwise: norm + linear of few rows",
        size=f"{name} {outputs} x {inputs}, M={rows}",
        make=make,
        reference=lambda *tensors: plain(*(each.float() for each in tensors)),
        contestants={"labkit": ours, "eager": plain},
        bytes=outputs * inputs * dtype.itemsize,
    )


def _randoms(*shapes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Callable[[int], tuple[Tensor, ...]]:
    def make(seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        return tuple(torch.randn(shape, device=device, dtype=dtype) for shape in shapes)

    return make
