"""Causal attention of many new tokens: over the paged KV cache for the engine, over dense tensors for comparison.

A program takes a tile of one sequence's new tokens and one query head, and goes over the keys that come before: first
the tiles that all its tokens see whole, then those on the diagonal, which need a mask. The scores never leave the
registers ("FlashAttention-2", Dao 2023). Tokens of a sequence that are in the cache already, from an earlier chunk or a
shared prefix, are read where they lie. The grid depends on shapes alone; programs find their sequence on the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.tools.tensor_descriptor import TensorDescriptor

from labkit.kernels.attention_decode import LOG2_E, precision
from labkit.kernels.compile_check import CompileCase


class Tile(NamedTuple):
    """A program's share: queries by keys at a time."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


CHUNKS = Tile(64, 64, 4, 3)
"""For the paged cache."""
LONG_CHUNKS = Tile(128, 64, 8, 3)
"""The same where sequences have more than ``LONG`` new tokens on average: fewer rows are padding or on the diagonal."""
LONG = 2048
EXACT = Tile(64, 32, 4, 2)
"""For float32, which takes twice the memory and more registers."""
DENSE, DENSE_LONG = Tile(64, 64, 4, 3), Tile(128, 128, 8, 3)
"""For dense tensors, which tensor descriptors (TMA) read; the larger one for heads of 128 and from ``LONG`` tokens on,
where fewer of its rows are on the diagonal."""


