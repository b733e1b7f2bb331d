"""One operation, several implementations: checked against a reference, then timed against the device's ceilings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from labkit.bench.ceilings import Ceilings
from labkit.bench.peers import free
from labkit.bench.rows import Book, Row
from labkit.bench.timing import Call, Timer, input_sets, make_timer, rounds


@dataclass(frozen=True)
class Case:
    """An operation at one size.

    ``make(seed)`` gives the inputs; ``contestants`` take them, and so does ``reference``, from whose result theirs may
    differ by the share ``tolerance`` in any row (the last dimension), by the Euclidean norm; ``tolerances`` has other
    shares by name, for those that are known to round more. A contestant that is a string is left out for the reason it
    gives. ``bytes`` and ``flops`` are what one call must move and compute; 0 where that says nothing. ``holds`` are the
    bytes of one set of inputs, None for ``bytes``.
    """

    workload: str
    size: str
    make: Callable[[int], tuple[Any, ...]]
    reference: Callable[..., Any]
    contestants: Mapping[str, Call | str]
    bytes: float = 0.0
    flops: float = 0.0
    holds: float | None = None
    tolerance: float = 2e-2
    tolerances: Mapping[str, float] = field(default_factory=dict)


@torch.inference_mode()
def run_case(case: Case, device: torch.device, ceilings: Ceilings, book: Book, say: Callable[[str], None]) -> None:
    """Adds a row a contestant, the median of the rounds. One that fails or is wrong gets a note instead of a speed."""
    try:
        sets = [case.make(seed) for seed in range(input_sets(case.holds or case.bytes))]
        # Some operations write into what they are given, so the checks keep inputs of their own.
        untouched = _copies(sets[0])
        expected = _tensors(case.reference(*_copies(untouched)))
    except torch.OutOfMemoryError:
        book.add(Row(case.workload, case.size, note="skipped: the inputs or the reference do not fit the memory"))
        free()
        return
    notes = {name: _checked(case, name, call, untouched, expected) for name, call in case.contestants.items()}
    del untouched, expected
    timers = _timers(case, sets, device, notes)
    times: dict[str, list[float]] = {name: [] for name in timers}
    # To and fro, a few milliseconds each, so that a GPU that grows hot and slow does so for all alike.
    for turn in range(rounds(device)):
        for name in list(timers)[:: -1 if turn % 2 else 1]:
            times[name].append(timers[name]())
    for name, note in notes.items():
        figures = {} if note else _figures(case, median(times[name]), ceilings)
        row = Row(case.workload, f"{case.size}, {name}", figures, note)
        book.add(row)
        shown = ", ".join(f"{value:.3g} {unit}" for unit, value in row.figures.items())
        say(f"{row.workload}, {row.name}: {'; '.join(part for part in (shown, row.note) if part)}")
    del sets, timers
    free()


def _timers(case: Case, sets: list[tuple[Any, ...]], device: torch.device, notes: dict[str, str]) -> dict[str, Timer]:
    """Of every contestant without a note, which one that fails here gets."""
    timers = {}
    for name, call in case.contestants.items():
        if notes[name] or isinstance(call, str):
            continue
        try:
            timers[name] = make_timer(call, sets, device)
        except Exception as failure:  # a compiler, a library or the memory: the others still have their turn
            notes[name] = _failure(failure)
    return timers


def compiled(function: Callable[..., Any], device: torch.device) -> Call | str:
    """``torch.compile`` of a function for shapes that do not change; the reason where that is not tried."""
    if device.type != "cuda":
        return "compiled on CUDA only"
    return torch.compile(function, dynamic=False)


def _checked(case: Case, name: str, call: Call | str, inputs: tuple[Any, ...], expected: list[Tensor]) -> str:
    """Why a contestant is not timed; empty if it is."""
    if isinstance(call, str):
        return f"skipped: {call}"
    try:
        error = _difference(_tensors(call(*_copies(inputs))), expected)
    except Exception as failure:
        return _failure(failure)
    if error <= case.tolerances.get(name, case.tolerance):
        return ""
    return f"WRONG: a row differs from the reference by {error:.2g}"


def _failure(failure: Exception) -> str:
    free()
    reason = str(failure).strip().splitlines()[0] if str(failure).strip() else type(failure).__name__
    return f"failed: {reason[:100]}"


def _figures(case: Case, seconds: float, ceilings: Ceilings) -> dict[str, float]:
    figures = {"us": seconds * 1e6}
    if case.flops:
        figures |= {"TFLOP/s": case.flops / seconds / 1e12, "of matmul": case.flops / seconds / ceilings.flops_s}
    if case.bytes:
        figures |= {"TB/s": case.bytes / seconds / 1e12, "of copy": case.bytes / seconds / ceilings.bytes_s}
    return figures


def _tensors(found: Any) -> list[Tensor]:
    return list(found) if isinstance(found, tuple | list) else [found]


def _copies(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Fresh tensors: some operations write into what they are given."""
    return tuple(each.clone() if isinstance(each, Tensor) else each for each in inputs)


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest |ours - right| / |right| over the rows of every output, by the Euclidean norm; inf for a NaN."""
    worst = 0.0
    for ours, right in zip(found, expected, strict=True):
        wide = right.float()
        apart = torch.linalg.vector_norm(ours.float().view(wide.shape) - wide, dim=-1)
        share = apart / torch.linalg.vector_norm(wide, dim=-1).clamp_min(1e-6)
        worst = max(worst, float(share.nan_to_num(nan=torch.inf).max()))
    return worst
