"""Optimizer steps on one device: forward and backward passes over the micro-batches of a step, clipping, AdamW."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from labkit.training.documents import LENGTHS, Batch
from labkit.training.ledger import BUCKETS
from labkit.training.network import Network
from labkit.training.objective import NextToken, Objective
from labkit.training.options import TrainOptions
from labkit.training.schedule import rows_of

_HOW = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False, "fused": False}}


def make_optimizer(network: Network, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW as ``options.optimizer`` says; matrices decay, the embedding, norms and biases do not."""
    decayed = [p for name, p in network.named_parameters() if p.dim() == 2 and "embed" not in name]
    kept = [p for name, p in network.named_parameters() if p.dim() != 2 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, **_HOW[options.optimizer])


class Stepper:
    """A network and its optimizer on ``options.device``, and how they take a step towards ``objective``."""

    def __init__(self, network: Network, options: TrainOptions, objective: Objective | None = None) -> None:
        self.network, self.options = network, options
        self.network.checkpointing = options.checkpointing
        self.optimizer = make_optimizer(network, options)
        self._objective = objective or NextToken(network)
        self._loss = self._objective.loss

    def step(self, batches: list[Batch], rate: float, done: float = 0.0) -> tuple[Tensor, Tensor]:
        """One optimizer step over ``batches``, with ``done`` of the training behind it; returns loss and gradient norm,
        float32 scalars on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.options.device)
        for batch in batches:
            ids, weights = self._move(batch)
            # apart: weights that autocast casts without gradients must not serve the loss
            with self.autocast():
                inputs = self._objective.inputs(ids, weights, f"{batch.bucket}/{batch.counter}", done)
            with self.autocast():
                loss = self._loss(*inputs) / len(batches)
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 autocast where asked for."""
        return torch.autocast(torch.device(self.options.device).type, torch.bfloat16, enabled=self.options.autocast)

    def compile(self, say: Callable[[str], None], buckets: Sequence[str] = BUCKETS) -> None:
        """Compiles for documents of ``buckets`` before the first step; if that fails, the training goes on without."""
        self._loss = torch.compile(self._objective.loss, dynamic=False)
        began = time.monotonic()
        try:
            for bucket in buckets:
                shape = (rows_of(self.options, bucket), LENGTHS[bucket])
                ids = torch.zeros(shape, dtype=torch.int64, device=self.options.device)
                weights = torch.ones(shape, dtype=torch.uint8, device=self.options.device)
                with self.autocast():
                    self._loss(*self._objective.inputs(ids, weights, None, 0.0)).backward()
                say(f"compiled for {bucket} documents {shape} after {time.monotonic() - began:.0f} s")
        except Exception as error:  # whatever the compiler raises, uncompiled steps still train
            say(f"torch.compile failed ({str(error).splitlines()[0][:200]}); training without it, slower")
            self._loss = self._objective.loss
        self.optimizer.zero_grad(set_to_none=True)

    def _move(self, batch: Batch) -> tuple[Tensor, Tensor]:
        ids, weights = torch.from_numpy(batch.ids), torch.from_numpy(batch.weights)
        if self.options.device.startswith("cuda"):
            ids, weights = ids.pin_memory(), weights.pin_memory()
        return ids.to(self.options.device, non_blocking=True).long(), weights.to(self.options.device, non_blocking=True)
