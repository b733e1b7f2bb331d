"""Multi-head latent attention against its definition in float64, head by head, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from labkit.kernels import mla, mla_prefill
from labkit.kernels.metadata import AttentionMetadata
from labkit.kernels.mla_decode import mla_decode_triton
from labkit.kernels.mla_prefill import mla_prefill_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = [(torch.float32, 2e-5), (torch.float16, 3e-3)]
if DEVICE == "cuda":  # the interpreter cannot multiply bfloat16
    TOLERANCES.append((torch.bfloat16, 2e-2))


@dataclass(frozen=True)
class Sizes:
    heads: int = 2
    rank: int = 16
    nope: int = 16
    rotary: int = 16
    value: int = 16
    block_size: int = 16


@dataclass(frozen=True)
class Case:
    """What ``mla_attention`` takes, and what it must give."""

    queries: torch.Tensor
    kv_b: torch.Tensor
    cache: torch.Tensor
    meta: AttentionMetadata
    scale: float
    expected: np.ndarray


def attend(query: np.ndarray, stored: np.ndarray, kv_b: np.ndarray, sizes: Sizes, scale: float) -> np.ndarray:
    """Causal attention of the last tokens of one sequence, expanded: query [new, heads, nope + rotary], stored
    [context, rank + rotary]."""
    new, context = len(query), len(stored)
    out = np.zeros((new, sizes.heads, sizes.value))
    for head, weight in enumerate(kv_b.reshape(sizes.heads, sizes.nope + sizes.value, sizes.rank)):
        expanded = stored[:, : sizes.rank] @ weight.T
        keys = np.concatenate((expanded[:, : sizes.nope], stored[:, sizes.rank :]), axis=1)
        for token in range(new):
            seen = context - new + token + 1
            scores = keys[:seen] @ query[token, head] * scale
            shares = np.exp(scores - scores.max())
            out[token, head] = shares @ expanded[:seen, sizes.nope :] / shares.sum()
    return out


def make(lengths: list[tuple[int, int]], sizes: Sizes, dtype: torch.dtype = torch.float32) -> Case:
    """Sequences of (new, context) tokens in scattered blocks; those with one new token, or none, come first."""
    generator = torch.Generator().manual_seed(0)
    counts = [-(-context // sizes.block_size) for _, context in lengths]
    blocks = sum(counts) + 3
    order = iter(torch.randperm(blocks, generator=generator).tolist())
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    width = sizes.rank + sizes.rotary
    # Garbage where nothing was written: it must not reach any output.
    cache = torch.full((1, 1, blocks, sizes.block_size, width), 1e4, dtype=dtype)
    kv_b = torch.randn(sizes.heads * (sizes.nope + sizes.value), sizes.rank, generator=generator)
    kv_b = (kv_b / sizes.rank**0.5).to(dtype)
    scale = 0.7 * (sizes.nope + sizes.rotary) ** -0.5
    queries, slots, expected = [], [], []
    for row, (new, context) in enumerate(lengths):
        tables[row, : counts[row]] = torch.tensor([next(order) for _ in range(counts[row])])
        stored = torch.randn(context, width, generator=generator).to(dtype)
        token = torch.arange(context)
        place = tables[row, token // sizes.block_size].long() * sizes.block_size + token % sizes.block_size
        cache.view(-1, width)[place] = stored
        rows = new if context else 1
        query = torch.randn(rows, sizes.heads, sizes.nope + sizes.rotary, generator=generator).to(dtype)
        queries.append(query)
        slots.append(place[context - new :] if context else torch.tensor([-1]))
        if context:
            expected.append(attend(*(each.double().numpy() for each in (query, stored, kv_b)), sizes, scale))
        else:
            expected.append(np.zeros((1, sizes.heads, sizes.value)))
    taken = torch.tensor([0, *(len(each) for each in queries)])
    meta = AttentionMetadata(
        query_lens=[new for new, _ in lengths],
        context_lens=[context for _, context in lengths],
        contexts=torch.tensor([context for _, context in lengths], dtype=torch.int32, device=DEVICE),
        query_starts=taken.cumsum(0).to(torch.int32).to(DEVICE),
        block_tables=tables.to(DEVICE),
        slots=torch.cat(slots).to(DEVICE),
        decodes=sum(1 for new, _ in lengths if new == 1),
    )
    return Case(torch.cat(queries).to(DEVICE), kv_b.to(DEVICE), cache.to(DEVICE), meta, scale, np.concatenate(expected))


def close(found: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(found.double().cpu().numpy(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(heads=3, rank=32, nope=24, rotary=8, value=40, block_size=3)])
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 1), (1, 15), (1, 16), (1, 17), (1, 40), (1, 0)],
        [(15, 15)],
        [(1, 33), (5, 5), (5, 21), (16, 32), (2, 50)],
    ],
)
def test_attention_is_that_of_the_expanded_keys(lengths: list[tuple[int, int]], sizes: Sizes) -> None:
    case = make(lengths, sizes)
    found = mla.mla_attention(case.queries, case.kv_b, case.cache, case.meta, case.scale)
    close(found, case.expected, 2e-5)


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("sizes", [Sizes(), Sizes(heads=18, rank=32, block_size=3)])
def test_the_decode_kernel_agrees(sizes: Sizes, splits: int, dtype: torch.dtype, tolerance: float) -> None:
    case = make([(1, 1), (1, 15), (1, 16), (1, 17), (1, 0), (1, 63), (1, 64), (1, 65), (1, 400)], sizes, dtype)
    found = by_kernels(case, sizes, splits)
    close(found, case.expected, tolerance)


def test_the_decode_kernel_agrees_at_full_width() -> None:
    sizes = Sizes(heads=16, rank=512, nope=128, rotary=64, value=128)
    dtype, tolerance = TOLERANCES[-1]
    case = make([(1, 70), (1, 300)], sizes, dtype)
    close(by_kernels(case, sizes, 2), case.expected, tolerance)


STEPS = [
    [(1, 3), (1, 0), (1, 400), (3, 3), (2, 70)],
    [(1, 3), (7, 70), (5, 5)],
    [(4, 4)],
    [(1, 17), (1, 16)],
]


@pytest.mark.parametrize("lists", [True, False])
@pytest.mark.parametrize("lengths", STEPS)
def test_a_step_of_the_kernels_agrees(
    lengths: list[tuple[int, int]], lists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the host's lists and, as in a CUDA graph, without; in a graph there are padded chunks and tokens too."""
    monkeypatch.setattr(mla, "EXPAND_FROM", 4)
    case = make(lengths, Sizes(heads=2))
    queries, meta = case.queries, case.meta
    if not lists:
        if meta.decodes < len(lengths):
            queries = torch.cat((queries, queries[:3]))
            meta = padded(meta, 2)
        meta = replace(meta, query_lens=[], context_lens=[])
    found = mla.mla_attention_triton(queries, case.kv_b, case.cache, meta, case.scale)
    close(found[: len(case.queries)], case.expected, 2e-5)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_graph_follows_what_its_tensors_hold() -> None:
    sizes = Sizes(heads=16, rank=512, nope=128, rotary=64, value=128)
    lengths = [(1, 3), (1, 0), (1, 400), (5, 70), (3, 3)]
    one, other = (make(each, sizes, torch.bfloat16) for each in (lengths, lengths[2::-1] + lengths[3:]))
    meta = replace(one.meta, query_lens=[], context_lens=[])
    width = max(each.meta.block_tables.shape[1] for each in (one, other))
    tables = [F.pad(each.meta.block_tables, (0, width - each.meta.block_tables.shape[1])) for each in (one, other)]
    meta = replace(meta, block_tables=tables[0])
    run = partial(mla.mla_attention, one.queries, one.kv_b, one.cache, meta, one.scale)
    close(run(), one.expected, 2e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    graph.replay()
    close(found, one.expected, 2e-2)
    one.queries.copy_(other.queries)
    one.kv_b.copy_(other.kv_b)
    one.cache.copy_(other.cache)
    meta.contexts.copy_(other.meta.contexts)
    meta.query_starts.copy_(other.meta.query_starts)
    meta.block_tables.copy_(tables[1])
    graph.replay()
    close(found, other.expected, 2e-2)


def padded(meta: AttentionMetadata, chunks: int) -> AttentionMetadata:
    """With so many chunks more, of no tokens."""
    return replace(
        meta,
        contexts=F.pad(meta.contexts, (0, chunks)),
        query_starts=torch.cat((meta.query_starts, meta.query_starts[-1:].expand(chunks))),
        block_tables=F.pad(meta.block_tables, (0, 0, 0, chunks)),
    )


def by_kernels(case: Case, sizes: Sizes, splits: int | None) -> torch.Tensor:
    """Decoding with the kernel, the products around it in float32."""
    weight = case.kv_b.float().view(sizes.heads, -1, sizes.rank)
    plain, rotated = case.queries.split((sizes.nope, sizes.rotary), dim=-1)
    absorbed = torch.einsum("shn,hnr->hsr", plain.float(), weight[:, : sizes.nope]).to(plain.dtype).transpose(0, 1)
    meta = case.meta
    found = torch.empty_like(absorbed, memory_format=torch.contiguous_format)
    tables, contexts = meta.block_tables, meta.contexts
    mla_decode_triton(absorbed, rotated, case.cache, tables, contexts, case.scale, found, splits=splits)
    return torch.einsum("shr,hvr->shv", found.float(), weight[:, sizes.nope :])


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize(
    "lengths",
    [
        [(15, 15), (16, 16), (17, 17)],
        [(1, 3), (1, 5), (127, 127), (2, 140)],
        [(65, 129), (129, 200)],
    ],
)
@pytest.mark.parametrize("sizes", [Sizes(), Sizes(heads=1, nope=32, value=64, block_size=3)])
def test_the_prefill_kernel_agrees(
    sizes: Sizes, lengths: list[tuple[int, int]], dtype: torch.dtype, tolerance: float
) -> None:
    case = make(lengths, sizes, dtype)
    out = torch.zeros(*case.queries.shape[:2], sizes.value, dtype=dtype, device=DEVICE)
    mla_prefill_triton(case.queries, case.kv_b, case.cache, case.meta, case.scale, out)
    decodes = case.meta.decodes
    assert not out[:decodes].any()
    close(out[decodes:], case.expected[decodes:], tolerance)


def test_heads_and_sequences_take_turns_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla_prefill, "EXPANDED_BYTES", 20 * 32 * 4 * 2)
    monkeypatch.setattr(mla_prefill, "GATHERED_TOKENS", 20)
    case = make([(1, 5), (3, 20), (2, 4), (3, 16), (4, 30)], Sizes(heads=5))
    assert list(mla_prefill._pieces(case.meta.context_lens, 1)) == [slice(1, 2), slice(2, 4), slice(4, 5)]
    out = torch.zeros(13, 5, 16, device=DEVICE)
    mla_prefill_triton(case.queries, case.kv_b, case.cache, case.meta, case.scale, out)
    close(out[1:], case.expected[1:], 2e-5)


def test_pytorch_refuses_a_step_without_lengths() -> None:
    case = make([(1, 5)], Sizes())
    meta = replace(case.meta, query_lens=[], context_lens=[])
    with pytest.raises(ValueError, match="CUDA graph"):
        mla.mla_attention_reference(case.queries, case.kv_b, case.cache, meta, case.scale)


@pytest.mark.parametrize("write", [mla.write_latent_triton, mla.write_latent_reference])
@pytest.mark.parametrize("rank, rotary", [(4, 2), (12, 3)])
def test_padding_is_not_written(write: Callable[..., None], rank: int, rotary: int) -> None:
    cache = torch.zeros(1, 1, 3, 4, rank + rotary, device=DEVICE)
    latent, rotary_key = torch.randn(5, rank + rotary, device=DEVICE).split((rank, rotary), dim=-1)
    slots = torch.tensor([9, -1, 0, 3, -1], device=DEVICE)
    write(cache, latent, rotary_key, slots)
    rows = cache.view(12, -1)
    for token, slot in ((0, 9), (2, 0), (3, 3)):
        assert torch.equal(rows[slot], torch.cat((latent[token], rotary_key[token])))
        rows[slot] = 0
    assert not rows.any()
