"""Multi-head latent attention of chunks of prompts: the Triton kernels.

The latents that a chunk may see are gathered from the cache and expanded by one matrix product; the attention kernel
then reads the expanded keys and values as they came out of it, and the rotated key, which all heads share, from the
gathered rows. Queries and keys meet in two products (128 + 64 at full size), since tiles have powers of two.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from labkit.kernels.compile_check import CompileCase
from labkit.kernels.metadata import AttentionMetadata

LOG2E = 1.4426950408889634
GATHERED_TOKENS = 2**17
"""Most tokens, unless one sequence has more, whose latents are gathered at once: 150 MB at full size."""
EXPANDED_BYTES = 2**28
"""About how much memory expanded keys and values may take at once; longer contexts are expanded for fewer heads."""
GATHER_ROWS = 16
CONFIG = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["block_tables", "contexts", "ends"])
def _gather_kernel(  # type: ignore[no-untyped-def]
    cache,
    block_tables,
    contexts,
    ends,
    rows,
    table_stride,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Copies a tile of a sequence's cache rows to where the sequence lies in rows [all contexts, WIDTH]."""
    sequence = tl.program_id(1)
    context = tl.load(contexts + sequence)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_token = token < context
    column = tl.arange(0, WIDTH_PADDED)
    kept = is_token[:, None] & (column < WIDTH)[None, :]
    block = tl.load(block_tables + sequence * table_stride + token // BLOCK_SIZE, mask=is_token, other=0)
    source = block.to(tl.int64) * BLOCK_SIZE + token % BLOCK_SIZE
    target = (tl.load(ends + sequence) - context).to(tl.int64) + token
    found = tl.load(cache + source[:, None] * WIDTH + column[None, :], mask=kept)
    tl.store(rows + target[:, None] * WIDTH + column[None, :], found, mask=kept)


@triton.jit(do_not_specialize_on_alignment=["contexts", "ends", "query_starts"])
def _prefill_kernel(  # type: ignore[no-untyped-def]
    queries,
    expanded,
    rotary_keys,
    contexts,
    ends,
    query_starts,
    out,
    scale,
    query_token,
    query_head,
    token_stride,
    row_stride,
    out_token,
    out_head,
    NOPE: tl.constexpr,
    ROTARY: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of a chunk's queries for one head; ``scale`` is for base 2. Tiles with the most keys start first."""
    head, sequence = tl.program_id(1), tl.program_id(2)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    stream = tl.load(query_starts + sequence)
    new = tl.load(query_starts + sequence + 1) - stream
    if tile * BLOCK_M >= new:
        return
    context = tl.load(contexts + sequence)
    past = context - new
    begin = (tl.load(ends + sequence) - context).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = (row < new)[:, None]
    position = (past + row)[:, None]
    query_rows = queries + (stream + row).to(tl.int64)[:, None] * query_token + head * query_head
    query = tl.load(query_rows + tl.arange(0, NOPE)[None, :], mask=is_row, other=0.0)
    rotated_query = tl.load(query_rows + NOPE + tl.arange(0, ROTARY)[None, :], mask=is_row, other=0.0)
    keys = expanded + begin * token_stride + head * (NOPE + VALUE)
    rotary_keys += begin * row_stride
    sums = tl.zeros([BLOCK_M, VALUE], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    seen_by_all = (past + tile * BLOCK_M + 1) // BLOCK_N * BLOCK_N
    seen = tl.minimum(context, past + (tile + 1) * BLOCK_M)
    # Unrolled into two loops: the tiles that every row sees whole need no mask.
    for masked in tl.static_range(2):
        first = seen_by_all if masked else 0
        last = seen if masked else seen_by_all
        for start in range(first, last, BLOCK_N):
            token = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
            key_rows = keys + token * token_stride
            rotary_rows = rotary_keys + token * row_stride + tl.arange(0, ROTARY)[None, :]
            value_rows = key_rows + NOPE + tl.arange(0, VALUE)[None, :]
            key_rows += tl.arange(0, NOPE)[None, :]
            if masked:
                key = tl.load(key_rows, mask=token < context, other=0.0)
                rotary_key = tl.load(rotary_rows, mask=token < context, other=0.0)
                content = tl.load(value_rows, mask=token < context, other=0.0)
            else:
                key, rotary_key, content = tl.load(key_rows), tl.load(rotary_rows), tl.load(value_rows)
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            scores = tl.dot(rotated_query, tl.trans(rotary_key), scores, input_precision=PRECISION) * scale
            if masked:
                scores = tl.where((start + tl.arange(0, BLOCK_N))[None, :] <= position, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            fade = tl.exp2(top - higher)
            shares = tl.exp2(scores - higher[:, None])
            total = total * fade + tl.sum(shares, 1)
            sums = tl.dot(shares.to(content.dtype), content, sums * fade[:, None], input_precision=PRECISION)
            top = higher
    out_rows = out + (stream + row).to(tl.int64)[:, None] * out_token + head * out_head
    result = sums / total[:, None]
    tl.store(out_rows + tl.arange(0, VALUE)[None, :], result.to(out.dtype.element_ty), mask=is_row)


def _gather(cache: Tensor, block_tables: Tensor, contexts: Tensor, ends: Tensor, context_lens: list[int]) -> Tensor:
    """The cache rows of all sequences, one after the other: [all contexts, rank + rotary]."""
    block_size, width = cache.shape[3:]
    rows = cache.new_empty(sum(context_lens), width)
    _gather_kernel[triton.cdiv(max(context_lens), GATHER_ROWS), len(context_lens)](
        cache,
        block_tables,
        contexts,
        ends,
        rows,
        block_tables.stride(0),
        WIDTH=width,
        WIDTH_PADDED=triton.next_power_of_2(width),
        BLOCK_SIZE=block_size,
        ROWS=GATHER_ROWS,
        num_warps=4,
    )
    return rows


def mla_prefill_triton(
    queries: Tensor, kv_b: Tensor, cache: Tensor, meta: AttentionMetadata, scale: float, out: Tensor
) -> None:
    """Causal attention of the sequences past ``meta.decodes`` over their expanded keys and values, into ``out``.

    queries: [tokens, heads, nope + rotary] and out: [tokens, heads, value] of the whole stream; kv_b and cache as in
    ``labkit.kernels.mla``; nope, rotary and value: powers of two, at least 16. Sizes come from the host's lists, so
    this cannot be part of a CUDA graph.
    """
    for some in _pieces(meta.context_lens, meta.decodes):
        contexts = meta.contexts[some]
        ends = contexts.cumsum(0, dtype=torch.int32)
        rows = _gather(cache, meta.block_tables[some], contexts, ends, meta.context_lens[some])
        starts, longest = meta.query_starts[some.start : some.stop + 1], max(meta.query_lens[some])
        _attend(queries, kv_b, rows, contexts, ends, starts, longest, scale, out)


def _pieces(context_lens: list[int], first: int) -> Iterator[slice]:
    """Runs of the sequences from ``first`` on that have ``GATHERED_TOKENS`` together, at least one sequence each."""
    tokens = 0
    for i in range(first, len(context_lens)):
        if i > first and tokens + context_lens[i] > GATHERED_TOKENS:
            yield slice(first, i)
            first, tokens = i, 0
        tokens += context_lens[i]
    yield slice(first, len(context_lens))


def _attend(
    queries: Tensor,
    kv_b: Tensor,
    rows: Tensor,
    contexts: Tensor,
    ends: Tensor,
    query_starts: Tensor,
    longest: int,
    scale: float,
    out: Tensor,
) -> None:
    """Expands gathered rows and attends to them; ``longest``: most new tokens of a sequence."""
    heads, rank, value = queries.shape[1], kv_b.shape[1], out.shape[2]
    rotary = rows.shape[1] - rank
    nope = queries.shape[2] - rotary
    together = max(1, EXPANDED_BYTES // (len(rows) * (nope + value) * rows.element_size()))
    for first in range(0, heads, together):
        some = slice(first, min(heads, first + together))
        weight = kv_b[some.start * (nope + value) : some.stop * (nope + value)]
        expanded = F.linear(rows[:, :rank], weight)
        _prefill_kernel[triton.cdiv(longest, CONFIG["BLOCK_M"]), some.stop - some.start, len(contexts)](
            queries[:, some],
            expanded,
            rows[:, rank:],
            contexts,
            ends,
            query_starts,
            out[:, some],
            scale * LOG2E,
            queries.stride(0),
            queries.stride(1),
            expanded.stride(0),
            rows.stride(0),
            out.stride(0),
            out.stride(1),
            NOPE=nope,
            ROTARY=rotary,
            VALUE=value,
            PRECISION="ieee" if out.dtype == torch.float32 else "tf32",
            **CONFIG,
        )


COMPILE_CASES = [
    CompileCase(
        "mla_prefill",
        _prefill_kernel,
        {
            **dict.fromkeys(("queries", "expanded", "rotary_keys", "out"), "*bf16"),
            **dict.fromkeys(("contexts", "ends", "query_starts"), "*i32"),
            "scale": "fp32",
            **dict.fromkeys(
                ("query_token", "query_head", "token_stride", "row_stride", "out_token", "out_head"), "i32:16"
            ),
        },
        {
            "NOPE": 128,
            "ROTARY": 64,
            "VALUE": 128,
            "BLOCK_M": CONFIG["BLOCK_M"],
            "BLOCK_N": CONFIG["BLOCK_N"],
            "PRECISION": "tf32",
        },
        CONFIG["num_warps"],
        CONFIG["num_stages"],
        hgmma=True,
    ),
    CompileCase(
        "mla_gather",
        _gather_kernel,
        {
            **dict.fromkeys(("cache", "rows"), "*bf16"),
            **dict.fromkeys(("block_tables", "contexts", "ends"), "*i32"),
            "table_stride": "i32",
        },
        {"WIDTH": 576, "WIDTH_PADDED": 1024, "BLOCK_SIZE": 16, "ROWS": GATHER_ROWS},
    ),
]
