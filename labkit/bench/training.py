"""What the options of a training change: its speed, its memory, loss after as many tokens; nothing about serving."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from labkit.bench.peak import peak_bytes
from labkit.bench.peers import free
from labkit.bench.rows import Book, Row
from labkit.training.documents import Batch, make_batch
from labkit.training.network import CHECKPOINTING, Network, Shape
from labkit.training.options import OPTIMIZERS, TrainOptions, has_bf16
from labkit.training.steps import Stepper
from labkit.training.tokenizer import piece_table, train_tokenizer

PLAINLY = "training, not serving: these options change how fast a model is trained, not how fast it answers"
BUCKET = "short"
WARM_UP = 2
"""Steps before the first that is timed; they count for the loss."""
_RATE, _RISE = 1.5e-3, 10
_OPTIMIZER_NAMES = {"fused": "fused AdamW", "foreach": "foreach AdamW", "loop": "AdamW, a parameter at a time"}
_CHECKPOINTING_NAMES = {
    "none": "keeps all activations",
    "all": "recomputes every layer",
    "half": "recomputes every 2nd layer",
    "attention": "recomputes attention",
    "mlp": "recomputes feed-forwards",
}


@dataclass(frozen=True)
class Size:
    """How much is trained: ``batch`` documents of BUCKET a step, ``micro`` at a time; ``steps`` are timed at once."""

    shape: Shape
    batch: int
    micro: int
    steps: int


SIZES = {
    # the model that the lab ships, at the article's global batch
    "cuda": Size(Shape(), batch=128, micro=32, steps=10),
    "cpu": Size(Shape(hidden=64, layers=4, heads=2, kv_heads=1, intermediate=128), batch=4, micro=2, steps=1),
}


@dataclass(frozen=True)
class Variant:
    """One way to train. ``note`` says why it cannot be measured here."""

    options: TrainOptions
    note: str = ""


def groups(size: Size, device: str) -> dict[str, dict[str, Variant]]:
    """Variants by what they vary and by name; the first of each group is the same everywhere."""
    base = TrainOptions(
        steps=1,
        shape=size.shape,
        device=device,
        autocast=has_bf16(device),
        micro_batch=size.micro,
        accumulate=size.batch // size.micro,
    )
    slow = "" if has_bf16(device) else f"{device} has no fast bfloat16"
    micros = [size.batch // 2**power for power in range(6) if size.batch % 2**power == 0]
    sums = {f"{micro} x {size.batch // micro}": _with(base, micro, size.batch // micro) for micro in micros}
    found = {
        "optimizer": {_OPTIMIZER_NAMES[name]: Variant(replace(base, optimizer=name)) for name in OPTIMIZERS},
        "activations": {
            _CHECKPOINTING_NAMES[name]: Variant(replace(base, checkpointing=name)) for name in CHECKPOINTING
        },
        f"micro-batch x accumulation to {size.batch}": dict(
            sorted(sums.items(), key=lambda each: each[1].options != base)
        ),
        "precision": {
            "bfloat16 autocast": Variant(replace(base, autocast=True), slow),
            "float32": Variant(replace(base, autocast=False)),
        },
    }
    if device == "cuda":
        found["torch.compile"] = {
            "eager": Variant(base),
            "compiled": Variant(replace(base, compile=True)),
            "compiled, recomputes every layer": Variant(replace(base, compile=True, checkpointing="all")),
        }
    return found


def _with(base: TrainOptions, micro: int, accumulate: int) -> Variant:
    return Variant(replace(base, micro_batch=micro, accumulate=accumulate))


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
    documents = _documents(size, WARM_UP + repeat * size.steps)
    runs: dict[TrainOptions, _Run] = {}
    for (workload, name), variant in named.items():
        if not variant.note and variant.options not in runs:
            began = time.monotonic()
            runs[variant.options] = _Run(variant.options, documents, device, say)
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


def _rows(workload: str, name: str, variant: Variant, run: _Run | None) -> Iterator[Row]:
    """``run`` is None of a variant that has a note."""
    if run is None or run.failure:
        yield Row(workload, name, note=variant.note if run is None else run.failure)
        return
    for turn, speed in enumerate(run.speeds):
        yield Row(workload, name, {"tokens/s": speed}, repeat=turn)
    yield Row(workload, name, {"peak GB": run.peak / 1e9, "state GB": run.state / 1e9, "loss": run.loss()})


def _documents(size: Size, steps: int) -> list[Batch]:
    table = piece_table(train_tokenizer())
    return [make_batch(table, 1, BUCKET, counter, size.batch) for counter in range(steps)]


class _Run:
    """One variant's training, which goes on by so many steps when told to. A variant that fails does nothing more."""

    def __init__(
        self, options: TrainOptions, documents: Sequence[Batch], device: torch.device, say: Callable[[str], None]
    ) -> None:
        """Takes the warm-up steps, of which the last is measured for memory."""
        self.speeds: list[float] = []
        self._losses: list[Tensor] = []
        self.peak = self.state = 0
        self.failure = ""
        self._steps = 1
        self._options, self._documents, self._device = options, documents, device
        try:
            self._stepper = Stepper(Network(options.shape, options.seed).to(device), options)
            if options.compile:
                self._stepper.compile(say, (BUCKET,))
            for _ in range(WARM_UP - 1):
                self._step()
            held = list(self._held())
            self.state = sum(tensor.nbytes for tensor in held)
            self.peak = self.state + peak_bytes(self._step, held, device)
        except torch.OutOfMemoryError as error:
            self._fail(error)

    def go_on(self, steps: int) -> None:
        """Takes ``steps`` steps and notes how fast they were."""
        if self.failure:
            return
        try:
            self._steps = steps
            self._wait()
            began = time.perf_counter()
            tokens = sum(self._step() for _ in range(steps))
            self._wait()
            self.speeds.append(tokens / (time.perf_counter() - began))
        except torch.OutOfMemoryError as error:
            self._fail(error)

    def loss(self) -> float:
        """Mean of the last steps that were timed at once, in nats a token."""
        return float(torch.stack(self._losses[-self._steps :]).mean())

    def _step(self) -> int:
        """One step; returns its tokens. The loss is kept where it is, so that nobody waits for it."""
        number = len(self._losses)
        batch, micro = self._documents[number], self._options.micro_batch or 1
        parts = [
            Batch(batch.bucket, number, batch.ids[start : start + micro], batch.weights[start : start + micro])
            for start in range(0, len(batch.ids), micro)
        ]
        loss, _ = self._stepper.step(parts, _RATE * min(1.0, (number + 1) / _RISE))
        self._losses.append(loss)
        return int(batch.ids.size)

    def _held(self) -> Iterator[Tensor]:
        """Weights, moments and tables; gradients are let go after each step."""
        network, optimizer = self._stepper.network, self._stepper.optimizer
        moments = (value for state in optimizer.state.values() for value in state.values())
        return (each for each in chain(network.parameters(), network.buffers(), moments) if isinstance(each, Tensor))

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _fail(self, error: Exception) -> None:
        self.failure = f"does not fit the memory ({str(error).splitlines()[0][:80]})"
        self.__dict__.pop("_stepper", None)
        free()
