"""Everything that a training can be told, and the presets."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from labkit.errors import UserError
from labkit.training.network import CHECKPOINTING, Shape

SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("fused", "foreach", "loop")


@dataclass(frozen=True)
class DistillOptions:
    """How a student is taught.

    The loss of a token is ``soft`` times the forward divergence KL(teacher || student) at ``temperature``, times the
    square of it, plus ``hard`` times the cross-entropy of the right token. ``on_policy`` is the share of batches whose
    completions the student writes itself, to be told by the teacher what should have come next. ``hints`` weighs how
    far the states of the student's layers are from those of the teacher's, and falls to 0 until ``HINTED`` of the
    training is done. ``copy_layers`` are the layers of the teacher that the student's begin as: None spreads them from
    first to last, () begins from nothing. ``teacher`` is its name, ``digest`` that of its weights.
    """

    teacher: str = ""
    digest: str = ""
    temperature: float = 2.0
    soft: float = 0.5
    hard: float = 0.5
    on_policy: float = 0.0
    hints: float = 0.0
    copy_layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TrainOptions:
    """Options of ``train``.

    A training ends after ``steps`` optimizer steps or ``max_seconds`` (compiling included, over all sittings),
    whichever comes first; the schedule follows the fraction of the one that is nearer its end. ``micro_batch`` is in
    sequences; None takes ``batch_tokens`` divided by the sequence length. ``warm_up`` is in steps, times in seconds,
    ``final_lr`` a fraction of ``lr``. ``shares`` is how often each bucket (short, medium, long) is drawn at the start
    and after a quarter. ``checkpointing`` is which activations are worked out again in the backward pass instead of
    being kept, ``optimizer`` how AdamW is carried out; both leave what is learnt as it is.
    """

    steps: int | None = None
    max_seconds: float | None = None
    lr: float = 1.5e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.1
    warm_up: int = 200
    schedule: str = "cosine"
    final_lr: float = 0.01
    clip: float = 1.0
    batch_tokens: int = 73728
    micro_batch: int | None = None
    accumulate: int = 1
    first_shares: tuple[float, float, float] = (0.75, 0.2, 0.05)
    shares: tuple[float, float, float] = (0.36, 0.32, 0.32)
    seed: int = 1
    processes: int = 0
    device: str = "cpu"
    autocast: bool = True
    compile: bool = False
    optimizer: str = "fused"
    checkpointing: str = "none"
    checkpoint_every_s: float = 60.0
    checkpoint_every_steps: int | None = None
    probe_every_s: float = 75.0
    report_every_s: float = 10.0
    curve_every: int = 20
    shape: Shape = Shape()
    distill: DistillOptions | None = None

    def checked(self) -> TrainOptions:
        """Itself. Raises UserError naming the first option that cannot be."""
        _require(self.steps is not None or self.max_seconds is not None, "give --steps or --max-seconds, or both")
        _require(self.steps is None or self.steps >= 1, "--steps must be at least 1")
        _require(self.max_seconds is None or self.max_seconds > 0, "--max-seconds must be above 0")
        _require(0 < self.lr < 1, "--lr must lie between 0 and 1")
        _require(all(0 <= beta < 1 for beta in self.betas), "--betas must lie between 0 and 1")
        _require(self.eps > 0, "--eps must be above 0")
        _require(self.weight_decay >= 0, "--weight-decay must be 0 or more")
        _require(self.warm_up >= 0, "--warm-up must be 0 or more")
        _require(self.schedule in SCHEDULES, f"--schedule must be one of {', '.join(SCHEDULES)}")
        _require(self.clip > 0, "--clip must be above 0")
        _require(self.batch_tokens >= 1024, "--batch-tokens must be at least 1024")
        _require(self.micro_batch is None or self.micro_batch >= 1, "--micro-batch must be at least 1")
        _require(self.accumulate >= 1, "--accumulate must be at least 1")
        _require(self.processes >= 0, "--processes must be 0 or more")
        _require(self.checkpoint_every_s > 0, "--checkpoint-every must be above 0 seconds")
        _require(self.optimizer in OPTIMIZERS, f"--optimizer must be one of {', '.join(OPTIMIZERS)}")
        _require(self.checkpointing in CHECKPOINTING, f"--checkpointing must be one of {', '.join(CHECKPOINTING)}")
        _check_shape(self.shape)
        if self.distill is not None:
            _check_distill(self.distill, self.shape)
        return self


PRESETS = {
    # how the shipped model is trained
    "ledger-r1": TrainOptions(),
    # the fine-tuning recipe of the article that the lab follows; far too small a rate to learn the task from nothing
    "article": TrainOptions(lr=3e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, micro_batch=16, accumulate=8),
}


def preset(name: str, **changes: Any) -> TrainOptions:
    """The preset with ``changes``, those that are None aside. Raises UserError for a name that is none."""
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return replace(PRESETS[name], **{key: value for key, value in changes.items() if value is not None}).checked()


def check_room(directory: Path, needed: int) -> None:
    """Raises UserError if the disk that holds ``directory`` has fewer than ``needed`` bytes free."""
    existing = next(path for path in (directory, *directory.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{directory} has {free / 1e6:.0f} MB free and the training needs {needed / 1e6:.0f} MB; "
            "make room or name another directory"
        )


def pick_device(device: str) -> str:
    """``device``; for "auto" CUDA where there is some, else the CPU. Raises UserError as ``check_device``."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    return device


def check_device(device: str) -> None:
    """Raises UserError if torch cannot use ``device``."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"no device {device!r}; give cpu, cuda, cuda:1 and so on, or auto")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device that torch can use; give --device cpu, or use a GPU machine")
    if (number := int(device.partition(":")[2] or 0)) and number >= torch.cuda.device_count():
        raise UserError(f"no device {device!r}; this machine's last is cuda:{torch.cuda.device_count() - 1}")


def has_bf16(device: str) -> bool:
    """Whether ``device`` is fast with bf16 matrices. A CPU without AVX-512 takes ten times as long as in float32."""
    return device != "cpu" or torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "SVE"))


def _check_shape(shape: Shape) -> None:
    sizes = {
        "--layers": shape.layers,
        "--hidden": shape.hidden,
        "--heads": shape.heads,
        "--kv-heads": shape.kv_heads,
        "--intermediate": shape.intermediate,
    }
    for name, size in sizes.items():
        _require(size >= 1, f"{name} must be at least 1")
    _require(shape.hidden % (2 * shape.heads) == 0, "--hidden must be an even multiple of --heads")
    _require(shape.heads % shape.kv_heads == 0, "--heads must be a multiple of --kv-heads")


def _check_distill(distill: DistillOptions, shape: Shape) -> None:
    _require(distill.temperature > 0, "--temperature must be above 0")
    _require(min(distill.soft, distill.hard) >= 0, "--soft and --hard must be 0 or more")
    _require(distill.hints >= 0, "--hints must be 0 or more")
    _require(distill.soft + distill.hard > 0, "--soft and --hard cannot both be 0: nothing would be learnt")
    _require(0 <= distill.on_policy < 1, "--on-policy must be at least 0 and below 1")
    _require(distill.soft > 0 or not distill.on_policy, "--on-policy needs --soft: such tokens have no right answer")
    copied = distill.copy_layers
    _require(not copied or len(copied) == shape.layers, f"--copy-layers must name one layer for each of {shape.layers}")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)
