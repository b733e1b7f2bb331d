"""Causal prefill attention: the Triton kernels and their references against float64, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from labkit.kernels.attention_prefill import (
    EXACT,
    dense_attention,
    dense_attention_triton,
    prefill_attention,
    prefill_attention_reference,
    prefill_attention_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bfloat16 is garbage in Triton's interpreter.
TYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Case:
    """Sequences of (new, context) tokens in scattered blocks; NaN wherever nothing was written.

    The stream has ``before`` rows that belong to nobody ahead of the sequences, and ``after`` behind them.
    """

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        heads: int = 2,
        kv_heads: int = 1,
        head_dim: int = 64,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        before: int = 0,
        after: int = 0,
        padded_sequences: int = 0,
    ) -> None:
        rng = np.random.default_rng(0)
        counts = [-(-context // block_size) for _, context in lengths]
        order = iter(rng.permutation(sum(counts) + 3).tolist())
        tables = torch.zeros(len(lengths) + padded_sequences, max(*counts, 1) + 1, dtype=torch.int32)
        cache = torch.full((2, kv_heads, sum(counts) + 3, block_size, head_dim), float("nan"))
        starts = np.cumsum([before] + [new for new, _ in lengths] + [0] * padded_sequences)
        tokens = int(starts[-1]) + after
        packed = torch.from_numpy(rng.normal(size=(tokens, heads + 2 * kv_heads, head_dim))).to(dtype)
        self.expected = np.full((tokens, heads, head_dim), 7.0)
        self.scale = head_dim**-0.5
        for row, (new, context) in enumerate(lengths):
            tables[row, : counts[row]] = torch.tensor([next(order) for _ in range(counts[row])])
            kv = torch.from_numpy(rng.normal(size=(2, kv_heads, context, head_dim))).to(dtype)
            at = torch.arange(context)
            cache[:, :, tables[row].long()[at // block_size], at % block_size] = kv.float()
            query = packed[starts[row] : starts[row] + new].double().numpy()
            for head in range(heads):
                keys, values = kv[:, head // (heads // kv_heads)].double().numpy()
                for token in range(new):
                    seen = context - new + token + 1
                    scores = keys[:seen] @ query[token, head] * self.scale
                    shares = np.exp(scores - scores.max())
                    self.expected[starts[row] + token, head] = shares @ values[:seen] / shares.sum()
        contexts = [context for _, context in lengths] + [0] * padded_sequences
        self.arguments = (
            packed.to(DEVICE)[:, :heads],
            cache.to(dtype).to(DEVICE),
            tables.to(DEVICE),
            torch.tensor(contexts, dtype=torch.int32, device=DEVICE),
            torch.tensor(starts, dtype=torch.int32, device=DEVICE),
            self.scale,
        )
        self.out = torch.full((tokens, heads, head_dim), 7.0, dtype=dtype, device=DEVICE)

    def check(self, found: torch.Tensor) -> None:
        assert found is self.out
        tolerance = TOLERANCE[found.dtype]
        np.testing.assert_allclose(found.double().cpu().numpy(), self.expected, atol=tolerance, rtol=tolerance)

    def run(self, small: bool = True) -> torch.Tensor:
        return prefill_attention_triton(*self.arguments, self.out, EXACT if small else None)


ODD = [(1, 1), (15, 15), (16, 16), (17, 17), (1, 33), (5, 21), (66, 66), (2, 70), (64, 129)]


@pytest.mark.parametrize("dtype", TYPES)
def test_odd_lengths_whole_and_in_chunks(dtype: torch.dtype) -> None:
    case = Case(ODD, 2, 2, dtype=dtype)
    case.check(case.run())


def test_rows_and_sequences_of_padding_are_left_alone() -> None:
    case = Case([(70, 70), (0, 0), (3, 40), (0, 0)], before=5, after=80, padded_sequences=3)
    case.check(case.run())


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (8, 2), (6, 1), (7, 1), (8, 1)])
def test_query_heads_share_key_heads(heads: int, kv_heads: int) -> None:
    case = Case([(17, 40)], heads, kv_heads)
    case.check(case.run())


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_head_sizes(head_dim: int) -> None:
    case = Case([(20, 80), (3, 3)], 2, 2, head_dim=head_dim, dtype=torch.float16)
    case.check(case.run(small=False))


@pytest.mark.parametrize("block_size", [16, 64, 256])
def test_block_sizes_below_and_above_a_tile(block_size: int) -> None:
    case = Case([(40, 140), (1, block_size + 1), (5, 5)], 2, 1, block_size=block_size)
    case.check(case.run())


def test_the_tuned_tiles() -> None:
    for lengths in ([(150, 200)], [(40, 90), (70, 70)]):
        case = Case(lengths, 1, 1, dtype=torch.float16)
        case.check(case.run(small=False))


def test_more_sequences_than_are_searched_at_once() -> None:
    case = Case([(1, 3), *[(0, 0)] * 128, (2, 2), (1, 1)], 1, 1, head_dim=16)
    case.check(case.run())


def test_the_reference_and_the_op() -> None:
    for op in (prefill_attention_reference, prefill_attention):
        case = Case([*ODD, (0, 0)], 6, 2, before=2, after=1)
        case.check(op(*case.arguments, case.out))


def test_no_tokens_give_no_output() -> None:
    queries, *rest = Case([(2, 2)]).arguments
    assert prefill_attention_triton(queries[:0], *rest).shape == (0, 2, 64)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens, head_dim", [(1, 64), (127, 64), (129, 64), (300, 128)])
def test_dense_attention(tokens: int, head_dim: int, causal: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2 if tokens < 200 else 1, 1, tokens, head_dim)
    queries, keys, values = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    scores = queries.double() @ keys.double().transpose(-1, -2) * head_dim**-0.5
    if causal:
        scores = scores.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), float("-inf"))
    expected = (scores.softmax(-1) @ values.double()).to(dtype)
    on_device = [each.to(DEVICE) for each in (queries, keys, values)]
    # PyTorch's fused kernels on CUDA do not take float32.
    ops = [dense_attention_triton] + ([dense_attention] if DEVICE == "cpu" or dtype != torch.float32 else [])
    for op in ops:
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(op(*on_device, causal).cpu(), expected, atol=tolerance, rtol=tolerance)
