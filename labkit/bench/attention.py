"""Attention kernels beside PyTorch's and FlashInfer's: causal prefill, decode over a paged cache, MLA decode."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from labkit.bench.operators import Case, compiled
from labkit.bench.timing import Call
from labkit.deployment import Deployment
from labkit.kernels.article import materialized_attention
from labkit.kernels.attention_decode import decode_attention, decode_attention_reference
from labkit.kernels.attention_prefill import (
    dense_attention,
    dense_attention_triton,
    prefill_attention,
    prefill_attention_reference,
)
from labkit.kernels.mla import mla_decode, mla_decode_reference

PREFILL = {"cuda": ((1024, 16), (4096, 4), (16384, 1)), "cpu": ((256, 1),)}
"""Tokens and sequences; 16384 tokens in all on CUDA."""
WIDTH = {"cuda": 2048, "cpu": 256}
"""Heads times head dimension."""
CHUNKS = {"cuda": ((12, 2, 4, 4096), (28, 4, 4, 4096), (12, 2, 32, 512)), "cpu": ((12, 2, 2, 128),)}
"""Query heads, key-value heads, prompts, tokens of each: whole prompts through the paged cache, as in the engine."""
DECODE = {
    "cuda": ((32, 8, 32, 4096), (32, 8, 128, 2048), (32, 8, 1, 8192), (12, 2, 32, 4096), (28, 4, 32, 4096)),
    "cpu": ((12, 2, 2, 512),),
}
"""Query heads, key-value heads, sequences, tokens in the cache of each."""
MLA = {"cuda": ((16, 32, 4096), (128, 32, 4096)), "cpu": ((4, 2, 512),)}
"""Heads, sequences, tokens."""
LATENT, ROTARY = 512, 64
ABSENT = "FlashInfer is not installed"
LONGEST_OF_THE_ARTICLE = 4096
"""Tokens; it holds all scores in memory, several times over."""


def cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    kind = device.type
    return [
        *(_prefill(tokens, batch, dim, device, dtype) for dim in (128, 64) for tokens, batch in PREFILL[kind]),
        *(_chunks(*sizes, device, dtype) for sizes in CHUNKS[kind]),
        *(_decode(*sizes, device, dtype) for sizes in DECODE[kind]),
        *(_mla(*sizes, device, dtype) for sizes in MLA[kind]),
    ]


def _prefill(tokens: int, batch: int, dim: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Causal attention of whole prompts, as many key heads as query heads. Half the products of the square count."""
    heads = WIDTH[device.type] // dim
    cuda = device.type == "cuda"

    def make(seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        shape = (batch, heads, tokens, dim)
        return tuple(torch.randn(shape, device=device, dtype=dtype) for _ in range(3))

    contestants: dict[str, Call | str] = {
        "SDPA flash": _sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION) if cuda else "CUDA only",
        "FlexAttention": _flex(tokens, device) if cuda else "compiled on CUDA only",
        "the article's code": _article(tokens, dim, device),
        "labkit": lambda q, k, v: dense_attention(q, k, v, True),
        "labkit Triton": (lambda q, k, v: dense_attention_triton(q, k, v, True)) if cuda else "CUDA only",
    }
    return Case(
        workload="attention: causal prefill",
        size=f"d{dim}, {tokens} x {batch}",
        make=make,
        # In float32 the memory-efficient kernel is the only one that never holds the square of scores.
        reference=_in_float32(_sdpa(SDPBackend.EFFICIENT_ATTENTION if cuda else SDPBackend.FLASH_ATTENTION)),
        contestants=contestants,
        flops=0.5 * 4 * batch * heads * tokens**2 * dim,
        tolerances={"the article's code": 5e-2},  # its softmax is in the type of its inputs
        holds=3 * batch * heads * tokens * dim * dtype.itemsize,
    )


