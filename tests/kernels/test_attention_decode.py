"""Paged decode attention: the Triton kernel and its reference against float64, head by head."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from labkit.kernels.attention_decode import (
    decode_attention,
    decode_attention_reference,
    decode_attention_triton,
    splits_for,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bfloat16 is garbage in Triton's interpreter.
TYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Case:
    """Contexts of given lengths in scattered blocks; NaN wherever nothing was written."""

    def __init__(
        self,
        contexts: list[int],
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 64,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        widest: int = 0,
    ) -> None:
        rng = np.random.default_rng(0)
        counts = [-(-context // block_size) for context in contexts]
        order = iter(rng.permutation(sum(counts) + 3).tolist())
        tables = torch.zeros(len(contexts), max(widest, *counts, 1), dtype=torch.int32)
        cache = torch.full((2, kv_heads, sum(counts) + 3, block_size, head_dim), float("nan"))
        # Rows of queries lie apart, as in the packed projection that they come from.
        packed = torch.from_numpy(rng.normal(size=(len(contexts), heads + 2 * kv_heads, head_dim))).to(dtype)
        self.scale = head_dim**-0.5
        self.expected = np.zeros((len(contexts), heads, head_dim))
        for row, context in enumerate(contexts):
            tables[row, : counts[row]] = torch.tensor([next(order) for _ in range(counts[row])])
            kv = torch.from_numpy(rng.normal(size=(2, kv_heads, context, head_dim))).to(dtype)
            at = torch.arange(context)
            cache[:, :, tables[row].long()[at // block_size], at % block_size] = kv.float()
            for head in range(heads if context else 0):
                keys, values = kv[:, head // (heads // kv_heads)].double().numpy()
                scores = keys @ packed[row, head].double().numpy() * self.scale
                shares = np.exp(scores - scores.max())
                self.expected[row, head] = shares @ values / shares.sum()
        self.queries, self.cache = packed.to(DEVICE)[:, :heads], cache.to(dtype).to(DEVICE)
        self.tables, self.contexts = tables.to(DEVICE), torch.tensor(contexts, dtype=torch.int32, device=DEVICE)

    def check(self, found: torch.Tensor) -> None:
        assert found.dtype == self.queries.dtype and found.shape == self.queries.shape
        tolerance = TOLERANCE[found.dtype]
        np.testing.assert_allclose(found.double().cpu().numpy(), self.expected, atol=tolerance, rtol=tolerance)

    def run(self, **options: object) -> torch.Tensor:
        return decode_attention_triton(
            self.queries, self.cache, self.tables, self.contexts, self.scale, **options  # type: ignore[arg-type]
        )  # fmt: skip


LENGTHS = [1, 15, 16, 17, 0, 63, 64, 65, 130]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", TYPES)
def test_odd_lengths_and_an_empty_sequence(splits: int, dtype: torch.dtype) -> None:
    case = Case(LENGTHS, 2, 1, dtype=dtype)
    case.check(case.run(splits=splits))


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (8, 2), (6, 1), (7, 1), (8, 1), (20, 1)])
def test_query_heads_share_key_heads(heads: int, kv_heads: int) -> None:
    case = Case([17, 70], heads, kv_heads)
    case.check(case.run(splits=2))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_head_sizes(head_dim: int, splits: int) -> None:
    case = Case([5, 150], head_dim=head_dim, dtype=torch.float16)
    case.check(case.run(splits=splits))


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
def test_block_sizes_below_and_above_a_tile(block_size: int) -> None:
    case = Case([1, 140, block_size + 1], 2, 1, head_dim=128, block_size=block_size)
    case.check(case.run(splits=2))


def test_a_part_of_several_tiles_and_more_parts_than_are_combined_at_once() -> None:
    case = Case([64 * 18 + 5], 2, 1, head_dim=128, block_size=64)
    case.check(case.run(splits=19))
    case.check(case.run(splits=4))


def test_large_scores_do_not_overflow() -> None:
    case = Case([100, 3])
    case.scale = 60.0
    found = case.run(splits=2).cpu()
    expected = decode_attention_reference(case.queries, case.cache, case.tables, case.contexts, case.scale).cpu()
    torch.testing.assert_close(found, expected, atol=3e-3, rtol=3e-3)


def test_the_output_may_be_given_with_rows_apart() -> None:
    case = Case([40, 0, 3], widest=9)
    wide = torch.full((3, 6, 64), 7.0, device=DEVICE)
    found = case.run(out=wide[:, :4])
    assert found.data_ptr() == wide.data_ptr()
    case.check(found)
    assert (wide[:, 4:] == 7).all()


def test_the_reference_and_the_op() -> None:
    case = Case(LENGTHS, 6, 2, widest=12)
    arguments = (case.queries, case.cache, case.tables, case.contexts, case.scale)
    case.check(decode_attention_reference(*arguments))
    case.check(decode_attention(*arguments))
    out = torch.empty_like(case.queries)
    assert decode_attention(*arguments, out) is out
    case.check(out)


def test_no_sequences_give_no_output() -> None:
    case = Case([4])
    found = decode_attention_triton(case.queries[:0], case.cache, case.tables[:0], case.contexts[:0], case.scale)
    assert found.shape == (0, 4, 64)


def test_the_rule_fills_the_gpu_without_parts_too_small_to_pay() -> None:
    assert splits_for(2, 256)[0] == 4, "a short context at batch 1"
    assert splits_for(2, 32768)[0] == 128, "a long one"
    assert splits_for(4096, 8192)[0] == 1, "sequences alone fill the GPU"
    assert splits_for(32 * 8, 4096)[0] == 1, "nearly, in one wave"
    assert splits_for(32 * 2, 4096)[0] == 7, "far from it"
    for programs in (1, 2, 8, 64, 256, 1024):
        for tokens in (16, 512, 4096, 131072):
            splits, chunk = splits_for(programs, tokens)
            assert splits == 1 or (splits - 1) * chunk < tokens
            assert 1 <= splits <= 128 and splits * programs <= 6 * 264 + programs
