"""One decoder layer: its matrices stage by stage, each on inputs that the stages before have changed already."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from labkit.errors import UserError
from labkit.models.decoder import Layer
from labkit.models.weights import Place
from labkit.quantizer.gptq import Quantized, quantize_matrix
from labkit.quantizer.grid import Grid
from labkit.quantizer.packing import tensors_of, weight_of
from labkit.quantizer.stream import Stream
from labkit.quantizer.watch import HESSIAN_BYTES, Matrix, stages, watching


@dataclass(frozen=True)
class Method:
    """How matrices are quantised."""

    grid: Grid
    damping: float
    hessian_bytes: int = HESSIAN_BYTES


def quantize_layer(
    index: int,
    layer: Layer,
    stream: Stream,
    places: dict[str, Place],
    method: Method,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Quantises a layer in place and takes the stream through it.

    places: the tensors of the checkpoint that are to be quantised. ``progress`` is told how much of the layer is done,
    0 to 1. Returns the tensors that take their place, and a line of the report for each matrix. Raises UserError where
    GPTQ does worse than rounding, which means that the calibration text or the weights are not what they should be.
    """
    found: dict[str, Tensor] = {}
    lines = []
    order = stages(layer, method.hessian_bytes)
    work = _Work(layer, order, len(stream), progress)
    for number, stage in enumerate(order):
        half = stage[0].half
        began = time.perf_counter()
        with watching(layer, stage) as hessians:
            stream.look(layer, half, work.looked)
        looking_s = (time.perf_counter() - began) / len(stage)
        for matrix in stage:
            began = time.perf_counter()
            hessian = hessians.pop(matrix)
            weight = matrix.weight(layer)
            quantized = quantize_matrix(weight, hessian.mean(), method.grid, method.damping)
            line = _line(index, matrix, quantized, hessian.tokens)
            _check(line, quantized)
            weight.copy_(quantized.weight(weight.dtype))
            for name, place in _in_matrix(index, matrix, places).items():
                rows = slice(place.first, place.first + place.shape[0])
                found |= tensors_of(name.removesuffix(".weight"), quantized, rows)
            work.quantized(weight)
            lines.append(line | {"seconds": round(looking_s + time.perf_counter() - began, 3)})
        if number + 1 == len(order) or order[number + 1][0].half != half:
            stream.advance(layer, half)
    progress(1.0)
    return found, lines


def put_back(index: int, layer: Layer, tensors: dict[str, Tensor], places: dict[str, Place], grid: Grid) -> None:
    """Gives a layer the weights that it had once it was quantised, from the tensors that were kept."""
    for stage in stages(layer):
        for matrix in stage:
            weight = matrix.weight(layer)
            for name, place in _in_matrix(index, matrix, places).items():
                part = weight_of(name.removesuffix(".weight"), tensors, grid, weight.device, weight.dtype)
                weight[place.first : place.first + len(part)] = part


def _in_matrix(index: int, matrix: Matrix, places: dict[str, Place]) -> dict[str, Place]:
    return {
        name: place
        for name, place in places.items()
        if place.parameter == f"layers.{index}.{matrix.parameter}" and place.expert == matrix.expert
    }


def _line(index: int, matrix: Matrix, quantized: Quantized, tokens: int) -> dict[str, Any]:
    inputs, outputs = quantized.levels.shape
    figures = {
        "rtn_error": quantized.rtn_error,
        "gptq_error": quantized.error,
        "clip_gain": quantized.clip_gain,
    }
    known = {name: None if math.isnan(value) else value for name, value in figures.items()}
    sizes = {"outputs": outputs, "inputs": inputs, "tokens": tokens}
    return {"layer": index, "matrix": matrix.name, **sizes, **known, "fallback": quantized.fallback}


def _check(line: dict[str, Any], quantized: Quantized) -> None:
    if quantized.worse:
        raise UserError(
            f"in layer {line['layer']}, {line['matrix']}, GPTQ does worse than rounding (error {quantized.error:.3g}, "
            f"rounding {quantized.rtn_error:.3g}); it saw {line['tokens']:,} tokens: give more text that is like what "
            "the model will be used for, or a larger --damping"
        )


class _Work:
    """How much of a layer is done, by the multiplications it takes, roughly."""

    def __init__(self, layer: Layer, order: list[list[Matrix]], passes: int, progress: Callable[[float], None]) -> None:
        sizes = [matrix.weight(layer).numel() for stage in order for matrix in stage]
        self._passing = sum(sizes) / max(1, passes * len(order))
        self._total = 2 * sum(sizes)
        self._done, self._progress = 0.0, progress

    def looked(self) -> None:
        self._add(self._passing)

    def quantized(self, weight: Tensor) -> None:
        self._add(weight.numel())

    def _add(self, size: float) -> None:
        self._done += size
        self._progress(min(1.0, self._done / self._total))
