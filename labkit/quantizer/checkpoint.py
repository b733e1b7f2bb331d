"""The quantised model on disk, written a layer at a time, so that a quantisation that was killed goes on where it was.

Until it is whole the model lies in ``OUT.partial``: a shard for each finished layer, the report of each beside it, and
``state.json``, which says what is being done. At the end that directory becomes ``OUT``, with nothing in it that is not
the model's.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from labkit.errors import UserError
from labkit.files import write_atomic, writing_atomic
from labkit.models.tensors import read_json
from labkit.quantizer.grid import Grid
from labkit.training.modeldir import save_tensors

ONE_FILE = 4 * 2**30
"""Up to this many bytes the weights are one file."""
SPARE = 1.05
"""Room on the disk, over what the weights take: for what else there is, and for what differs from the estimate."""
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model")
_NOT_COPIED = ("config.json", "quantize_config.json")
_OTHER = {"model": "with another model", "calibration": "with another calibration text"}
_STATE, _REPORT = "state.json", "layer-{:04d}.json"


@dataclass(frozen=True)
class Workplace:
    """``OUT.partial``, while the quantisation goes on."""

    out: Path
    layers: int

    @property
    def path(self) -> Path:
        return self.out.with_name(self.out.name + ".partial")

    def begin(self, state: dict[str, Any]) -> None:
        """Notes what is done here, or makes sure that it is the same as what was begun. Raises UserError if not."""
        if self.out.exists():
            raise UserError(f"{self.out} exists already; give another directory, or remove it")
        if not (self.path / _STATE).exists():
            self.path.mkdir(parents=True, exist_ok=True)
            if any(self.path.iterdir()):
                raise UserError(f"{self.path} is in the way and holds nothing to go on from; remove it")
            write_atomic(self.path / _STATE, json.dumps(state, indent=2) + "\n")
            return
        begun = read_json(self.path / _STATE)
        if changed := [key for key in state if begun.get(key) != state[key]]:
            was = ", ".join(_OTHER.get(key) or f"{key.replace('_', ' ')} was {begun.get(key)}" for key in changed)
            raise UserError(
                f"{self.path} was begun otherwise ({was}); give the same options to go on, or remove it to begin anew"
            )

    def check_room(self, wanted: int) -> None:
        """Raises UserError where the disk has not ``wanted`` bytes and a little more, less what is written already."""
        there = next(parent for parent in self.path.absolute().parents if parent.exists())
        free = shutil.disk_usage(there).free + sum(file.stat().st_size for file in self.path.glob("*.safetensors"))
        # the parts and the one file that they become are there together for a moment
        wanted = int(SPARE * wanted * (2 if wanted <= ONE_FILE else 1))
        if wanted > free:
            raise UserError(
                f"{there} has {free / 2**30:.1f} GiB free, the quantised model takes {wanted / 2**30:.1f} GiB; "
                "make room, or give a directory on another disk"
            )

    def finished(self) -> int:
        """Layers that are done: the first so many."""
        return next(i for i in range(self.layers + 1) if not (self.path / _REPORT.format(i)).exists())

    def layer(self, index: int) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Tensors and report of a finished layer. Raises UserError if they cannot be read."""
        try:
            report = json.loads((self.path / _REPORT.format(index)).read_text(encoding="utf-8"))
            return load_file(self.path / self._shard(index)), report
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{self.path} is damaged ({error}); remove it to begin anew") from error

    def reports(self) -> list[dict[str, Any]]:
        """Of all finished layers, a line for each matrix."""
        files = [self.path / _REPORT.format(index) for index in range(self.finished())]
        return [line for file in files for line in json.loads(file.read_text(encoding="utf-8"))]

    def keep_layer(self, index: int, tensors: dict[str, Tensor], report: list[dict[str, Any]]) -> None:
        """Writes a finished layer, its report last. Raises OSError."""
        _write(tensors, self.path / self._shard(index))
        write_atomic(self.path / _REPORT.format(index), json.dumps(report) + "\n")

    def finish(self, rest: dict[str, Tensor], model: Path, quantization: dict[str, Any], files: dict[str, str]) -> None:
        """Adds ``rest``, the tensors outside of the layers, the configuration of ``model`` with that of the
        quantisation, its tokenizer and the like, and ``files`` by name; then all of it becomes ``out`` at once.

        Raises OSError."""
        _write(rest, self.path / self._shard(self.layers))
        self._index()
        for name in (file.name for pattern in _COPIED for file in sorted(model.glob(pattern))):
            if name not in _NOT_COPIED and not name.endswith(".index.json"):
                with writing_atomic(self.path / name) as beside:
                    shutil.copyfile(model / name, beside)
        config = model_config(model) | {"quantization_config": quantization}
        files = files | {"quantize_config.json": _json(quantization), "config.json": _json(config)}
        for name, text in files.items():
            write_atomic(self.path / name, text)
        # Without its state this directory is not taken for one that can go on.
        for file in (self.path / _STATE, *self.path.glob("layer-*.json"), *self.path.glob(".*.partial")):
            file.unlink()
        os.replace(self.path, self.out)

    def _shard(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{self.layers + 1:05d}.safetensors"

    def _index(self) -> None:
        """Makes one file of the shards, or their index if that would be large."""
        shards = [self.path / self._shard(index) for index in range(self.layers + 1)]
        whole = self.path / "model.safetensors"
        if not whole.exists() and sum(shard.stat().st_size for shard in shards) > ONE_FILE:
            homes: dict[str, str] = {}
            total = 0
            for shard in shards:
                sizes = _sizes(shard)
                homes |= dict.fromkeys(sizes, shard.name)
                total += sum(sizes.values())
            index = {"metadata": {"total_size": total}, "weight_map": homes}
            write_atomic(self.path / "model.safetensors.index.json", _json(index))
            return
        if not whole.exists():  # it does where this was killed before all shards were gone
            _write({name: value for shard in shards for name, value in load_file(shard).items()}, whole)
        for shard in shards:
            shard.unlink(missing_ok=True)


def quantize_config(grid: Grid, damping: float) -> dict[str, Any]:
    """What readers are told, in quantize_config.json and in config.json."""
    return {
        "quant_method": "gptq",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "desc_act": False,
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
        "damp_percent": damping,
        "lm_head": False,
        "checkpoint_format": "gptq",
    }


def model_config(model: Path) -> dict[str, Any]:
    """The model's config.json, with the rotary embedding as old readers and as new ones look for it.

    A reader of another age would otherwise take a base of 10000, or no scaling, without a word.
    """
    from transformers import AutoConfig

    raw = read_json(model / "config.json")
    rope = dict(AutoConfig.from_pretrained(model).rope_parameters)
    found = raw | {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        found["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return found


def _json(facts: dict[str, Any]) -> str:
    return json.dumps(facts, indent=2) + "\n"


def _sizes(file: Path) -> dict[str, int]:
    """Bytes of each tensor of a safetensors file, from its header."""
    with open(file, "rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    ends = {name: facts["data_offsets"] for name, facts in header.items() if name != "__metadata__"}
    return {name: last - first for name, (first, last) in ends.items()}


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    with writing_atomic(path) as beside:
        save_tensors(tensors, beside, {"format": "pt"})
