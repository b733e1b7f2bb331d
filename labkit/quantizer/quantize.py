"""Quantises a model: calibration text through one layer after the other, each of which is kept once it is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import labkit
from labkit.errors import UserError
from labkit.models.loading import load_tokenizer
from labkit.models.shape import ModelShape
from labkit.quantizer import calibration
from labkit.quantizer.calibration import LENGTH, SEQUENCES, SHORTEST
from labkit.quantizer.checkpoint import Workplace, quantize_config
from labkit.quantizer.gptq import DAMPING
from labkit.quantizer.grid import Grid
from labkit.quantizer.layers import Method, put_back, quantize_layer
from labkit.quantizer.progress import showing_progress
from labkit.quantizer.report import FIGURE, REPORT, Report, figure
from labkit.quantizer.source import Source, open_source
from labkit.quantizer.stream import HALVES, Stream
from labkit.training.curve import describe_machine
from labkit.training.options import check_device


@dataclass(frozen=True)
class Options:
    """What ``labkit quantize`` was asked for."""

    model: str
    out: Path
    bits: int = 4
    group_size: int = 128
    calibration: Path | None = None
    """None: problems of the ledger task, for a model that was trained on it."""
    sequences: int = SEQUENCES
    length: int | None = None
    """None: 2048 of a text, and all there is of ledger problems."""
    damping: float = DAMPING
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    random_weights: bool = False

    def check(self) -> None:
        """Raises UserError for what can be told without looking at the model."""
        check_device(self.device)
        if self.sequences < 1:
            raise UserError("--sequences must be at least 1")
        if self.length is not None and self.length < SHORTEST:
            raise UserError(f"--length must be at least {SHORTEST}")
        if not 0 < self.damping < 1:
            raise UserError("--damping must be between 0 and 1, such as 0.01")


def quantize(options: Options, say: Callable[[str], None] = print) -> Report:
    """Writes the quantised model to ``options.out``, or goes on with it where that was killed.

    Raises UserError, before any work, for a model or a text that cannot be used, for options that differ from those of
    the quantisation that is gone on with, and for a disk without room; and during work where GPTQ does worse than
    rounding. Raises OSError for a disk that is full. Layers that are finished are kept then.
    """
    options.check()
    grid = Grid(options.bits, options.group_size)
    device = torch.device(options.device)
    source = open_source(options.model, device, options.random_weights)
    place = Workplace(options.out, source.checkpoint.shape.layers)
    wanted = source.check(grid)
    sequences = read_calibration(options, source.checkpoint.shape)
    place.check_room(wanted)
    place.begin(_state(options, source, sequences))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began, before = time.monotonic(), place.finished()
    if before:
        say(f"going on after {before} finished layers in {place.path}")
    say(f"calibration: {len(sequences)} sequences, {sum(map(len, sequences)):,} tokens")
    with torch.inference_mode():
        if before < place.layers:
            _quantize_layers(options, source, sequences, place, Method(grid, options.damping))
        report = _report(options, place, sequences, began)
        files = {REPORT: report.json(), FIGURE: figure(report)}
        rest = source.rest()
        place.finish(rest, source.checkpoint.path, quantize_config(grid, options.damping), files)
    return report


def read_calibration(options: Options, shape: ModelShape) -> list[Tensor]:
    """The sequences. Raises UserError where there are none to be had, or the model cannot read them."""
    length = options.length or min(LENGTH, shape.max_positions)
    if length > shape.max_positions:
        raise UserError(f"--length {length} is more than the {shape.max_positions} tokens that the model can read")
    if options.random_weights:
        return calibration.made_up(shape.vocab_size, options.sequences, length, options.seed)
    tokenizer = load_tokenizer(options.model)
    if options.calibration is not None:
        found = calibration.from_file(options.calibration, tokenizer, options.sequences, length)
    elif calibration.is_ledger(tokenizer):
        found = calibration.from_ledger(tokenizer, options.sequences, options.length, options.seed)
        found = [sequence[: shape.max_positions] for sequence in found]
    else:
        raise UserError("give --calibration FILE: a text like what the model will be used for, some 300,000 words")
    if (largest := max(int(sequence.max()) for sequence in found)) >= shape.vocab_size:
        raise UserError(
            f"the tokenizer gives token {largest}, the model knows {shape.vocab_size}: do they belong together?"
        )
    return found


def _quantize_layers(
    options: Options, source: Source, sequences: list[Tensor], place: Workplace, method: Method
) -> None:
    dtype = getattr(torch, options.dtype)
    embedding = source.embedding(dtype)
    stream = Stream(sequences, embedding, source.checkpoint.shape, source.device, dtype)
    del embedding
    before = place.finished()
    with showing_progress(place.layers, before) as show:
        for index in range(place.layers):
            layer = source.layer(index, dtype)
            names = source.quantized_names(index)
            places = {name: source.places[name] for name in names}
            if index < before:
                put_back(index, layer, place.layer(index)[0], places, method.grid)
                for half in HALVES:
                    stream.advance(layer, half)
                continue
            progress = _shifted(show, index)
            tensors, lines = quantize_layer(index, layer, stream, places, method, progress)
            rest = source.as_stored(name for name in source.of_layer(index) if name not in places)
            place.keep_layer(index, tensors | dict(rest), lines)


def _shifted(show: Callable[[float], None], by: int) -> Callable[[float], None]:
    return lambda share: show(by + share)


def _state(options: Options, source: Source, sequences: list[Tensor]) -> dict[str, Any]:
    """Everything that has a say in the result."""
    return {
        "labkit": labkit.__version__,
        "model": source.fingerprint(),
        "bits": options.bits,
        "group_size": options.group_size,
        "damping": options.damping,
        "dtype": options.dtype,
        "random_weights": options.random_weights,
        "calibration": calibration.fingerprint(sequences),
    }


def _report(options: Options, place: Workplace, sequences: list[Tensor], began: float) -> Report:
    peak = torch.cuda.max_memory_reserved(options.device) if options.device.startswith("cuda") else None
    return Report(
        model=options.model,
        bits=options.bits,
        group_size=options.group_size,
        sequences=len(sequences),
        tokens=sum(map(len, sequences)),
        damping=options.damping,
        random_weights=options.random_weights,
        machine=describe_machine(options.device),
        seconds=round(time.monotonic() - began, 1),
        peak_bytes=peak,
        lines=place.reports(),
    )
