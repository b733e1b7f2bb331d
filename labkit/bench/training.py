"""What the options of a training change: its speed, its memory, loss after as many tokens; nothing about serving."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from labkit.bench.peers import free
from labkit.bench.rows import Book, Row
from labkit.training.network import Shape
from labkit.training.options import TrainOptions
from labkit.training.variants import WARM_UP, Size, Variant, VariantRun, documents, groups

PLAINLY = "training, not serving: these options change how fast a model is trained, not how fast it answers"
SIZES = {
    # the model that the lab ships, at the article's global batch
    "cuda": Size(Shape(), batch=128, micro=32, steps=10),
    "cpu": Size(Shape(hidden=64, layers=4, heads=2, kv_heads=1, intermediate=128), batch=4, micro=2, steps=1),
}


def measure_training(
    device: torch.device, book: Book, say: Callable[[str], None], only: Sequence[str] = (), repeat: int = 3
) -> None:
    """Adds rows: tokens/s of every variant, ``repeat`` times, the variants in turn, all from the same weights on the
    same documents; then its peak memory and its loss after them. ``only``: variants whose name holds one of the words.
    """
    say(PLAINLY)
    size = SIZES[device.type]
    named = {
        (f"training, not serving: {group}", name): variant
        for group, variants in groups(size, device.type).items()
        for name, variant in variants.items()
        if not only or any(word in f"training: {group}, {name}" for word in only)
    }
    batches = documents(size, WARM_UP + repeat * size.steps)
    runs: dict[TrainOptions, VariantRun] = {}
    for (workload, name), variant in named.items():
        if not variant.note and variant.options not in runs:
            began = time.monotonic()
            runs[variant.options] = VariantRun(variant.options, batches, device, say)
            say(f"{workload}, {name}: ready after {time.monotonic() - began:.1f} s")
    # To and fro, so that a machine that grows hot and slow does so for all alike.
    for turn in range(repeat):
        for run in list(runs.values())[:: -1 if turn % 2 else 1]:
            run.go_on(size.steps)
    for (workload, name), variant in named.items():
        for row in _rows(workload, name, variant, runs.get(variant.options)):
            book.add(row)
    runs.clear()
    free()


def _rows(workload: str, name: str, variant: Variant, run: VariantRun | None) -> Iterator[Row]:
    """``run`` is None of a variant that has a note."""
    if run is None or run.failure:
        yield Row(workload, name, note=variant.note if run is None else run.failure)
        return
    for turn, speed in enumerate(run.speeds):
        yield Row(workload, name, {"tokens/s": speed}, repeat=turn)
    yield Row(workload, name, {"peak GB": run.peak / 1e9, "state GB": run.state / 1e9, "loss": run.loss()})
