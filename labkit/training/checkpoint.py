"""Checkpoints of a training: one safetensors file each, whole or not there, the two newest kept."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from labkit.errors import UserError
from labkit.files import writing_atomic
from labkit.training.modeldir import save_tensors

_KEPT = 2


@dataclass
class Progress:
    """Where a training stands: what a resumed one needs besides weights and optimizer state.

    ``taken`` counts the batches of each bucket that entered a step; data continues after them. ``elapsed_s`` is the
    time spent training over all sittings, ``options`` the options it was started with.
    """

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    taken: dict[str, int] = field(default_factory=dict)
    run: str = ""
    options: dict[str, object] = field(default_factory=dict)


def save_checkpoint(directory: Path, network: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
    """Writes ``step-<n>.safetensors``: float32 weights, both moments of AdamW, the random state, progress as metadata.

    Raises OSError.
    """
    tensors = {f"model.{name}": value.detach() for name, value in network.named_parameters()}
    for name, value in network.named_parameters():
        for key, state in optimizer.state.get(value, {}).items():
            tensors[f"optimizer.{key}.{name}"] = state.detach()
    tensors["random.cpu"] = torch.get_rng_state()
    path = directory / f"step-{progress.step:08d}.safetensors"
    with writing_atomic(path) as beside:
        cpu = {name: value.to("cpu").contiguous() for name, value in tensors.items()}
        save_tensors(cpu, beside, {"progress": json.dumps(asdict(progress))})
    for old in sorted(directory.glob("step-*.safetensors"))[:-_KEPT]:
        old.unlink()
    return path


def newest_checkpoint(directory: Path) -> tuple[Path, Progress] | None:
    """The newest readable checkpoint and its progress, or None if there is none at all."""
    for path in sorted(directory.glob("step-*.safetensors"), reverse=True):
        try:
            with safe_open(path, framework="pt") as file:
                return path, Progress(**json.loads(file.metadata()["progress"]))
        except (SafetensorError, KeyError, TypeError, ValueError):
            continue
    return None


def load_checkpoint(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts weights, optimizer state and random state back, on the device of ``network``.

    Raises UserError if they do not fit.
    """
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if f"model.{name}" not in names or file.get_slice(f"model.{name}").get_shape() != list(parameter.shape):
                    raise UserError(f"{path} is of a model of another shape; give another --checkpoints directory")
                parameter.copy_(file.get_tensor(f"model.{name}"))
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{key}.{name}" in names]
                if keys:
                    state = {key: file.get_tensor(f"optimizer.{key}.{name}") for key in keys}
                    # only a fused optimizer counts its steps on the device
                    stays = () if optimizer.defaults.get("fused") else ("step",)
                    optimizer.state[parameter] = {
                        key: value if key in stays else value.to(parameter.device) for key, value in state.items()
                    }
        torch.set_rng_state(file.get_tensor("random.cpu"))
