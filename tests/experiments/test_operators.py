"""The operators that the article names: that all ways compute the same, and how their claims are judged."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from labkit.experiments import operators
from labkit.experiments.contests import Contest, run_contests

CPU, F32 = torch.device("cpu"), torch.float32
SERIES = {
    "attention": lambda: operators.attention_contests([32, 64], CPU, F32),
    "softmax": lambda: operators.softmax_contests([33, 130], CPU, F32),
    "layer norm": lambda: operators.layer_norm_contests([8, 16], CPU, F32),
    "RMS norm": lambda: operators.rms_norm_contests([8, 16], CPU, F32),
    "GELU": lambda: operators.gelu_contests([8, 16], CPU, F32),
    "embedding": lambda: operators.embedding_contests([8, 1500], torch.randn(2000, 16)),
}


@pytest.mark.parametrize("series", SERIES.values(), ids=SERIES.keys())
def test_all_ways_agree_and_only_those_for_a_gpu_are_absent(series: object) -> None:
    contests: list[Contest] = series()  # type: ignore[operator]
    table = run_contests(contests, CPU, rounds=2)
    assert set(table["note"]) <= {"", operators.ONLY_CUDA}
    assert len(table[table["note"] == ""]["way"].unique()) >= 2
    shown = operators.speeds(table)
    assert (shown["value"] > 0).all() and sorted(shown["x"].unique()) == [contest.x for contest in contests]


def test_the_articles_attention_does_not_run_as_printed_nor_beyond_its_mask() -> None:
    assert "boolean" in operators.article_attention_as_printed().lower()
    assert "2049" in operators.article_attention_beyond() and not operators.article_attention_beyond(16)
    too_long = run_contests(operators.attention_contests([2049], CPU, F32, heads=1), CPU, rounds=1)
    assert "2048" in too_long[too_long["way"] == operators.ARTICLE]["note"].iloc[0]


def made_up(times: dict[tuple[str, int], tuple[float, int]]) -> pd.DataFrame:
    """A table of 15 equal rounds: (way, x) -> (seconds, bytes)."""
    rows = [(way, x, turn, *found, "") for (way, x), found in times.items() for turn in range(15)]
    return pd.DataFrame(rows, columns=["way", "x", "round", "seconds", "bytes", "note"])


def test_flash_is_judged_by_time_and_by_how_memory_grows() -> None:
    flash, article = operators.SDPA, operators.ARTICLE
    times = {
        (flash, 1024): (1.0, 100),
        (flash, 2048): (4.0, 200),
        (article, 1024): (3.0, 100),
        (article, 2048): (12.0, 400),
    }
    assert operators.growth(made_up(times), flash) == pytest.approx(1)
    assert operators.growth(made_up(times), article) == pytest.approx(2)
    assert operators.judge_flash(made_up(times)).outcome == "confirmed"
    assert operators.judge_article_attention(made_up(times)).outcome == "refuted"
    slower = times | {(flash, 2048): (13.0, 200)}
    assert operators.judge_flash(made_up(slower)).outcome == "partly"


@pytest.mark.parametrize(("seconds", "outcome"), [(2.0, "confirmed"), (0.5, "refuted")])
def test_a_gain_decides_on_norm_gelu_and_cache(seconds: float, outcome: str) -> None:
    written_out = made_up({(operators.WRITTEN_OUT, 8): (seconds, 0), (operators.PYTORCH, 8): (1.0, 0)})
    assert operators.judge_norm(written_out).outcome == operators.judge_gelu(written_out).outcome == outcome
    cached = made_up({(operators.PYTORCH, 8): (seconds, 0), ("lru_cache", 8): (1.0, 0)})
    assert operators.judge_cache(cached).outcome == outcome


def test_redundant_work_of_the_softmax_counts_only_if_leaving_it_out_is_faster() -> None:
    for seconds, outcome in ((2.0, "confirmed"), (0.5, "partly")):
        table = made_up({("all scores", 512): (seconds, 0), ("those in sight", 512): (1.0, 0)})
        assert operators.judge_softmax(table, [0.3] * 5).outcome == outcome


def test_an_embedding_is_a_bottleneck_from_a_tenth_of_a_pass_on() -> None:
    assert operators.judge_embedding([0.01] * 5).outcome == "refuted"
    assert operators.judge_embedding([0.2] * 5).outcome == "confirmed"


def test_shares_of_a_forward_pass(tiny_model: Path) -> None:
    step = operators.eager_pass(str(tiny_model), 32, CPU)
    looked_up, softmax = (operators.shares(step, op, repeats=2) for op in ("embedding", "softmax"))
    assert len(looked_up) == 2 and all(0 < share < 1 for share in looked_up + softmax)
    assert operators.shares(step, "no such operator", repeats=1) == [0.0]
