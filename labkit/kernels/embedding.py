"""The embedding of tokens of which some are known to the GPU alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from labkit.kernels.compile_check import CompileCase

BLOCK = 1024
"""Elements of a row that a program copies."""


def embed(token_ids: Tensor, last_tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight [vocab, hidden] of token_ids [tokens] int64, where -1 - row stands for last_tokens[row], int64:
    [tokens, hidden].

    Dispatch: CUDA -> the kernel, anything else -> the reference.
    """
    chosen = embed_triton if weight.is_cuda else embed_reference
    return chosen(token_ids, last_tokens, weight)


def embed_reference(token_ids: Tensor, last_tokens: Tensor, weight: Tensor) -> Tensor:
    """The definition of ``embed``."""
    known = token_ids >= 0
    return F.embedding(torch.where(known, token_ids, last_tokens[(-1 - token_ids).clamp_(min=0)]), weight)


def embed_triton(token_ids: Tensor, last_tokens: Tensor, weight: Tensor) -> Tensor:
    """``embed`` in one launch, of contiguous tensors."""
    tokens, hidden = len(token_ids), weight.shape[1]
    out = torch.empty((tokens, hidden), dtype=weight.dtype, device=weight.device)
    if tokens:
        _embed[(tokens, triton.cdiv(hidden, BLOCK))](token_ids, last_tokens, weight, out, hidden, BLOCK=BLOCK)
    return out


@triton.jit
def _embed(ids_ptr, last_ptr, weight_ptr, out_ptr, hidden, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64)
    token = tl.load(ids_ptr + place)
    if token < 0:
        token = tl.load(last_ptr - 1 - token)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(weight_ptr + token * hidden + column, mask=column < hidden)
    tl.store(out_ptr + place * hidden + column, x, mask=column < hidden)


def _case(dtype: str) -> CompileCase:
    types = {"ids_ptr": "*i64", "last_ptr": "*i64", "weight_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
    types["hidden"] = "i32:16"
    constants: dict[str, Any] = {"BLOCK": BLOCK}
    return CompileCase(f"embedding {dtype}", _embed, types, constants)


COMPILE_CASES = [_case("bf16"), _case("fp32")]
