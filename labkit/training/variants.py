"""Trainings that differ in one option each, and what that option changes: speed, memory, loss after as many tokens."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from labkit.probes.peak import peak_bytes
from labkit.training.documents import Batch, make_batch
from labkit.training.network import CHECKPOINTING, Network, Shape
from labkit.training.options import OPTIMIZERS, TrainOptions, has_bf16
from labkit.training.steps import Stepper
from labkit.training.tokenizer import piece_table, train_tokenizer

BUCKET = "short"
WARM_UP = 2
"""Steps before the first that is timed; they count for the loss."""
_RISE = 10
"""Steps over which the learning rate rises."""
OPTIMIZER_NAMES = {"fused": "fused AdamW", "foreach": "foreach AdamW", "loop": "AdamW, a parameter at a time"}
CHECKPOINTING_NAMES = {
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


@dataclass(frozen=True)
class Variant:
    """One way to train. ``note`` says why it cannot be measured here."""

    options: TrainOptions
    note: str = ""


def base_options(size: Size, device: str) -> TrainOptions:
    """What the variants of a size have in common: fused AdamW, every activation kept, bfloat16 where it is fast."""
    return TrainOptions(
        steps=1,
        shape=size.shape,
        device=device,
        autocast=has_bf16(device),
        micro_batch=size.micro,
        accumulate=size.batch // size.micro,
    )


def in_bfloat16(base: TrainOptions) -> Variant:
    """The same with autocast, where the device is fast with it."""
    slow = "" if has_bf16(base.device) else f"{base.device} has no fast bfloat16"
    return Variant(replace(base, autocast=True), slow)


def in_parts(base: TrainOptions, micro: int, batch: int) -> Variant:
    """The same batch, ``micro`` documents at a time."""
    return Variant(replace(base, micro_batch=micro, accumulate=batch // micro))


def groups(size: Size, device: str) -> dict[str, dict[str, Variant]]:
    """Variants by what they vary and by name; the first of each group is the same everywhere."""
    base = base_options(size, device)
    micros = [size.batch // 2**power for power in range(6) if size.batch % 2**power == 0]
    sums = {f"{micro} x {size.batch // micro}": in_parts(base, micro, size.batch) for micro in micros}
    found = {
        "optimizer": {OPTIMIZER_NAMES[name]: Variant(replace(base, optimizer=name)) for name in OPTIMIZERS},
        "activations": {
            CHECKPOINTING_NAMES[name]: Variant(replace(base, checkpointing=name)) for name in CHECKPOINTING
        },
        f"micro-batch x accumulation to {size.batch}": dict(
            sorted(sums.items(), key=lambda each: each[1].options != base)
        ),
        "precision": {
            "bfloat16 autocast": in_bfloat16(base),
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


def documents(size: Size, steps: int, seed: int = 1) -> list[Batch]:
    """The batches of the first ``steps`` steps, the same for every variant; seed 1 is what the lab's models learnt."""
    table = piece_table(train_tokenizer())
    return [make_batch(table, seed, BUCKET, counter, size.batch) for counter in range(steps)]


class VariantRun:
    """One variant's training, which goes on by so many steps when told to. A variant that fails does nothing more."""

    def __init__(
        self,
        options: TrainOptions,
        documents: Sequence[Batch],
        device: torch.device,
        say: Callable[[str], None],
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Takes the warm-up steps, of which the last is measured for memory. ``start``: weights to begin with, in place
        of random ones."""
        self.speeds: list[float] = []
        self._losses: list[Tensor] = []
        self.peak = self.state = 0
        self.failure = ""
        self._steps = 1
        self._options, self._documents, self._device = options, documents, device
        try:
            network = Network(options.shape, options.seed)
            if start is not None:
                network.load_state_dict(start)
            self._stepper = Stepper(network.to(device), options)
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

    def losses(self) -> list[float]:
        """Of every step so far, in nats a token."""
        return torch.stack(self._losses).tolist() if self._losses else []

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
        loss, _ = self._stepper.step(parts, self._options.lr * min(1.0, (number + 1) / _RISE))
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
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
