from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from labkit.errors import UserError
from labkit.training import modeldir
from labkit.training.checkpoint import newest_checkpoint
from labkit.training.curve import read_curve
from labkit.training.documents import Batch, Feed, make_batch
from labkit.training.network import Network, Shape, weighted_loss
from labkit.training.options import TrainOptions, preset
from labkit.training.schedule import bucket_at, rate_at, seconds_left
from labkit.training.steps import Stepper
from labkit.training.tokenizer import piece_table, train_tokenizer
from labkit.training.trainer import train

TINY = TrainOptions(
    steps=8,
    batch_tokens=1536,
    warm_up=2,
    lr=3e-3,
    autocast=False,
    checkpoint_every_steps=1,
    curve_every=2,
    shares=(1.0, 0.0, 0.0),
    first_shares=(1.0, 0.0, 0.0),
    shape=Shape(hidden=32, layers=1, heads=2, kv_heads=1, intermediate=48),
)

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
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
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
    states = [json.loads((path / "manifest.json").read_text())["state"] for path in (tmp_path / "runs").iterdir()]
    assert sorted(states) == ["finished", "finished", "unfinished"]
    # the run of the second sitting tells the whole story
    one, other = (read_curve(run) for run in (whole.run, resumed.run))
    assert [row["step"] for row in one] == [row["step"] for row in other] == [2, 4, 6, 8]
    assert one[0]["loss"] == other[0]["loss"] and one[-1]["tokens"] == other[-1]["tokens"]


def test_the_loss_falls_and_the_curve_records_it(tmp_path: Path) -> None:
    trained = train(
        replace(TINY, steps=30), tmp_path / "model", tmp_path / "c", tmp_path / "runs", say=lambda line: None
    )
    losses = [row["loss"] for row in read_curve(trained.run)]
    assert len(losses) == 15 and losses[-1] < losses[0] - 1.0


def test_resuming_with_other_options_or_without_asking_is_refused(tmp_path: Path) -> None:
    few = replace(TINY, steps=1)
    arguments = (tmp_path / "model", tmp_path / "c", tmp_path / "runs")
    train(few, *arguments, say=lambda line: None)
    with pytest.raises(UserError, match="--resume"):
        train(few, *arguments)
    with pytest.raises(UserError, match="lr"):
        train(replace(few, lr=1e-4), *arguments, resume=True)


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path) -> None:
    train(replace(TINY, steps=3), tmp_path / "model", tmp_path / "c", tmp_path / "runs", say=lambda line: None)
    newest = max((tmp_path / "c").glob("step-*"))
    newest.write_bytes(newest.read_bytes()[:100])
    found = newest_checkpoint(tmp_path / "c")
    assert found is not None and found[1].step == 2


def test_micro_batches_of_a_step_add_up_to_one_large_batch(tmp_path: Path) -> None:
    one = replace(TINY, steps=1, micro_batch=1, accumulate=1)
    network = Network(TINY.shape, TINY.seed)
    table = piece_table(train_tokenizer())
    batches = [make_batch(table, 1, "short", counter, 1) for counter in range(3)]
    total, norm = Stepper(network, one).step(batches, 1e-3)
    fresh = Network(TINY.shape, TINY.seed)
    losses = [
        weighted_loss(fresh, torch.from_numpy(batch.ids).long(), torch.from_numpy(batch.weights)) for batch in batches
    ]
    mean = torch.stack(losses).mean()
    mean.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in fresh.parameters()]).norm()  # type: ignore[union-attr]
    torch.testing.assert_close((total, norm), (mean.detach(), expected), rtol=1e-4, atol=1e-5)


def test_how_adamw_is_carried_out_and_what_is_recomputed_may_change_between_sittings(tmp_path: Path) -> None:
    """None of it changes what is learnt, so a training may go on with less memory or another AdamW."""
    places = (tmp_path / "c", tmp_path / "runs")
    train(replace(TINY, steps=6), tmp_path / "whole", tmp_path / "d", tmp_path / "runs", say=lambda line: None)
    for steps, optimizer, checkpointing in ((2, "fused", "none"), (4, "loop", "all"), (6, "foreach", "half")):
        options = replace(TINY, steps=steps, optimizer=optimizer, checkpointing=checkpointing)
        train(options, tmp_path / "parts", *places, resume=True, say=lambda line: None)
    # the cosine follows the steps, of which the first sittings have fewer, so the weights are near, not the same
    whole = weights(tmp_path / "whole")
    parts = weights(tmp_path / "parts")
    assert all((value.float() - parts[name].float()).abs().max() < 0.02 for name, value in whole.items())


