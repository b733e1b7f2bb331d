"""`labkit train` and `labkit evaluate` as a user meets them: processes of their own, lines and exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from labkit.cli import app, main
from labkit.training.checkpoint import newest_checkpoint
from labkit.training.modeldir import read_model

MODEL = Path(__file__).resolve().parents[2] / "data" / "models" / "ledger-r1"
TRAIN = ["train", "--preset", "article", "--micro-batch", "1", "--accumulate", "1", "--device", "cpu"]
TRAIN += ["--checkpoint-every-steps", "1", "--processes", "0"]


def labkit(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "labkit.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(MODEL.parents[2])}
    return subprocess.Popen(
        command, cwd=directory, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_training_killed_outright_goes_on_with_resume_and_not_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = labkit(tmp_path, *TRAIN, "--steps", "50")
    checkpoints = tmp_path / "build" / "ledger-r1-checkpoints"
    while not checkpoints.is_dir() or (found := newest_checkpoint(checkpoints)) is None:
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    found = newest_checkpoint(checkpoints)
    assert found is not None and not (tmp_path / "build" / "ledger-r1").exists()
    reached = found[1].step
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["labkit", *TRAIN, "--steps", "50"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and f"holds a training at step {reached}; add --resume" in capsys.readouterr().err
    second = labkit(tmp_path, *TRAIN, "--steps", str(reached + 1), "--resume")
    said, errors = second.communicate()
    assert second.returncode == 0, errors
    assert f"at step {reached}" in said and f"model after {reached + 1} steps" in said
    read_model(tmp_path / "build" / "ledger-r1")
    states = [json.loads(file.read_text())["state"] for file in (tmp_path / "runs").glob("*/manifest.json")]
    assert sorted(states) == ["finished", "unfinished"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train"], "--steps or --max-seconds"),
        (["train", "--preset", "huge", "--steps", "1"], "no preset 'huge'; there are ledger-r1, article"),
        (["train", "--device", "cuda", "--steps", "1"], "no CUDA device"),
        (["train", "--device", "gpu", "--steps", "1"], "no device 'gpu'"),
        (["train", "--steps", "1", "--lr", "7"], "--lr"),
        (["distill", str(MODEL), "--steps", "1", "--copy-layers", "a"], "--copy-layers"),
        (["distill", str(MODEL), "--steps", "1", "--preset", "huge"], "no preset 'huge'; there are ledger-r1-mini"),
        (["distill", "nowhere", "--steps", "1", "--device", "cpu"], "no config.json"),
        (["evaluate", "./nowhere"], "no model directory"),
        (["evaluate", str(MODEL), "--buckets", "short,huge"], "no bucket 'huge'"),
        (["evaluate", str(MODEL), "--problems", "0"], "--problems"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_1(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["labkit", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.count("\n") == 1 and said.startswith("labkit: ") and named in said
    assert not list(tmp_path.iterdir())


def test_evaluate_prints_a_table_and_writes_its_account(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    ran = CliRunner().invoke(
        app,
        ["evaluate", str(MODEL), "--problems", "4", "--buckets", "short", "--device", "cpu", "--result", str(result)],
    )
    assert ran.exit_code == 0, ran.output
    last = [line for line in ran.output.splitlines() if line.startswith("all")]
    share = json.loads(result.read_text())["buckets"]["short"]
    assert share["asked"] == 4 and re.match(rf"all +{share['right']}/4 ", last[0])
