from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from labkit.errors import UserError
from labkit.training.checkpoint import newest_checkpoint
from labkit.training.curve import read_curve
from labkit.training.network import Shape
from labkit.training.options import TrainOptions, preset
from labkit.training.trainer import bucket_at, rate_at, train

TINY = TrainOptions(
    steps=8, batch_tokens=1536, warm_up=2, lr=3e-3, autocast=False, checkpoint_every_steps=1, curve_every=2,
    shares=(1.0, 0.0, 0.0), first_shares=(1.0, 0.0, 0.0), shape=Shape(hidden=32, layers=1, heads=2, kv_heads=1, intermediate=48),
)  # fmt: skip

CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_trainer import TINY
from labkit.training.trainer import train
root = Path({root!r})
train(TINY, root / "model", root / "checkpoints", root / "runs", say=print)
"""


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def test_a_training_killed_outright_resumes_to_the_same_weights(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole = train(TINY, tmp_path / "whole", tmp_path / "whole-checkpoints", tmp_path / "runs", say=lambda line: None)
    code = CHILD.format(tests=str(Path(__file__).parent), root=str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": os.getcwd()})
    while (found := newest_checkpoint(tmp_path / "checkpoints")) is None or found[1].step < 3:
        assert child.poll() is None and time.sleep(0.005) is None
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    stopped = newest_checkpoint(tmp_path / "checkpoints")
    assert stopped is not None and stopped[1].step < TINY.steps, "the child finished before it was killed"
    said: list[str] = []
    resumed = train(TINY, tmp_path / "model", tmp_path / "checkpoints", tmp_path / "runs", resume=True, say=said.append)
    assert any(f"at step {stopped[1].step}" in line for line in said)
    assert resumed.progress.taken == whole.progress.taken and resumed.progress.tokens == whole.progress.tokens
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "model").items())
    unfinished = [json.loads((path / "manifest.json").read_text())["state"] for path in (tmp_path / "runs").iterdir()]
    assert sorted(unfinished) == ["finished", "finished", "unfinished"]


def test_the_loss_falls_and_the_curve_records_it(tmp_path: Path) -> None:
    from dataclasses import replace

    trained = train(replace(TINY, steps=30), tmp_path / "model", tmp_path / "c", tmp_path / "runs", say=lambda line: None)
    losses = [row["loss"] for row in read_curve(trained.run)]
    assert len(losses) == 15 and losses[-1] < losses[0] - 1.0


def test_resuming_with_other_options_or_without_asking_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    few = replace(TINY, steps=1)
    arguments = (tmp_path / "model", tmp_path / "c", tmp_path / "runs")
    train(few, *arguments, say=lambda line: None)
    with pytest.raises(UserError, match="--resume"):
        train(few, *arguments)
    with pytest.raises(UserError, match="lr"):
        train(replace(few, lr=1e-4), *arguments, resume=True)


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path) -> None:
    from dataclasses import replace

    train(replace(TINY, steps=3), tmp_path / "model", tmp_path / "c", tmp_path / "runs", say=lambda line: None)
    newest = max((tmp_path / "c").glob("step-*"))
    newest.write_bytes(newest.read_bytes()[:100])
    found = newest_checkpoint(tmp_path / "c")
    assert found is not None and found[1].step == 2


def test_rates_rise_over_the_warm_up_and_fall_to_the_last_fraction() -> None:
    options = preset("ledger-r1", steps=1000, lr=1e-3, warm_up=100)
    assert rate_at(options, 0, 0.0) == pytest.approx(1e-5)
    assert rate_at(options, 99, 0.0) == pytest.approx(1e-3)
    assert rate_at(options, 999, 1.0) == pytest.approx(1e-5)
    assert rate_at(options, 500, 0.5) == pytest.approx(1e-3 * (0.01 + 0.99 * 0.5))


def test_long_documents_become_more_frequent_over_the_first_quarter() -> None:
    options = preset("ledger-r1", steps=1000)
    early = [bucket_at(options, step, 0.0) for step in range(2000)]
    late = [bucket_at(options, step, 0.3) for step in range(2000)]
    assert early.count("long") / 2000 == pytest.approx(0.05, abs=0.02)
    assert late.count("long") / 2000 == pytest.approx(0.32, abs=0.04)


def test_the_article_preset_is_the_articles_recipe() -> None:
    options = preset("article", steps=1)
    assert (options.lr, options.betas, options.eps) == (3e-5, (0.9, 0.98), 1e-6)
    assert (options.micro_batch, options.accumulate, options.autocast) == (16, 8, True)


@pytest.mark.parametrize(("changes", "named"), [({"steps": 0}, "--steps"), ({}, "--max-seconds"), ({"steps": 1, "schedule": "x"}, "--schedule")])
def test_impossible_options_are_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        preset("ledger-r1", **changes)
    with pytest.raises(UserError, match="article"):
        preset("nonsense")