@pytest.mark.parametrize("optimizer", ["foreach", "loop"])
def test_every_adamw_takes_the_same_steps(optimizer: str) -> None:
    table = piece_table(train_tokenizer())
    batches = [make_batch(table, 1, "short", counter, 1) for counter in range(3)]
    found = []
    for kind in ("fused", optimizer):
        stepper = Stepper(Network(TINY.shape, 1), replace(TINY, optimizer=kind))
        for batch in batches:
            stepper.step([batch], 1e-2)
        found.append(torch.cat([parameter.detach().flatten() for parameter in stepper.network.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_documents_from_processes_train_the_same_model(tmp_path: Path) -> None:
    few = replace(TINY, steps=2)
    train(few, tmp_path / "here", tmp_path / "c", tmp_path / "runs", say=lambda line: None)
    train(replace(few, processes=1), tmp_path / "there", tmp_path / "d", tmp_path / "runs", say=lambda line: None)
    here = weights(tmp_path / "here")
    assert all(torch.equal(value, here[name]) for name, value in weights(tmp_path / "there").items())


def test_the_article_preset_trains(tmp_path: Path) -> None:
    options = preset("article", steps=1, shape=TINY.shape, first_shares=TINY.first_shares, probe_every_s=1e9)
    trained = train(options, tmp_path / "model", tmp_path / "c", tmp_path / "runs", say=lambda line: None)
    assert trained.progress.taken == {"short": 8, "medium": 0, "long": 0}
    assert trained.progress.tokens == 8 * 16 * 768 and (tmp_path / "model" / "config.json").is_file()


def test_a_loss_that_is_not_finite_ends_the_training_and_leaves_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Stepper.step

    def spoilt(self: Stepper, batches: list[Batch], rate: float, done: float) -> tuple[torch.Tensor, torch.Tensor]:
        loss, norm = step(self, batches, rate, done)
        spoilt.calls += 1  # type: ignore[attr-defined]
        return loss, norm * (float("nan") if spoilt.calls == 3 else 1.0)  # type: ignore[attr-defined]

    spoilt.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(Stepper, "step", spoilt)
    with pytest.raises(UserError, match="not finite near step 3.*--resume.*--lr"):
        train(TINY, tmp_path / "model", tmp_path / "c", tmp_path / "runs", say=lambda line: None)
    found = newest_checkpoint(tmp_path / "c")
    assert found is not None and found[1].step == 2 and not (tmp_path / "model").exists()


def test_too_little_room_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5))
    with pytest.raises(UserError, match="has 0 MB free"):
        train(TINY, tmp_path / "model", tmp_path / "c", tmp_path / "runs", say=lambda line: None)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_whole_checkpoints_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = modeldir.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        save(tensors, path, metadata=metadata)
        if json.loads(metadata["progress"])["step"] == 3:
            path.write_bytes(path.read_bytes()[:5000])
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(modeldir, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train(TINY, tmp_path / "model", tmp_path / "c", tmp_path / "runs", say=lambda line: None)
    assert sorted(file.name for file in (tmp_path / "c").iterdir()) == [
        "step-00000001.safetensors",
        "step-00000002.safetensors",
    ]


def test_a_process_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def take(self: Feed) -> None:
        raise BrokenProcessPool("A process in the process pool was terminated abruptly")

    monkeypatch.setattr(Feed, "take", take)
    with pytest.raises(UserError, match="fewer --processes"):
        train(TINY, tmp_path / "model", tmp_path / "c", tmp_path / "runs", say=lambda line: None)


def test_time_left_counts_all_sittings() -> None:
    assert seconds_left(replace(TINY, steps=100), 25, 30.0) == pytest.approx(90.0)
    assert seconds_left(replace(TINY, steps=None, max_seconds=40.0), 25, 30.0) == pytest.approx(10.0)
    assert seconds_left(replace(TINY, steps=100), 100, 30.0) == 0.0


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


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 0}, "--steps"),
        ({}, "--max-seconds"),
        ({"steps": 1, "schedule": "x"}, "--schedule"),
        ({"steps": 1, "optimizer": "sgd"}, "--optimizer"),
        ({"steps": 1, "checkpointing": "some"}, "--checkpointing"),
    ],
)
def test_impossible_options_are_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        preset("ledger-r1", **changes)
    with pytest.raises(UserError, match="article"):
        preset("nonsense")


def test_a_cpu_without_fast_bfloat16_trains_in_float32_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    said: list[str] = []
    options = replace(TINY, autocast=True, steps=1)
    train(options, tmp_path / "model", tmp_path / "checkpoints", tmp_path / "runs", say=said.append)
    assert any("training in float32" in line for line in said)
