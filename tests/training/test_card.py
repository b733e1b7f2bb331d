from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from huggingface_hub import ModelCard

from labkit.training.card import card_text, main
from labkit.training.curve import read_curve
from labkit.training.evidence import read_evidence
from labkit.training.figure import training_figure

MODEL = Path(__file__).resolve().parents[2] / "data" / "models" / "ledger-r1"
EVALUATION = json.loads((MODEL / "training" / "evaluation.json").read_text())
MANIFEST = json.loads((MODEL / "training" / "manifest.json").read_text())


def test_the_committed_card_and_figure_are_what_the_evidence_makes() -> None:
    assert (MODEL / "README.md").read_text() == card_text("ledger-r1", read_evidence(MODEL))
    assert (MODEL / "training" / "curve.svg").read_text() == training_figure(read_curve(MODEL / "training"))


@pytest.mark.parametrize(("bucket", "least"), [("short", 0.95), ("medium", 0.92), ("long", 0.85)])
def test_the_evidence_shows_the_exact_match_that_is_asked_for(bucket: str, least: float) -> None:
    share = EVALUATION["buckets"][bucket]
    assert share["asked"] == 1000 and share["low"] >= least
    families = EVALUATION["families"][bucket].values()
    assert sum(family["asked"] for family in families) == 1000
    assert sum(family["right"] for family in families) == share["right"]


def test_the_hub_reads_the_front_matter() -> None:
    card = ModelCard.load(MODEL / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    values = {result.dataset_type: result.metric_value for result in card.data.eval_results}
    assert values == {f"ledger-{bucket}": share["share"] for bucket, share in EVALUATION["buckets"].items()}


def test_the_card_names_figures_mistakes_and_no_place_of_the_machine_that_trained() -> None:
    text = (MODEL / "README.md").read_text()
    for figure in (f"{MANIFEST['steps']:,}", "747.7 million", "NVIDIA H200", "0.0015", "97.4 % (96.2 to 98.2)"):
        assert figure in text, figure
    assert len(EVALUATION["wrong"]) == 3000 - sum(share["right"] for share in EVALUATION["buckets"].values())
    evidence = "".join(file.read_text() for file in (MODEL / "training").glob("*.json*"))
    assert not re.search(r"/tmp|/root|/home|/work|/workspace", text + evidence)


def test_the_figure_is_well_formed_and_inside_its_frame() -> None:
    root = ElementTree.fromstring((MODEL / "training" / "curve.svg").read_text())
    width, height = (float(value) for value in root.attrib["viewBox"].split()[2:])
    lines = [each.attrib["points"] for each in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert len(lines) == 4
    for line in lines:
        for point in line.split():
            x, y = (float(value) for value in point.split(","))
            assert 0 < x < width and 0 < y < height
    loss = [float(point.split(",")[1]) for point in lines[0].split()]
    assert loss[-1] > loss[0] + 100, "the loss falls, so the line goes down"


def test_evidence_is_taken_from_the_newest_training_that_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, runs, evaluation = tmp_path / "mine", tmp_path / "runs", tmp_path / "evaluation.json"
    shutil.copytree(MODEL, model, ignore=shutil.ignore_patterns("training", "README.md"))
    for name, state in (("train-1", "finished"), ("train-2", "finished"), ("train-3", "unfinished")):
        (runs / name).mkdir(parents=True)
        manifest = {**MANIFEST, "state": state, "steps": int(name[-1])}
        (runs / name / "manifest.json").write_text(json.dumps(manifest))
        shutil.copyfile(MODEL / "training" / "curve.jsonl", runs / name / "curve.jsonl")
    arguments = [str(model), "--run", str(runs), "--evaluation", str(evaluation)]
    assert main([str(model)]) == 1 and "--evaluation" in capsys.readouterr().err
    assert main(arguments[:3]) == 1 and "both" in capsys.readouterr().err
    assert main(arguments) == 1 and "labkit evaluate" in capsys.readouterr().err
    evaluation.write_text(json.dumps(EVALUATION))
    assert main(arguments) == 0
    card = (model / "README.md").read_text()
    assert card.startswith("---\nlicense") and "# mine" in card and "| steps | 2 |" in card
    assert main([*arguments[:2], str(runs / "train-3"), *arguments[3:]]) == 1
    assert "did not end" in capsys.readouterr().err
