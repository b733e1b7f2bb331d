"""Rotary position embedding: the table of angles, and rotating queries and keys on their way to the KV cache.

The layout is the half-rotated one of Llama and Qwen, where element i turns with element i + rotary_dim / 2;
``rope_interleaved`` is that of DeepSeek, where neighbours turn together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit.kernels.compile_check import CompileCase
from labkit.kernels.norm import rms_norm_reference
from labkit.kernels.overlap import gdc_launch_dependents, gdc_wait, overlaps


@dataclass(frozen=True)
class RopeTable:
    """Cosines and sines of every position of a model."""

    cos_sin: Tensor
    """[max_positions, rotary_dim] float32: cosines in the first half of a row, sines in the second."""

    @classmethod
    def build(
        cls, parameters: Mapping[str, Any], head_dim: int, max_positions: int, device: torch.device | str | None = None
    ) -> RopeTable:
        """From the ``rope_parameters`` of a ``transformers`` config, the dimension that is rotated (of each head; the
        head's own unless ``partial_rotary_factor`` says otherwise) and ``max_position_embeddings``.

        Raises ValueError for a rope type other than default, linear, llama3 and yarn.
        """
        frequencies, attention_factor = rope_frequencies(parameters, head_dim, max_positions)
        angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
        table = torch.cat((angles.cos(), angles.sin()), dim=-1) * attention_factor
        return cls(table.to(device))


def rope_frequencies(parameters: Mapping[str, Any], head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """Angle per position of each rotated pair, [rotary_dim / 2] float32, and the factor on cosines and sines.

    The formulas of ``transformers.modeling_rope_utils``. Raises ValueError for an unknown rope type.
    """
    kind = parameters.get("rope_type", "default")
    theta = float(parameters["rope_theta"])
    dim = int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))
    frequencies = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if kind == "default":
        return frequencies, 1.0
    if kind == "linear":
        return frequencies / parameters["factor"], 1.0
    if kind == "llama3":
        return _llama3(frequencies, parameters), 1.0
    if kind == "yarn":
        return _yarn(frequencies, parameters, theta, max_positions)
    raise ValueError(f"rope type {kind!r} is not supported; use default, linear, llama3 or yarn")


def _llama3(frequencies: Tensor, parameters: Mapping[str, Any]) -> Tensor:
    """Long wavelengths are stretched by the factor, short ones stay, those between go over smoothly (Llama 3.1)."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / parameters["factor"] + kept * frequencies


def _yarn(frequencies: Tensor, parameters: Mapping[str, Any], theta: float, max_positions: int) -> tuple[Tensor, float]:
    """Frequencies and attention factor of YaRN (arXiv 2309.00071), with DeepSeek's ``mscale``."""
    original = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or max_positions / original
    dim = 2 * len(frequencies)

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_that_turns(parameters.get("beta_fast") or 32)
    high = pair_that_turns(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low or 0.001)
    stretched = ramp.clamp(0, 1)
    return frequencies / factor * stretched + frequencies * (1 - stretched), _yarn_attention_factor(parameters, factor)


def _yarn_attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    scale, scale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return magnitude(scale) / magnitude(scale_all) if scale and scale_all else magnitude(1.0)


def rope_write(
    qkv: Tensor,
    positions: Tensor,
    table: Tensor,
    cache: Tensor,
    slots: Tensor,
    heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Rotates queries and keys, writes keys and values to the cache, and returns the queries [tokens, heads, head_dim].

    qkv: [tokens, (heads + 2 * kv_heads) * head_dim], contiguous, queries first; it may be overwritten, and the result
    may be a view of it. positions: [tokens] int64. table: ``RopeTable.cos_sin``. cache: [2, kv_heads, blocks,
    block_size, head_dim] of qkv's dtype. slots: [tokens] int64, -1 for tokens that are not written. q_norm, k_norm:
    [head_dim] weights of an RMSNorm of each query and key head before the rotation (Qwen3); both or neither.
    Dispatch: CUDA -> the kernel, anything else -> the reference.
    """
    chosen = rope_write_triton if qkv.is_cuda else rope_write_reference
    return chosen(qkv, positions, table, cache, slots, heads, q_norm, k_norm, eps)


def rope_write_reference(
    qkv: Tensor,
    positions: Tensor,
    table: Tensor,
    cache: Tensor,
    slots: Tensor,
    heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The definition of ``rope_write``; rotates in float32 and rounds once."""
    _, kv_heads, blocks, block_size, head_dim = cache.shape
    each = qkv.view(len(qkv), heads + 2 * kv_heads, head_dim)
    if q_norm is not None and k_norm is not None:
        for part, norm in ((each[:, :heads], q_norm), (each[:, heads : heads + kv_heads], k_norm)):
            part.copy_(rms_norm_reference(part, norm, eps))
    _rotate(each[:, : heads + kv_heads], table.index_select(0, positions))
    written, rows = each[:, heads:], cache.view(2 * kv_heads, blocks * block_size, head_dim)
    if len(slots) and slots.min() < 0:
        written, slots = written[slots >= 0], slots[slots >= 0]
    rows.index_copy_(1, slots, written.transpose(0, 1))
    return each[:, :heads]


def _rotate(x: Tensor, cos_sin: Tensor) -> None:
    """Rotates the first rotary_dim elements of x [tokens, heads, head_dim], in place, by cos_sin [tokens, rotary_dim].

    Every operation on a few tokens costs a CPU about the same: these are the fewest.
    """
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin[:, None, :half], cos_sin[:, None, half:]
    turned = x[..., : 2 * half]
    wide = turned.float()
    first, second = wide[..., :half], wide[..., half:]
    before = first.clone()
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(before, sin)
    if wide is not turned:
        turned.copy_(wide)


def rope_interleaved(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """Rotates the pairs of neighbours of x [tokens, heads, rotary_dim]; returns a new tensor of the same shape with the
    pairs' first elements in its first half and their second elements in its second, as ``transformers`` has it for
    DeepSeek (scores are the same in either order, so long as queries and keys agree).

    positions: [tokens] int64; table: ``RopeTable.cos_sin``. Dispatch: CUDA -> the kernel, anything else -> the
    reference.
    """
    return (rope_interleaved_triton if x.is_cuda else rope_interleaved_reference)(x, positions, table)


def rope_interleaved_reference(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """The definition of ``rope_interleaved``; rotates in float32 and rounds once."""
    halves = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
    _rotate(halves, table.index_select(0, positions))
    return halves


def rope_write_triton(
    qkv: Tensor,
    positions: Tensor,
    table: Tensor,
    cache: Tensor,
    slots: Tensor,
    heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """``rope_write`` in one launch; the queries are rotated in place and returned as a view of qkv."""
    tokens, kv_heads, head_dim = len(qkv), cache.shape[1], cache.shape[-1]
    pairs, heads_a_tile, warps = tuning(table.shape[-1])
    if tokens:
        _rope_write[(tokens, triton.cdiv(heads + 2 * kv_heads, heads_a_tile))](
            qkv, positions, table, cache, slots, q_norm, k_norm, heads, kv_heads, cache.stride(0), cache.stride(1), eps,
            HEAD_DIM=head_dim, ROTARY=table.shape[-1], PAIRS=pairs, HEADS=heads_a_tile, NORMED=q_norm is not None,
            REST=triton.next_power_of_2(max(head_dim - table.shape[-1], 1)), OVERLAP=overlaps(), launch_pdl=overlaps(),
            num_warps=warps,
        )  # fmt: skip
    return qkv.view(tokens, heads + 2 * kv_heads, head_dim)[:, :heads]


def rope_interleaved_triton(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """``rope_interleaved`` of x whose heads are contiguous; tokens and heads may lie apart."""
    tokens, heads, rotary = x.shape
    out = torch.empty((tokens, heads, rotary), dtype=x.dtype, device=x.device)
    pairs, heads_a_tile, warps = tuning(rotary)
    if tokens:
        _rope_interleaved[(tokens, triton.cdiv(heads, heads_a_tile))](
            x, positions, table, out, heads, x.stride(0), x.stride(1),
            ROTARY=rotary, PAIRS=pairs, HEADS=heads_a_tile, num_warps=warps,
        )  # fmt: skip
    return out


def tuning(rotary_dim: int) -> tuple[int, int, int]:
    """(pairs of a tile, heads of a tile, warps): 8 pairs a thread, so that loads are of 16 bytes, and no element in
    two threads, for one of them might read what the other has overwritten already."""
    pairs = triton.next_power_of_2(rotary_dim // 2)
    heads = max(8, 256 // pairs)
    return pairs, heads, max(heads * pairs // 256, 1)


@triton.jit
def _rope_write(  # type: ignore[no-untyped-def]
    qkv_ptr,
    positions_ptr,
    table_ptr,
    cache_ptr,
    slots_ptr,
    q_norm_ptr,
    k_norm_ptr,
    heads,
    kv_heads,
    cache_plane_stride,
    cache_head_stride,
    eps,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    PAIRS: tl.constexpr,
    HEADS: tl.constexpr,
    NORMED: tl.constexpr,
    REST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    HALF: tl.constexpr = ROTARY // 2
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    position = tl.load(positions_ptr + token)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    inside = (head < heads + 2 * kv_heads) & (pair < HALF)
    source = qkv_ptr + token * (heads + 2 * kv_heads) * HEAD_DIM + head * HEAD_DIM
    first = tl.load(source + pair, mask=inside, other=0.0)
    second = tl.load(source + HALF + pair, mask=inside, other=0.0)
    dtype = first.dtype
    first_wide, second_wide = first.to(tl.float32), second.to(tl.float32)
    if NORMED:
        squares = tl.sum(first_wide * first_wide + second_wide * second_wide, axis=1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        weight_ptr = tl.where(head < heads, q_norm_ptr, k_norm_ptr)
        first_weight = tl.load(weight_ptr + pair, mask=inside, other=0.0).to(tl.float32)
        second_weight = tl.load(weight_ptr + HALF + pair, mask=inside, other=0.0).to(tl.float32)
        # Rounded as the norm by itself would be: once for the quotient, once for the product.
        first_wide = ((first_wide * scale).to(dtype).to(tl.float32) * first_weight).to(dtype).to(tl.float32)
        second_wide = ((second_wide * scale).to(dtype).to(tl.float32) * second_weight).to(dtype).to(tl.float32)
    cos = tl.load(table_ptr + position * ROTARY + pair, mask=pair < HALF, other=0.0)
    sin = tl.load(table_ptr + position * ROTARY + HALF + pair, mask=pair < HALF, other=0.0)
    is_value = head >= heads + kv_heads
    first = tl.where(is_value, first, (first_wide * cos - second_wide * sin).to(dtype))
    second = tl.where(is_value, second, (second_wide * cos + first_wide * sin).to(dtype))
    is_query = head < heads
    tl.store(source + pair, first, mask=inside & is_query)
    tl.store(source + HALF + pair, second, mask=inside & is_query)
    kv_head = tl.where(is_value, head - heads - kv_heads, head - heads)
    plane = tl.where(is_value, cache_plane_stride, 0)
    target = cache_ptr + plane + kv_head.to(tl.int64) * cache_head_stride + slot * HEAD_DIM
    written = inside & (head >= heads) & (slot >= 0)
    tl.store(target + pair, first, mask=written)
    tl.store(target + HALF + pair, second, mask=written)
    if ROTARY < HEAD_DIM:
        tl.static_assert(not NORMED, "a norm of heads that are rotated in part is not supported")
        rest = ROTARY + tl.arange(0, REST)[None, :]
        kept = (head < heads + 2 * kv_heads) & (rest < HEAD_DIM) & (head >= heads) & (slot >= 0)
        tl.store(target + rest, tl.load(source + rest, mask=kept, other=0.0), mask=kept)


@triton.jit
def _rope_interleaved(  # type: ignore[no-untyped-def]
    x_ptr,
    positions_ptr,
    table_ptr,
    out_ptr,
    heads,
    token_stride,
    head_stride,
    ROTARY: tl.constexpr,
    PAIRS: tl.constexpr,
    HEADS: tl.constexpr,
):
    HALF: tl.constexpr = ROTARY // 2
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    inside = (head < heads) & (pair < HALF)
    position = tl.load(positions_ptr + token)
    source = x_ptr + token * token_stride + head * head_stride + 2 * pair
    first = tl.load(source, mask=inside, other=0.0)
    second = tl.load(source + 1, mask=inside, other=0.0)
    cos = tl.load(table_ptr + position * ROTARY + pair, mask=pair < HALF, other=0.0)
    sin = tl.load(table_ptr + position * ROTARY + HALF + pair, mask=pair < HALF, other=0.0)
    wide, other = first.to(tl.float32), second.to(tl.float32)
    target = out_ptr + (token * heads + head) * ROTARY + pair
    tl.store(target, (wide * cos - other * sin).to(first.dtype), mask=inside)
    tl.store(target + HALF, (other * cos + wide * sin).to(first.dtype), mask=inside)


def _case(head_dim: int, normed: bool) -> CompileCase:
    pairs, heads, warps = tuning(head_dim)
    norm = "*bf16" if normed else "constexpr"
    pointers = {"qkv_ptr": "*bf16", "positions_ptr": "*i64", "table_ptr": "*fp32", "cache_ptr": "*bf16"}
    pointers |= {"slots_ptr": "*i64"} | ({"q_norm_ptr": norm, "k_norm_ptr": norm} if normed else {})
    sizes = {"heads": "i32", "kv_heads": "i32", "cache_plane_stride": "i64:16", "cache_head_stride": "i64:16"}
    constants: dict[str, Any] = {"HEAD_DIM": head_dim, "ROTARY": head_dim, "PAIRS": pairs, "HEADS": heads}
    constants |= {"NORMED": normed, "REST": 1, "OVERLAP": True}
    constants |= {} if normed else {"q_norm_ptr": None, "k_norm_ptr": None}
    name = f"rope write {head_dim}{' with norms' if normed else ''}"
    return CompileCase(name, _rope_write, {**pointers, **sizes, "eps": "fp32"}, constants, num_warps=warps)


COMPILE_CASES = [_case(64, False), _case(96, False), _case(128, False), _case(128, True)]
