"""Choosing the next token of every row, each by its own parameters, without sorting the vocabulary.

A row is cut into chunks. One launch finds the maximum and the mass of every chunk; where top-k, top-p or min-p ask for
it, a second one finds the lowest score that is kept, and a third the mass that is kept of every chunk; the last picks
the chunk in which the random number falls, and the token in it. All sums have a fixed order: the same row gives the
same token in any batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit.kernels.compile_check import CompileCase

COLDEST = 1e-5
"""Below this temperature the likeliest token is taken: dividing by less could overflow float32."""
CHUNK, CHUNK_WARPS = 4096, 8
"""Scores of a program and its warps: 16 a thread."""
SEARCH_BYTES, SEARCH_WARPS = 16384, 16
"""Bytes of a chunk, and warps, of the one program that searches a row. It reads the row, from the L2 cache, once for
every halving, with three chunks under way at a time."""


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row, the first of those tied: [rows] int64. logits: [rows, vocab].

    Dispatch, here and in ``sample``: CUDA -> the kernels, anything else -> the reference.
    """
    return greedy_triton(logits) if logits.is_cuda else logits.argmax(-1)


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniforms: Tensor
) -> Tensor:
    """The next token of each row: [rows] int64.

    logits: [rows, vocab] float32, bfloat16 or float16. The parameters are tensors [rows]: temperature, top_p and min_p
    float32; top_k int32, 0 or at least vocab for none; uniforms float32 or float64, one random number in [0, 1) a row.
    Filters apply in the order temperature, top-k, top-p, min-p; tokens tied with the last one kept are kept too. Among
    the tokens kept, in the order of the vocabulary, the first whose cumulative probability exceeds the random number is
    taken. A temperature below COLDEST takes the likeliest.
    """
    chosen = sample_triton if logits.is_cuda else sample_reference
    return chosen(logits, temperature, top_k, top_p, min_p, uniforms)


