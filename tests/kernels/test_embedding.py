"""Looking tokens up, those of the device among them."""

from __future__ import annotations

import pytest
import torch

from labkit.kernels.embedding import embed, embed_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.mark.parametrize("found", [embed, embed_triton], ids=["dispatched", "kernel"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [16, 100, 1024, 1536])
def test_a_token_below_zero_is_one_that_was_kept(hidden: int, dtype: torch.dtype, found: object) -> None:
    weight = torch.randn(7, hidden).to(DEVICE, dtype)
    last_tokens = torch.tensor([6, 4, 0], device=DEVICE)
    token_ids = torch.tensor([5, -1, 0, -3, -2, 6], device=DEVICE)
    given = token_ids.clone()
    rows = found(token_ids, last_tokens, weight)  # type: ignore[operator]
    assert torch.equal(rows, torch.stack([weight[token] for token in (5, 6, 0, 0, 4, 6)]))
    assert torch.equal(token_ids, given)


def test_no_tokens_are_no_rows() -> None:
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert embed_triton(none, none, torch.randn(7, 16, device=DEVICE)).shape == (0, 16)