def _chunks(
    heads: int, kv_heads: int, prompts: int, tokens: int, device: torch.device, dtype: torch.dtype, dim: int = 128
) -> Case:
    """Causal attention of several prompts at once over the paged cache, beside cuDNN's on contiguous ones."""
    block = Deployment().kv_block_size
    tables = _block_tables(prompts, tokens // block, device)
    starts = torch.arange(0, prompts * tokens + 1, tokens, dtype=torch.int32, device=device)

    def make(seed: int) -> tuple[Any, ...]:
        torch.manual_seed(seed)
        cache = torch.randn(2, kv_heads, tables.numel(), block, dim, device=device, dtype=dtype)
        queries = torch.randn(prompts * tokens, heads, dim, device=device, dtype=dtype)
        contexts = torch.full((prompts,), tokens, dtype=torch.int32, device=device)
        return queries, cache, tables, contexts, starts

    contestants: dict[str, Call | str] = {
        "labkit": lambda q, cache, tables, contexts, starts: prefill_attention(
            q, cache, tables, contexts, starts, dim**-0.5
        ),
        "SDPA cuDNN, contiguous": _contiguous_sdpa(causal=True) if device.type == "cuda" else "CUDA only",
    }
    return Case(
        workload="attention: paged prefill",
        size=f"GQA {heads}/{kv_heads} d{dim}, {tokens} x {prompts}",
        make=make,
        reference=_in_float32(
            lambda q, cache, tables, contexts, starts: prefill_attention_reference(
                q, cache, tables, contexts, starts, dim**-0.5
            )
        ),
        contestants=contestants,
        flops=0.5 * 4 * prompts * heads * tokens**2 * dim,
        holds=prompts * tokens * (2 * kv_heads + heads) * dim * dtype.itemsize,
    )


def _decode(
    heads: int, kv_heads: int, sequences: int, tokens: int, device: torch.device, dtype: torch.dtype, dim: int = 128
) -> Case:
    """One token a sequence over its paged cache, whose blocks lie in random order. The bytes are those of the cache."""
    block = Deployment().kv_block_size
    used = tokens // block
    scale = dim**-0.5
    tables = _block_tables(sequences, used, device)

    def make(seed: int) -> tuple[Any, ...]:
        torch.manual_seed(seed)
        cache = torch.randn(2, kv_heads, sequences * used, block, dim, device=device, dtype=dtype)
        queries = torch.randn(sequences, heads, dim, device=device, dtype=dtype)
        contexts = torch.full((sequences,), tokens, dtype=torch.int32, device=device)
        return queries, cache, tables, contexts

    contestants: dict[str, Call | str] = {
        "labkit": lambda queries, cache, tables, contexts: decode_attention(queries, cache, tables, contexts, scale),
        "FlashInfer": _flashinfer(heads, kv_heads, dim, tables, block, dtype) if find_spec("flashinfer") else ABSENT,
        "SDPA cuDNN, contiguous": _contiguous_sdpa() if device.type == "cuda" else "CUDA only",
    }
    bytes_ = sequences * tokens * 2 * kv_heads * dim * dtype.itemsize
    return Case(
        workload="attention: paged decode",
        size=f"GQA {heads}/{kv_heads} d{dim}, B={sequences} L={tokens}",
        make=make,
        reference=lambda queries, cache, tables, contexts: decode_attention_reference(
            queries, cache, tables, contexts, scale
        ),
        contestants=contestants,
        bytes=bytes_,
    )


def _mla(heads: int, sequences: int, tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
    """One absorbed token a sequence over the latents, which all heads share."""
    block = Deployment().kv_block_size
    used = tokens // block
    scale = (128 + ROTARY) ** -0.5
    tables = _block_tables(sequences, used, device)

    def make(seed: int) -> tuple[Any, ...]:
        torch.manual_seed(seed)
        cache = torch.randn(1, 1, sequences * used, block, LATENT + ROTARY, device=device, dtype=dtype)
        absorbed = torch.randn(sequences, heads, LATENT, device=device, dtype=dtype) / LATENT**0.5
        rotated = torch.randn(sequences, heads, ROTARY, device=device, dtype=dtype)
        contexts = torch.full((sequences,), tokens, dtype=torch.int32, device=device)
        return absorbed, rotated, cache, tables, contexts

    return Case(
        workload="attention: MLA decode",
        size=f"{heads} heads, B={sequences} L={tokens}",
        make=make,
        reference=_in_float32(
            lambda absorbed, rotated, cache, tables, contexts: mla_decode_reference(
                absorbed, rotated, cache, tables, contexts, scale
            )
        ),
        contestants={
            "labkit": lambda absorbed, rotated, cache, tables, contexts: mla_decode(
                absorbed, rotated, cache, tables, contexts, scale
            )
        },
        bytes=sequences * tokens * (LATENT + ROTARY) * dtype.itemsize,
        flops=2 * sequences * heads * tokens * (2 * LATENT + ROTARY),
    )


def _block_tables(sequences: int, used: int, device: torch.device) -> Tensor:
    """[sequences, used] int32: every block once, in random order."""
    order = torch.randperm(sequences * used, generator=torch.Generator().manual_seed(0))
    return order.view(sequences, used).to(torch.int32).to(device)


def _in_float32(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def in_float32(*inputs: Any) -> Tensor:
        floats = [isinstance(each, Tensor) and each.is_floating_point() for each in inputs]
        return call(*(each.float() if wide else each for each, wide in zip(inputs, floats, strict=True)))

    return in_float32


def _sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def _flex(tokens: int, device: torch.device) -> Call | str:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, tokens, tokens, device=device.type)
    compiled_attention = compiled(flex_attention, device)
    if isinstance(compiled_attention, str):
        return compiled_attention
    call = compiled_attention
    return lambda q, k, v: call(q, k, v, block_mask=mask)


def _article(tokens: int, dim: int, device: torch.device) -> Call | str:
    if tokens > LONGEST_OF_THE_ARTICLE:
        return "its scores would not fit the memory"
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    return lambda q, k, v: materialized_attention(q, k, v, mask, dim**-0.5)


def _contiguous_sdpa(causal: bool = False) -> Call:
    """cuDNN's attention when the cache need not be looked up: each sequence's keys and values in one piece.

    ``causal``: every sequence has as many queries as keys; otherwise one query.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(queries: Tensor, cache: Tensor, tables: Tensor, contexts: Tensor, *_: Tensor) -> Tensor:
        kv_heads, dim = cache.shape[1], cache.shape[-1]
        sequences, heads = len(tables), queries.shape[1]
        if cache.data_ptr() not in made:
            found = cache[:, :, tables.long()].transpose(1, 2)
            keys, values = found.reshape(2, sequences, kv_heads, -1, dim)
            made[cache.data_ptr()] = keys, values
        keys, values = made[cache.data_ptr()]
        spread = queries.view(sequences, -1, heads, dim).transpose(1, 2)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(spread, keys, values, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2).reshape(queries.shape)

    return attend


def _flashinfer(heads: int, kv_heads: int, dim: int, tables: Tensor, block: int, dtype: torch.dtype) -> Call:
    """Its paged decode with tensor cores, on a copy of the cache in its own layout [blocks, kv_heads, block, dim]."""
    package: Any = importlib.import_module("flashinfer")
    sequences, used = tables.shape
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=tables.device)
    wrapper = package.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    begins = torch.arange(sequences + 1, dtype=torch.int32, device=tables.device) * used
    last = torch.full((sequences,), block, dtype=torch.int32, device=tables.device)
    wrapper.plan(begins, tables.reshape(-1), last, heads, kv_heads, dim, block, q_data_type=dtype, kv_data_type=dtype)
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(queries: Tensor, cache: Tensor, tables: Tensor, contexts: Tensor) -> Tensor:
        if cache.data_ptr() not in made:
            keys, values = cache.transpose(1, 2).contiguous()
            made[cache.data_ptr()] = keys, values
        return wrapper.run(queries, made[cache.data_ptr()])

    return attend
