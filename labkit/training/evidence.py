"""The evidence of a model, kept beside it: manifest and curve of its training, the account of its evaluation."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit.errors import UserError
from labkit.training.curve import read_curve

EVIDENCE = "training"


@dataclass(frozen=True)
class Evidence:
    """Manifest and curve of a model's training, the account of its evaluation, bytes of its weights."""

    manifest: dict[str, Any]
    curve: list[dict[str, object]]
    evaluation: dict[str, Any]
    weight_bytes: int


def read_evidence(model: Path) -> Evidence:
    """Reads what lies in ``model/training``. Raises UserError if something is missing or the training did not end."""
    directory = model / EVIDENCE
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        evaluation = json.loads((directory / "evaluation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory} holds no evidence of a training ({error}); give --run and --evaluation"
        ) from error
    if manifest.get("state") != "finished":
        raise UserError(f"{directory}/manifest.json is of a training that did not end; finish it with --resume")
    size = sum(file.stat().st_size for file in model.glob("model*.safetensors"))
    return Evidence(manifest, read_curve(directory), evaluation, size)


def take_evidence(model: Path, run: Path, evaluation: Path) -> None:
    """Copies manifest, curve and account into ``model/training``.

    ``run`` is a training's directory, or a run store, of which the newest finished training is taken. Raises UserError.
    """
    if not (run / "manifest.json").is_file():
        finished = [path.parent for path in run.glob("train-*/manifest.json") if _finished(path)]
        if not finished:
            raise UserError(f"{run} holds no training that ended; give --run the directory that `labkit train` named")
        run = max(finished)
    if not evaluation.is_file():
        raise UserError(f"{evaluation} is not there; `labkit evaluate {model} --result {evaluation}` writes it")
    (model / EVIDENCE).mkdir(parents=True, exist_ok=True)
    for source, name in ((run / "manifest.json", ""), (run / "curve.jsonl", ""), (evaluation, "evaluation.json")):
        shutil.copyfile(source, model / EVIDENCE / (name or source.name))


def _finished(manifest: Path) -> bool:
    return bool(json.loads(manifest.read_text(encoding="utf-8")).get("state") == "finished")
