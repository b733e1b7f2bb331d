from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from labkit.bench import training
from labkit.bench.rows import keeping, rows_of
from labkit.bench.run import bench as run_bench
from labkit.bench.training import SIZES, measure_training
from labkit.experiments.store import RunStore
from labkit.training import variants
from labkit.training.network import Shape
from labkit.training.variants import Size, groups

CPU = torch.device("cpu")
TINY = Size(Shape(hidden=16, layers=2, heads=2, kv_heads=1, intermediate=32), batch=2, micro=1, steps=1)


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.setitem(training.SIZES, "cpu", TINY)
    with keeping(RunStore(tmp_path), {}) as (found, _):
        yield found


def test_every_variant_is_measured_on_the_same_documents(book):
    said = []
    measure_training(CPU, book, said.append, repeat=2)
    assert said[0].startswith("training, not serving")
    rows = [row for row in book.rows if not row.note]
    speeds = {(row.workload, row.name): [] for row in rows}
    lasts = {}
    for row in rows:
        if "tokens/s" in row.figures:
            speeds[row.workload, row.name].append(row.figures["tokens/s"])
        else:
            lasts[row.workload, row.name] = row.figures
    assert len(speeds) >= 11 and all(len(each) == 2 and min(each) > 0 for each in speeds.values())
    losses = [figures["loss"] for figures in lasts.values()]
    # the way there differs, what is learnt does not, but for the weight of a document in its micro-batch
    assert max(losses) - min(losses) < 0.02 and min(losses) > 1
    kept, every, half = (
        lasts["training, not serving: activations", name]["peak GB"]
        for name in ("keeps all activations", "recomputes every layer", "recomputes every 2nd layer")
    )
    assert every < half < kept
    sums = "training, not serving: micro-batch x accumulation to 2"
    assert lasts[sums, "1 x 2"]["peak GB"] < lasts[sums, "2 x 1"]["peak GB"]
    assert [row.name for row in book.rows if row.workload == sums][0] == "1 x 2", "the one that all share comes first"


def test_only_what_is_asked_for_is_measured_and_kept(tmp_path, monkeypatch):
    from labkit.bench.engine import Options
    from labkit.deployment import Deployment

    monkeypatch.setitem(training.SIZES, "cpu", TINY)
    options = Options(workloads=("training",), deployment=Deployment(device="cpu"), repeat=1)
    run = run_bench(options, RunStore(tmp_path), lambda line: None, ["foreach"])
    assert {row.name for row in rows_of(run)} == {"foreach AdamW"}


def test_what_cannot_be_measured_says_why(book, monkeypatch):
    monkeypatch.setattr(variants, "has_bf16", lambda device: False)
    measure_training(CPU, book, lambda line: None, ["precision"], repeat=1)
    assert [row.note for row in book.rows if row.name == "bfloat16 autocast"] == ["cpu has no fast bfloat16"]

    def full(self, batches, rate):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr(variants.Stepper, "step", full)
    book.rows.clear()
    measure_training(CPU, book, lambda line: None, ["float32"], repeat=1)
    assert "does not fit the memory (CUDA out of memory" in book.rows[0].note and not book.rows[0].figures


def test_the_base_on_a_gpu_is_the_shipped_model_at_the_articles_global_batch():
    size = SIZES["cuda"]
    assert size.shape == Shape() and size.batch == 128
    found = groups(replace(size), "cuda")["micro-batch x accumulation to 128"]
    assert {"16 x 8", "32 x 4", "128 x 1", "4 x 32"} <= set(found)
