"""The model that is quantised: its tensors a layer at a time, from a checkpoint or made up."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from labkit.errors import UserError
from labkit.models.decoder import Layer
from labkit.models.loading import ALONE, Checkpoint, empty_layer, open_checkpoint, read_weights, resolve_model
from labkit.models.tensors import TensorFiles, read_json, weight_files
from labkit.models.weights import ALL, Place, checkpoint_places, random_tensors
from labkit.quantizer.grid import Grid
from labkit.quantizer.packing import size_bytes
from labkit.quantizer.watch import stages

MADE_UP = torch.bfloat16
"""The dtype of weights that are made up."""


@dataclass(frozen=True)
class Source:
    """A checkpoint of 16 or 32 bits, or a shape alone, whose weights are made up, the same every time."""

    checkpoint: Checkpoint
    device: torch.device
    random_weights: bool = False

    @cached_property
    def places(self) -> dict[str, Place]:
        """Of every tensor of the checkpoint."""
        return checkpoint_places(self.checkpoint.shape, ALONE)

    def of_layer(self, index: int) -> dict[str, Place]:
        """Those of one layer."""
        return {name: place for name, place in self.places.items() if place.parameter.startswith(f"layers.{index}.")}

    def outside(self) -> dict[str, Place]:
        """Those of no layer: embedding, last norm, output head."""
        return {name: place for name, place in self.places.items() if not place.parameter.startswith("layers.")}

    def layer(self, index: int, dtype: torch.dtype) -> Layer:
        """A layer with its weights. Raises UserError as ``read_weights``."""
        layer = empty_layer(self.checkpoint.shape, index, self.device, dtype)
        named = [*layer.named_parameters(), *layer.named_buffers()]
        self._fill({f"layers.{index}.{name}": tensor for name, tensor in named}, self.of_layer(index))
        return layer

    def embedding(self, dtype: torch.dtype) -> Tensor:
        """[vocab, hidden]."""
        places = {name: place for name, place in self.places.items() if place.parameter == "embed"}
        target = torch.empty(next(iter(places.values())).shape, device=self.device, dtype=dtype)
        self._fill({"embed": target}, places)
        return target

    def as_stored(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors as the checkpoint holds them, in its dtype, on the CPU."""
        if self.random_weights:
            made = random_tensors({name: self.places[name] for name in names}, self.device, MADE_UP)
            yield from ((name, tensor.cpu()) for name, tensor in made)
            return
        with TensorFiles(self.checkpoint.path) as files:
            for name in names:
                yield name, files.part(name, (ALL,) * len(self.places[name].shape))

    def rest(self) -> dict[str, Tensor]:
        """The tensors of no layer, as ``as_stored``. A tied output head is written beside the embedding: of a file that
        holds one of the two, auto-gptq leaves both as what lies in memory, without a word."""
        found = dict(self.as_stored(self.outside()))
        if self.checkpoint.shape.tied:
            found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()
        return found

    def fingerprint(self) -> str:
        """Changes with the configuration and with the size or the time of a file of weights."""
        facts = [(self.checkpoint.path / "config.json").read_text(encoding="utf-8")]
        for file in [] if self.random_weights else weight_files(self.checkpoint.path):
            found = file.stat()
            facts.append(f"{file.name} {found.st_size} {found.st_mtime_ns}")
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    def quantized_names(self, index: int) -> list[str]:
        """The tensors of a layer whose place is a matrix that is to be quantised."""
        with torch.device("meta"):
            layer = Layer(self.checkpoint.shape, ALONE, index)
        wanted = {f"layers.{index}.{matrix.parameter}" for stage in stages(layer) for matrix in stage}
        return [name for name, place in self.of_layer(index).items() if place.parameter in wanted]

    def check(self, grid: Grid) -> int:
        """The bytes that the quantised model will take. Raises UserError for a matrix that the grid cannot hold, and
        for weights that are missing."""
        quantized = {name for index in range(self.checkpoint.shape.layers) for name in self.quantized_names(index)}
        total = 0
        for name in sorted(quantized):
            outputs, inputs = self.places[name].shape
            grid.check(name.removesuffix(".weight"), outputs, inputs)
            total += size_bytes(outputs, inputs, grid)
        rest = sum(torch.Size(place.shape).numel() for name, place in self.places.items() if name not in quantized)
        if self.checkpoint.shape.tied:  # see ``rest``
            rest += torch.Size(self.places["model.embed_tokens.weight"].shape).numel()
        return total + rest * self._itemsize()

    def _itemsize(self) -> int:
        """Bytes of a number that is not quantised, by a row of the embedding."""
        if self.random_weights:
            return MADE_UP.itemsize
        with TensorFiles(self.checkpoint.path) as files:
            if missing := [name for name in self.places if name not in files]:
                raise UserError(f"{self.checkpoint.path} lacks {len(missing)} tensors, such as {missing[0]}")
            return files.part("model.embed_tokens.weight", (slice(0, 1), ALL)).dtype.itemsize

    def _fill(self, targets: dict[str, Tensor], places: dict[str, Place]) -> None:
        if not self.random_weights:
            read_weights(self.checkpoint, targets, places)
            return
        for name, tensor in random_tensors(places, self.device, MADE_UP):
            place = places[name]
            target = targets[place.parameter].data
            target = target if place.expert is None else target[place.expert]
            target[place.first : place.first + len(tensor)].copy_(tensor)


def open_source(model: str, device: torch.device, random_weights: bool = False) -> Source:
    """device: where layers are to be. Raises UserError for a model that cannot be read, or is quantised already."""
    raw = read_json(resolve_model(model) / "config.json")
    if raw.get("quantization_config"):
        found = raw["quantization_config"]
        method = found.get("quant_method") if isinstance(found, dict) else None
        raise UserError(
            f"{model} is quantised already ({method or 'it has a quantization_config'}); give the model that it was "
            "made from"
        )
    return Source(open_checkpoint(model), device, random_weights)
