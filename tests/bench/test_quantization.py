"""The bench of quantizers with a beginner of a ledger model; tests/peers/test_gptq.py has gptqmodel beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from labkit.bench import gptqmodel
from labkit.bench.quantization import BUCKET, measure_quantization
from labkit.bench.rows import Row, keeping
from labkit.errors import UserError
from labkit.evaluation.evaluate import Wishes, evaluate
from labkit.experiments.store import RunStore
from labkit.training.modeldir import write_model
from labkit.training.network import Network, Shape
from labkit.training.tokenizer import train_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("models") / "beginner"
    shape = Shape(hidden=128, layers=1, heads=2, kv_heads=1, intermediate=128)
    write_model(Network(shape), train_tokenizer(), directory)
    return str(directory)


def rows(model: str, folder: Path) -> dict[str, Row]:
    with keeping(RunStore(folder), {}) as (book, _):
        measure_quantization(model, CPU, book, lambda line: None, problems=2, sequences=1)
        return {row.name: row for row in book.rows}


def test_what_quantising_takes_and_loses_is_told_and_how_to_install_the_peer(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptqmodel, "ENVIRONMENT", tmp_path)
    found = rows(model, tmp_path / "runs")
    assert list(found) == ["labkit", "gptqmodel", "not quantised"]
    assert found["gptqmodel"].figures == {} and "run: make peer-gptqmodel" in found["gptqmodel"].note
    exact = evaluate(model, Wishes(2, (BUCKET,)), say=lambda line: None)
    loss = exact["completions"][BUCKET]["loss"]
    assert found["not quantised"].figures["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["not quantised"].figures["right, %"] == 100 * exact["buckets"][BUCKET]["share"]
    figures = found["labkit"].figures
    assert figures["s"] > 0 and 0 < figures["KL, nats"] < 0.1 and figures["same first choice, %"] > 50
    assert figures["loss"] == pytest.approx(loss, rel=0.05)


def test_a_model_of_other_tokens_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is none"):
        rows(str(tiny_model), tmp_path)