def prefill_attention(
    queries: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    contexts: Tensor,
    query_starts: Tensor,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(queries · keys * scale) · values of each new token over its sequence up to and including itself.

    queries: [tokens, heads, head_dim], rows may lie apart; cache: [2, kv_heads, blocks, block_size, head_dim], the new
    tokens' keys and values written already; block_tables: [sequences, widest] int32; contexts: [sequences] int32, the
    new tokens included; query_starts: [sequences + 1] int32, rows of queries. Rows before the first start and from the
    last on are not touched. Returns ``out`` or a new tensor like queries.
    Dispatch: the Triton kernel on CUDA, the reference elsewhere.
    """
    op = prefill_attention_triton if queries.is_cuda else prefill_attention_reference
    return op(queries, cache, block_tables, contexts, query_starts, scale, out)


def prefill_attention_reference(
    queries: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    contexts: Tensor,
    query_starts: Tensor,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """The definition, sequence by sequence in float32."""
    _, heads, head_dim = queries.shape
    kv_heads = cache.shape[1]
    out = torch.empty_like(queries, memory_format=torch.contiguous_format) if out is None else out
    starts = query_starts.tolist()
    for table, context, start, end in zip(block_tables, contexts.tolist(), starts[:-1], starts[1:], strict=True):
        keys, values = cache[:, :, table.long()].flatten(2, 3)[:, :, :context].float()
        grouped = queries[start:end].float().view(end - start, kv_heads, heads // kv_heads, head_dim)
        scores = torch.einsum("qhgd,hkd->hgqk", grouped, keys) * scale
        unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(context - end + start + 1)
        shares = scores.masked_fill(unseen, float("-inf")).softmax(-1)
        out[start:end] = torch.einsum("hgqk,hkd->qhgd", shares, values).flatten(1, 2).to(out.dtype)
    return out


def prefill_attention_triton(
    queries: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    contexts: Tensor,
    query_starts: Tensor,
    scale: float,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """``prefill_attention`` on the GPU. ``tile`` overrides the table, for tuning."""
    tokens, heads, head_dim = queries.shape
    sequences = len(contexts)
    _, kv_heads, blocks, block_size, _ = cache.shape
    if out is None:
        out = torch.empty((tokens, heads, head_dim), dtype=queries.dtype, device=queries.device)
    if not tokens or not sequences:
        return out
    chunks = LONG_CHUNKS if tokens > LONG * sequences else CHUNKS
    tile = tile or (EXACT if queries.dtype == torch.float32 else chunks)
    # Every sequence may leave a part of a tile over.
    _prefill[(heads, triton.cdiv(tokens, tile.queries) + sequences)](
        queries, cache, block_tables, contexts, query_starts, out,
        scale * LOG2_E, queries.stride(0), out.stride(0), block_tables.stride(0), blocks, sequences,
        GROUP=heads // kv_heads, HEAD_DIM=head_dim, PADDED_DIM=triton.next_power_of_2(head_dim), BLOCK_SIZE=block_size,
        QUERIES=tile.queries, KEYS=tile.keys, PRECISION=precision(queries.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def dense_attention(queries: Tensor, keys: Tensor, values: Tensor, causal: bool = True) -> Tensor:
    """Attention of [batch, heads, tokens, head_dim], all alike, at the scale head_dim ** -0.5; in 16 bits on a GPU.

    Dispatch: PyTorch's cuDNN kernel on compute capability 9.0, where it is at the ceiling; its flash kernel on other
    GPUs, where cuDNN is slower, and for what cuDNN refuses; whatever PyTorch picks on the CPU.
    """
    if not queries.is_cuda:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=causal)
    hopper = torch.cuda.get_device_capability(queries.device) == (9, 0)
    first = [SDPBackend.CUDNN_ATTENTION] if hopper else []
    with sdpa_kernel([*first, SDPBackend.FLASH_ATTENTION], set_priority=True):
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=causal)


def dense_attention_triton(
    queries: Tensor, keys: Tensor, values: Tensor, causal: bool = True, tile: Tile | None = None, kernel: Any = None
) -> Tensor:
    """``dense_attention`` by this project's kernel. All contiguous; head_dim is a power of two up to 128.

    ``tile`` overrides the table and ``kernel`` (``dense_kernel`` built in another way) what is launched, to compare.
    """
    batch, heads, tokens, head_dim = queries.shape
    if tile is None:
        long = head_dim == 128 and tokens >= LONG
        tile = EXACT if queries.dtype == torch.float32 else DENSE_LONG if long else DENSE
    out = torch.empty_like(queries)
    blocks = ([tile.queries, head_dim], [tile.keys, head_dim], [tile.keys, head_dim])
    tensors = (queries, keys, values)
    described = [
        TensorDescriptor.from_tensor(tensor.view(-1, head_dim), block)
        for tensor, block in zip(tensors, blocks, strict=True)
    ]
    # A head's tiles follow each other, so that its keys and values stay in the L2 cache.
    (kernel or dense_kernel)[(triton.cdiv(tokens, tile.queries), batch * heads)](
        *described, out, head_dim**-0.5 * LOG2_E, tokens,
        HEAD_DIM=head_dim, QUERIES=tile.queries, KEYS=tile.keys, CAUSAL=causal, PRECISION=precision(queries.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query, key, value, seen, acc, total, top, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """Takes one tile of keys and values into the running output, sum and maximum of each query."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    shares = tl.exp2(scores * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(shares, 1)
    acc = tl.dot(shares.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, new_top


@triton.jit
def _rows_of(table, start, end, tokens, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The cache's rows that hold a tile of tokens: [KEYS] int64."""
    at = start + tokens
    if BLOCK_SIZE % KEYS == 0:
        block = tl.load(table + start // BLOCK_SIZE, mask=start < end, other=0)
    else:
        block = tl.load(table + at // BLOCK_SIZE, mask=at < end, other=0)
    return block.to(tl.int64) * BLOCK_SIZE + at % BLOCK_SIZE


@triton.jit
def _sequence_of(tile, query_starts, base, sequences, QUERIES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which sequence a tile belongs to. The tiles of sequence i are numbered from (start - base) // QUERIES + i."""
    found = -1
    for low in range(0, sequences, 128):
        i = low + tl.arange(0, 128)
        start = tl.load(query_starts + i, mask=i < sequences, other=0) - base
        found += tl.sum(((i < sequences) & (start // QUERIES + i <= tile)).to(tl.int32), 0)
    return found


@triton.jit(
    do_not_specialize=["table_stride", "blocks", "sequences"],
    do_not_specialize_on_alignment=["block_tables", "contexts", "query_starts"],
)
def _prefill(  # type: ignore[no-untyped-def]
    queries, cache, block_tables, contexts, query_starts, out,
    scale, query_stride, out_stride, table_stride, blocks, sequences,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The last tiles have the most to read, so they start first.
    head, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    base = tl.load(query_starts)
    sequence = _sequence_of(tile, query_starts, base, sequences, QUERIES)
    start = tl.load(query_starts + sequence)
    new = tl.load(query_starts + sequence + 1) - start
    first = (tile - (start - base) // QUERIES - sequence) * QUERIES
    if first >= new:
        return
    context = tl.load(contexts + sequence)
    rows, dims, tokens = first + tl.arange(0, QUERIES), tl.arange(0, PADDED_DIM), tl.arange(0, KEYS)
    positions = context - new + rows
    in_head = (dims < HEAD_DIM)[None, :]
    in_tile = (rows < new)[:, None] & in_head
    in_stream = (start + rows).to(tl.int64)[:, None]
    at_head = head * HEAD_DIM + dims[None, :]
    query = tl.load(queries + in_stream * query_stride + at_head, mask=in_tile, other=0.0)

    table = block_tables + sequence.to(tl.int64) * table_stride
    plane = blocks.to(tl.int64) * (BLOCK_SIZE * HEAD_DIM)
    keys = cache + (head // GROUP) * plane + dims[None, :]
    values = keys + (tl.num_programs(0) // GROUP) * plane
    acc = tl.zeros([QUERIES, PADDED_DIM], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    # What the first query of the tile sees, all of them see.
    whole = (context - new + first + 1) // KEYS * KEYS
    # Block ids pass from one iteration to the next: where keys and values hang on a load of the same iteration,
    # Triton's pipeliner gives half of its stages to that load.
    at = _rows_of(table, 0, whole, tokens, BLOCK_SIZE, KEYS)
    for n in tl.range(0, whole, KEYS):
        place = at[:, None] * HEAD_DIM
        at = _rows_of(table, n + KEYS, whole, tokens, BLOCK_SIZE, KEYS)
        if HEAD_DIM == PADDED_DIM:
            key = tl.load(keys + place)
            value = tl.load(values + place)
        else:
            key = tl.load(keys + place, mask=in_head, other=0.0)
            value = tl.load(values + place, mask=in_head, other=0.0)
        acc, total, top = _attend(query, key, value, None, acc, total, top, scale, False, PRECISION)
    end = tl.minimum(context - new + first + QUERIES, context)
    for n in tl.range(whole, end, KEYS):
        place = _rows_of(table, n, end, tokens, BLOCK_SIZE, KEYS)[:, None] * HEAD_DIM
        written = (n + tokens < end)[:, None] & in_head
        key = tl.load(keys + place, mask=written, other=0.0)
        value = tl.load(values + place, mask=written, other=0.0)
        seen = (n + tokens)[None, :] <= positions[:, None]
        acc, total, top = _attend(query, key, value, seen, acc, total, top, scale, True, PRECISION)
    result = acc / total[:, None]
    tl.store(out + in_stream * out_stride + at_head, result.to(out.dtype.element_ty), mask=in_tile)


@triton.jit(do_not_specialize=["tokens"])
def dense_kernel(  # type: ignore[no-untyped-def]
    queries, keys, values, out, scale, tokens,
    HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1) * tokens
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    rows, columns = first + tl.arange(0, QUERIES), tl.arange(0, KEYS)
    query = queries.load([head + first, 0])
    acc = tl.zeros([QUERIES, HEAD_DIM], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    whole = (first + 1 if CAUSAL else tokens) // KEYS * KEYS
    for n in tl.range(0, whole, KEYS):
        key, value = keys.load([head + n, 0]), values.load([head + n, 0])
        acc, total, top = _attend(query, key, value, None, acc, total, top, scale, False, PRECISION)
    end = tl.minimum(first + QUERIES, tokens) if CAUSAL else tokens
    for n in tl.range(whole, end, KEYS):
        key, value = keys.load([head + n, 0]), values.load([head + n, 0])
        # A tile that reaches past the last token holds the next head's, or zeros.
        seen = (n + columns)[None, :] < tokens
        if CAUSAL:
            seen &= (n + columns)[None, :] <= rows[:, None]
        acc, total, top = _attend(query, key, value, seen, acc, total, top, scale, True, PRECISION)
    at = out + (head + rows).to(tl.int64)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=(rows < tokens)[:, None])


def _chunk_case(group: int, head_dim: int, block_size: int, tile: Tile) -> CompileCase:
    pointers = {"queries": "*bf16", "cache": "*bf16", "out": "*bf16"}
    pointers |= {"block_tables": "*i32", "contexts": "*i32", "query_starts": "*i32"}
    numbers = {"scale": "fp32", "query_stride": "i32:16", "out_stride": "i32:16", "table_stride": "i32"}
    numbers |= {"blocks": "i32", "sequences": "i32"}
    constexprs: dict[str, Any] = {
        "GROUP": group, "HEAD_DIM": head_dim, "PADDED_DIM": triton.next_power_of_2(head_dim), "BLOCK_SIZE": block_size,
        "QUERIES": tile.queries, "KEYS": tile.keys, "PRECISION": "tf32",
    }  # fmt: skip
    name = f"prefill {tile.queries} x {tile.keys} d{head_dim} block {block_size}"
    return CompileCase(name, _prefill, {**pointers, **numbers}, constexprs, tile.num_warps, tile.num_stages, hgmma=True)


def _dense_case(head_dim: int, causal: bool, tile: Tile) -> CompileCase:
    described = {
        "queries": f"tensordesc<bf16[{tile.queries}, {head_dim}]>",
        "keys": f"tensordesc<bf16[{tile.keys}, {head_dim}]>",
        "values": f"tensordesc<bf16[{tile.keys}, {head_dim}]>",
    }
    constexprs: dict[str, Any] = {
        "HEAD_DIM": head_dim, "QUERIES": tile.queries, "KEYS": tile.keys, "CAUSAL": causal, "PRECISION": "tf32"
    }  # fmt: skip
    signature = {**described, "out": "*bf16", "scale": "fp32", "tokens": "i32"}
    name = f"prefill dense {tile.queries} x {tile.keys} d{head_dim}{' causal' if causal else ''}"
    return CompileCase(name, dense_kernel, signature, constexprs, tile.num_warps, tile.num_stages, hgmma=True)


COMPILE_CASES = [
    _chunk_case(6, 128, 16, LONG_CHUNKS),
    _chunk_case(7, 128, 64, LONG_CHUNKS),
    _chunk_case(4, 96, 16, LONG_CHUNKS),
    _chunk_case(2, 64, 16, LONG_CHUNKS),
    _chunk_case(6, 128, 16, CHUNKS),
    _dense_case(128, True, DENSE_LONG),
    _dense_case(128, True, DENSE),
    _dense_case(64, True, DENSE),
    _dense_case(128, False, DENSE_LONG),
]
