"""Kernels made for one generation of GPUs against those made for the one before, on the newer GPU (claim C42)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pandas as pd
import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from labkit.experiments.claims import Evidence, Verdict, judge_facts, not_testable
from labkit.experiments.contests import Contest, Way, gain, is_faster
from labkit.kernels.attention_prefill import Tile, dense_attention_triton, dense_kernel

FLASH, CUDNN = "FlashAttention-2 (Ampere)", "cuDNN (Hopper)"
OURS_AMPERE, OURS_HOPPER = "labkit, Ampere's instructions", "labkit, Hopper's instructions"
PAIRS = ((FLASH, CUDNN), (OURS_AMPERE, OURS_HOPPER))
"""Each one made for Ampere and one made for Hopper."""
TOKENS = 16384
"""In all sequences of a contest together, so that short ones fill the GPU too."""
_TILE = Tile(128, 64, 8, 3)
"""The largest for heads of 128 that needs no more registers than there are with the instructions of either."""
_NO_WGMMA = "DISABLE_MMA_V3"
"""Triton's own switch: products by ``mma.sync``, the instruction of Ampere, where Hopper's ``wgmma`` would do."""


def generations_contests(
    lengths: Sequence[int], device: torch.device, dtype: torch.dtype, heads: int = 16
) -> list[Contest]:
    """Causal attention of whole prompts, head dimension 128, as many prompts as come to ``TOKENS``, in 16 bits; ``x``
    is the length of one in tokens.

    Two pairs. PyTorch's flash kernel is FlashAttention-2, written for Ampere (asynchronous copies, ``mma.sync``); that
    of cuDNN is written for Hopper (TMA, ``wgmma``). They differ in more than the generation, so the second pair is one
    source in one tile, ours, built twice: with Hopper's instruction for products and without. Anywhere but on compute
    capability 9.x every way is absent and says why.
    """
    reason = why_not(device)
    if reason:
        return [Contest(tokens, (), {name: reason for pair in PAIRS for name in pair}) for tokens in lengths]
    ways: dict[str, Way | str] = {
        FLASH: _sdpa(SDPBackend.FLASH_ATTENTION),
        CUDNN: _sdpa(SDPBackend.CUDNN_ATTENTION),
        OURS_AMPERE: _without_wgmma(),
        OURS_HOPPER: lambda q, k, v: dense_attention_triton(q, k, v, tile=_TILE),
    }
    return [Contest(tokens, _inputs(tokens, heads, device, dtype), ways) for tokens in lengths]


def why_not(device: torch.device) -> str:
    """Why ``device`` cannot tell the two generations apart; empty if it can."""
    if device.type != "cuda":
        return "no GPU"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major == 9 else f"a GPU of compute capability {major}.{minor}"


def judge_generations(table: pd.DataFrame) -> Verdict:
    """C42, at the longest prompt: of each pair, is the kernel that was made for this GPU faster than the other?"""
    absent = table[table["note"] != ""]
    if len(absent) == len(table):
        found = "; ".join(dict.fromkeys(absent["note"])) or "nothing was measured"
        return not_testable("C42", f"Here there is {found}", "a Hopper GPU (compute capability 9.x)")
    longest = int(table["x"].max())
    facts: dict[str, bool | None] = {}
    evidence = []
    for before, after in PAIRS:
        gains = {int(x): gain(table, before, after, int(x)) for x in sorted(table["x"].unique())}
        facts[f"at {longest} tokens {after} beats {before}"] = is_faster(gains[longest])
        evidence += [Evidence.of(f"{after}, {x} tokens: times faster", each) for x, each in gains.items() if each.n]
    return judge_facts("C42", facts, evidence)


def _inputs(tokens: int, heads: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, keys and values [prompts, heads, tokens, 128]."""
    generator = torch.Generator(device).manual_seed(tokens)
    shape = (max(1, TOKENS // tokens), heads, tokens, 128)
    return tuple(torch.randn(shape, device=device, dtype=dtype, generator=generator) for _ in range(3))


def _sdpa(backend: SDPBackend) -> Way:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def _without_wgmma() -> Way:
    """Our kernel, built apart from the one that serves and without ``wgmma``."""
    kernel = triton.jit(dense_kernel.fn)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with without_wgmma():  # it builds when it is first called
            return dense_attention_triton(q, k, v, tile=_TILE, kernel=kernel)

    return attend


@contextmanager
def without_wgmma() -> Iterator[None]:
    """Whatever Triton builds meanwhile does without Hopper's instruction for products."""
    before = os.environ.get(_NO_WGMMA)
    os.environ[_NO_WGMMA] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_WGMMA]
        else:
            os.environ[_NO_WGMMA] = before