def sample_reference(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniforms: Tensor
) -> Tensor:
    """The definition of ``sample``, with a sort and sums in float64."""
    scores = filtered_scores(logits, temperature, top_k, top_p, min_p)
    cumulative = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
    # In float64 the largest random number, 1 - 2**-53, times the total stays below the total.
    point = uniforms.double()[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, point, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
    return torch.where(temperature < COLDEST, logits.argmax(-1), drawn)


def filtered_scores(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """logits / temperature, with what the filters of ``sample`` exclude at -inf: [rows, vocab] float32."""
    scores = logits.float() / torch.where(temperature < COLDEST, 1.0, temperature)[:, None]
    lowest = scores.amax(-1, keepdim=True) + min_p[:, None].log()
    if bool(((top_k > 0) & (top_k < logits.shape[-1]) | (top_p < 1)).any()):
        lowest = torch.maximum(lowest, _lowest_of_top(scores, top_k, top_p))
    return scores.masked_fill(scores < lowest, float("-inf"))


def _lowest_of_top(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The lowest score [rows, 1] that top-k and then top-p keep."""
    vocab = scores.shape[-1]
    ordered = scores.sort(-1, descending=True).values
    last = torch.where((top_k <= 0) | (top_k > vocab), vocab, top_k).long() - 1
    lowest = ordered.gather(-1, last[:, None])
    likely = ordered.masked_fill(ordered < lowest, float("-inf")).softmax(-1, dtype=torch.float64)
    # A token is kept while those before it have not reached top_p; the first always is.
    kept = (likely.cumsum(-1) - likely < top_p[:, None]).sum(-1, keepdim=True).clamp_(min=1)
    nucleus = ordered.gather(-1, kept - 1).masked_fill(top_p[:, None] >= 1, float("-inf"))
    return torch.maximum(lowest, nucleus)


def greedy_triton(logits: Tensor) -> Tensor:
    """``greedy`` of contiguous logits: one pass over them, and a launch to compare the chunks."""
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    chunks = triton.cdiv(vocab, CHUNK)
    highest = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    firsts = torch.empty((rows, chunks), dtype=torch.int32, device=logits.device)
    if rows:
        _measure[(rows, chunks)](
            logits, None, highest, firsts, None, None, vocab, GREEDY=True, CHUNK=CHUNK,
            num_warps=CHUNK_WARPS,
        )  # fmt: skip
        _draw[(rows,)](
            logits, None, None, highest, firsts, None, None, tokens, vocab, chunks,
            GREEDY=True, CHUNK=CHUNK, CHUNKS=triton.next_power_of_2(chunks), num_warps=1,
        )  # fmt: skip
    return tokens


def sample_triton(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniforms: Tensor
) -> Tensor:
    """``sample`` of contiguous logits in four launches, whatever the values of the parameters."""
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    chunks = triton.cdiv(vocab, CHUNK)
    highest = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    masses, least = torch.empty_like(highest), torch.empty_like(highest)
    firsts = torch.empty((rows, chunks), dtype=torch.int32, device=logits.device)
    lowest = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if not rows:
        return tokens
    spread = triton.next_power_of_2(chunks)
    _measure[(rows, chunks)](
        logits, temperature, highest, firsts, masses, least, vocab,
        GREEDY=False, CHUNK=CHUNK, num_warps=CHUNK_WARPS,
    )  # fmt: skip
    _find_lowest[(rows,)](
        logits, temperature, top_k, top_p, min_p, highest, masses, least, lowest, vocab, chunks,
        CHUNK=SEARCH_BYTES // logits.element_size(), CHUNKS=spread, num_warps=SEARCH_WARPS,
    )  # fmt: skip
    _weigh[(rows, chunks)](
        logits, temperature, lowest, highest, masses, vocab, chunks,
        CHUNK=CHUNK, CHUNKS=spread, num_warps=CHUNK_WARPS,
    )  # fmt: skip
    _draw[(rows,)](
        logits, temperature, lowest, highest, firsts, masses, uniforms, tokens, vocab, chunks,
        GREEDY=False, CHUNK=CHUNK, CHUNKS=spread, num_warps=CHUNK_WARPS,
    )  # fmt: skip
    return tokens


@triton.jit
def _divisor(temperature_ptr, row):  # type: ignore[no-untyped-def]
    """The row's temperature, 1 for rows that take the likeliest token."""
    temperature = tl.load(temperature_ptr + row)
    return tl.where(temperature < 1e-5, 1.0, temperature)


@triton.jit
def _scores(logits_ptr, row, first, divisor, vocab, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores [CHUNK] float32 of a row from ``first`` on, -inf past its end."""
    column = first + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row.to(tl.int64) * vocab + column, mask=column < vocab, other=float("-inf"))
    return x.to(tl.float32) / divisor


@triton.jit
def _measure(  # type: ignore[no-untyped-def]
    logits_ptr,
    temperature_ptr,
    highest_ptr,
    firsts_ptr,
    masses_ptr,
    least_ptr,
    vocab,
    GREEDY: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Of each chunk: the highest score and where it is first, and the sum of exp(score - highest), and the least."""
    row = tl.program_id(0)
    at = row * tl.num_programs(1) + tl.program_id(1)
    first = tl.program_id(1) * CHUNK
    divisor = 1.0 if GREEDY else _divisor(temperature_ptr, row)
    scores = _scores(logits_ptr, row, first, divisor, vocab, CHUNK)
    highest = tl.max(scores, axis=0)
    tl.store(highest_ptr + at, highest)
    tl.store(firsts_ptr + at, first + tl.min(tl.where(scores == highest, tl.arange(0, CHUNK), CHUNK - 1), axis=0))
    if not GREEDY:
        finite = scores > float("-inf")
        tl.store(masses_ptr + at, tl.sum(tl.where(finite, tl.exp(scores - highest), 0.0), axis=0))
        tl.store(least_ptr + at, tl.min(tl.where(finite, scores, float("inf")), axis=0))


@triton.jit
def _find_lowest(  # type: ignore[no-untyped-def]
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    highest_ptr,
    masses_ptr,
    least_ptr,
    lowest_ptr,
    vocab,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The lowest score of a row that may be drawn, -inf if all may."""
    row = tl.program_id(0)
    chunk = tl.arange(0, CHUNKS)
    at = row * chunks + chunk
    highest = tl.load(highest_ptr + at, mask=chunk < chunks, other=float("-inf"))
    top = tl.max(highest, axis=0)
    divisor = _divisor(temperature_ptr, row)
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    lowest = float("-inf")
    if tl.load(temperature_ptr + row) >= 1e-5:
        least = tl.min(tl.load(least_ptr + at, mask=chunk < chunks, other=float("inf")), axis=0)
        if (top_k > 0) & (top_k < vocab):
            wanted = top_k.to(tl.float32)
            lowest = _search(logits_ptr, row, divisor, vocab, wanted, least, top, top, False, CHUNK)
        if top_p < 1.0:
            masses = tl.load(masses_ptr + at, mask=chunk < chunks, other=0.0)
            mass = tl.sum(tl.where(masses > 0, masses * tl.exp(highest - top), 0.0), axis=0)
            if lowest > float("-inf"):
                mass = _mass(logits_ptr, row, divisor, vocab, lowest, top, CHUNK)
            bottom = tl.maximum(lowest, least)
            lowest = _search(logits_ptr, row, divisor, vocab, top_p * mass, bottom, top, top, True, CHUNK)
        if min_p > 0.0:
            lowest = tl.maximum(lowest, top + tl.log(min_p))
    tl.store(lowest_ptr + row, lowest)


@triton.jit
def _search(  # type: ignore[no-untyped-def]
    logits_ptr, row, divisor, vocab, wanted, bottom, top, peak, MASS: tl.constexpr, CHUNK: tl.constexpr
):
    """The lowest score between bottom and top above which there are fewer than ``wanted`` tokens, or, for MASS, less
    than ``wanted`` of the sum of exp(score - peak).

    Halves the range, whose ends then move to the next score there is, until one score is left.
    """
    while bottom < top:
        pivot = bottom + (top - bottom) * 0.5
        # Halfway between neighbours may round up to the upper one, and the range would stay as it is.
        pivot = tl.where(pivot < top, pivot, bottom)
        above = tl.zeros((CHUNK,), dtype=tl.float32)
        next_above = tl.full((CHUNK,), float("inf"), dtype=tl.float32)
        next_below = tl.full((CHUNK,), float("-inf"), dtype=tl.float32)
        for first in tl.range(0, vocab, CHUNK, num_stages=4):
            scores = _scores(logits_ptr, row, first, divisor, vocab, CHUNK)
            is_above = scores > pivot
            above += tl.where(is_above, tl.exp(scores - peak) if MASS else 1.0, 0.0)
            next_above = tl.where(is_above, tl.minimum(next_above, scores), next_above)
            next_below = tl.where(is_above, next_below, tl.maximum(next_below, scores))
        if tl.sum(above, axis=0) < wanted:
            top = tl.max(next_below, axis=0)
        else:
            bottom = tl.min(next_above, axis=0)
    return top


@triton.jit
def _mass(logits_ptr, row, divisor, vocab, lowest, peak, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of exp(score - peak) over scores of at least ``lowest``."""
    mass = tl.zeros((CHUNK,), dtype=tl.float32)
    for first in tl.range(0, vocab, CHUNK, num_stages=4):
        scores = _scores(logits_ptr, row, first, divisor, vocab, CHUNK)
        mass += tl.where(scores >= lowest, tl.exp(scores - peak), 0.0)
    return tl.sum(mass, axis=0)


@triton.jit
def _weigh(  # type: ignore[no-untyped-def]
    logits_ptr,
    temperature_ptr,
    lowest_ptr,
    highest_ptr,
    masses_ptr,
    vocab,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Makes the mass of each chunk the sum of exp(score - the row's highest) over the scores that are kept."""
    row = tl.program_id(0)
    at = row * chunks + tl.program_id(1)
    chunk = tl.arange(0, CHUNKS)
    peak = tl.max(tl.load(highest_ptr + row * chunks + chunk, mask=chunk < chunks, other=float("-inf")), axis=0)
    lowest, highest = tl.load(lowest_ptr + row), tl.load(highest_ptr + at)
    if highest < lowest:
        tl.store(masses_ptr + at, 0.0)
    elif lowest > float("-inf"):
        divisor = _divisor(temperature_ptr, row)
        scores = _scores(logits_ptr, row, tl.program_id(1) * CHUNK, divisor, vocab, CHUNK)
        tl.store(masses_ptr + at, tl.sum(tl.where(scores >= lowest, tl.exp(scores - peak), 0.0), axis=0))
    else:
        tl.store(masses_ptr + at, tl.load(masses_ptr + at) * tl.exp(highest - peak))


@triton.jit
def _draw(  # type: ignore[no-untyped-def]
    logits_ptr,
    temperature_ptr,
    lowest_ptr,
    highest_ptr,
    firsts_ptr,
    masses_ptr,
    uniforms_ptr,
    tokens_ptr,
    vocab,
    chunks,
    GREEDY: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The token of a row: the likeliest, or the one at which the masses so far exceed a share of their sum."""
    row = tl.program_id(0)
    chunk = tl.arange(0, CHUNKS)
    at = row * chunks + chunk
    highest = tl.load(highest_ptr + at, mask=chunk < chunks, other=float("-inf"))
    peak = tl.max(highest, axis=0)
    peaks = (highest == peak) & (chunk < chunks)
    token = tl.min(tl.where(peaks, tl.load(firsts_ptr + at, mask=chunk < chunks, other=0), vocab - 1), axis=0)
    if not GREEDY:
        if tl.load(temperature_ptr + row) >= 1e-5:
            masses = tl.load(masses_ptr + at, mask=chunk < chunks, other=0.0)
            point = tl.load(uniforms_ptr + row).to(tl.float32) * tl.sum(masses, axis=0)
            chosen = _first_past(masses, point)
            point -= tl.sum(tl.where(chunk < chosen, masses, 0.0), axis=0)
            scores = _scores(logits_ptr, row, chosen * CHUNK, _divisor(temperature_ptr, row), vocab, CHUNK)
            kept = tl.where(scores >= tl.load(lowest_ptr + row), tl.exp(scores - peak), 0.0)
            drawn = chosen * CHUNK + _first_past(kept, point)
            token = tl.where((chosen >= 0) & (drawn < vocab), drawn, token)
    tl.store(tokens_ptr + row, token.to(tl.int64))


@triton.jit
def _first_past(masses, point):  # type: ignore[no-untyped-def]
    """The first place with a mass at which the sum so far exceeds the point; the last with a mass if rounding lets none
    exceed it."""
    place = tl.arange(0, masses.shape[0])
    past = (tl.cumsum(masses, axis=0) > point) & (masses > 0)
    first = tl.min(tl.where(past, place, masses.shape[0]), axis=0)
    last = tl.max(tl.where(masses > 0, place, 0), axis=0)
    return tl.minimum(first, last)


def _cases() -> list[CompileCase]:
    """Each kernel at a vocabulary of 151,936 in bfloat16 and float32."""
    sizes = {"vocab": "i32:16", "chunks": "i32"}
    floats = ("temperature", "top_p", "min_p", "highest", "masses", "least", "lowest", "uniforms")
    types = {f"{name}_ptr": "*fp32" for name in floats} | {"top_k_ptr": "*i32", "firsts_ptr": "*i32"}
    types |= {"tokens_ptr": "*i64", **sizes}
    constants = {"CHUNKS": 64}
    found = []
    for logits, bytes_each in (("bf16", 2), ("fp32", 4)):
        for kernel, chunk, warps, extra in (
            (_measure, CHUNK, CHUNK_WARPS, {"GREEDY": True}),
            (_measure, CHUNK, CHUNK_WARPS, {"GREEDY": False}),
            (_find_lowest, SEARCH_BYTES // bytes_each, SEARCH_WARPS, {}),
            (_weigh, CHUNK, CHUNK_WARPS, {}),
            (_draw, CHUNK, 1, {"GREEDY": True}),
            (_draw, CHUNK, CHUNK_WARPS, {"GREEDY": False}),
        ):
            known = {**types, "logits_ptr": f"*{logits}"}
            signature = {name: known[name] for name in kernel.arg_names if name in known}
            given = {**constants, **extra, "CHUNK": chunk}
            chosen = {name: value for name, value in given.items() if name in kernel.arg_names}
            name = f"sample{kernel.__name__} {logits}{' greedy' if extra.get('GREEDY') else ''}"
            found.append(CompileCase(name, kernel, signature, chosen, num_warps=warps))
    return found


COMPILE_CASES = _cases()
