"""The experiment behind claim C25, with real processes, and its verdict."""

from __future__ import annotations

import pytest
import torch

from labkit.deployment import Deployment
from labkit.errors import UserError
from labkit.experiments.split import Split, judge_split, measure_split


def test_two_processes_answer_the_shipped_models_questions_as_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    split = measure_split(Deployment(), asked=3)
    assert (split.processes, split.gpus, split.asked, split.same) == (2, 0, 3, 3)
    assert split.alone_s > 0 < split.split_s


def test_heads_that_cannot_be_shared_are_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="5"):
        measure_split(Deployment(), asked=1, processes=5)


@pytest.mark.parametrize(
    ("gpus", "same", "split_s", "outcome"),
    [
        (0, 12, 9.0, "not testable here"),
        (1, 12, 9.0, "not testable here"),
        (2, 12, 1.0, "confirmed"),
        (2, 12, 9.0, "partly"),
        (2, 11, 9.0, "refuted"),
    ],
)
def test_speed_is_judged_where_gpus_can_be_connected(gpus: int, same: int, split_s: float, outcome: str) -> None:
    verdict = judge_split(Split(2, gpus, 12, same, 2.0, split_s))
    assert verdict.outcome == outcome and verdict.evidence[0].n == 12
    if gpus < 2:
        assert f"{same} of 12" in verdict.reason and "It would take 2 GPUs" in verdict.reason
