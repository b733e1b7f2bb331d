"""Every architecture against transformers: the same logits and greedy answers, however the tokens come in."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from labkit.models.loading import load_model, open_checkpoint

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(case: Any, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(open_checkpoint(str(case.path)), DEVICE, dtype)


def test_logits_equal_those_of_transformers(case: Any, drive: ModuleType) -> None:
    model = load(case)
    for chunks, block_size in (([1000], 16), ([1], 16), ([5], 5), ([100, 1], 16), ([33, 7, 1, 90], 16)):
        found = drive.Driver(model, case.prompts, block_size).prefill(chunks)
        for ours, theirs in zip(found, case.logits, strict=True):
            assert theirs.std() > 1, "logits that hardly vary would prove nothing"
            torch.testing.assert_close(ours, theirs, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("chunks", [[1000], [17, 3]])
def test_greedy_answers_equal_those_of_transformers(case: Any, drive: ModuleType, chunks: list[int]) -> None:
    assert drive.Driver(load(case), case.prompts).greedy(64, chunks) == case.answers
    assert len({tuple(answer) for answer in case.answers}) == len(case.answers)


@pytest.mark.parametrize("chunks", [[1000], [33, 1]])
def test_bfloat16_logits_are_as_near_the_truth_as_those_of_transformers(
    case: Any, drive: ModuleType, chunks: list[int]
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(case.path, dtype=torch.bfloat16)
    with torch.inference_mode():
        theirs = [reference(torch.tensor([prompt])).logits[0].float() for prompt in case.prompts]
    ours = drive.Driver(load(case, torch.bfloat16), case.prompts).prefill(chunks)
    truth = torch.cat(case.logits)
    # Where experts are nearly tied, rounding decides between them, and a position is far off: so the median of them.
    our_error, their_error = ((torch.cat(each) - truth).square().mean(-1).sqrt().median() for each in (ours, theirs))
    assert 0 < their_error < truth.std()
    assert our_error < 1.5 * their_error
