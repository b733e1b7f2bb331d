"""The lines of a bench: what was measured once, the table over the repeats, and the run they are kept in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import median
from typing import Any

import pandas as pd

from labkit.experiments.provenance import code_version, machine, versions
from labkit.experiments.store import EVENT_COLUMNS, Draft, Run, RunStore
from labkit.files import write_atomic

ROWS_FILE = "rows.json"


@dataclass(frozen=True)
class Row:
    """One measurement. The first of ``figures`` is what the line is about; without figures ``note`` says why."""

    workload: str
    name: str
    figures: dict[str, float] = field(default_factory=dict)
    note: str = ""
    repeat: int = 0


class Book:
    """The rows of a bench being made. Each one is on disk before the next is measured."""

    def __init__(self, draft: Draft) -> None:
        self.rows: list[Row] = []
        self._draft = draft

    def add(self, row: Row) -> Row:
        self.rows.append(row)
        write_atomic(self._draft.path / ROWS_FILE, json.dumps([dataclasses.asdict(each) for each in self.rows]))
        return row


@contextmanager
def keeping(store: RunStore, facts: dict[str, Any]) -> Iterator[tuple[Book, list[Run]]]:
    """Yields a book, and a list to which the run is appended once it is whole.

    What was measured before an exception or Ctrl-C is kept too, marked as cut; nothing is kept without any row. A kill
    leaves the rows so far in ``rows.json`` of the unfinished directory.
    """
    began, made = datetime.now(UTC), list[Run]()
    with store.create("bench") as draft:
        book, cut = Book(draft), "interrupted"
        try:
            yield book, made
            cut = ""
        finally:
            if book.rows or not cut:
                made.append(_finish(draft, book.rows, facts, began, cut))


def _finish(draft: Draft, rows: Sequence[Row], facts: dict[str, Any], began: datetime, cut: str) -> Run:
    seconds = (datetime.now(UTC) - began).total_seconds()
    manifest = {
        "kind": "bench",
        **facts,
        "rows": [dataclasses.asdict(row) for row in rows],
        "code": code_version(),
        "versions": versions(),
        "machine": machine(),
        "started_at": began.isoformat(timespec="milliseconds"),
        "window": [0.0, seconds],
        "cut": cut,
        "valid": not cut,
        "reasons": [cut] if cut else [],
    }
    return draft.finish(manifest, pd.DataFrame({column: [] for column in sorted(EVENT_COLUMNS)}))


def rows_of(run: Run) -> list[Row]:
    return [Row(**row) for row in run.manifest["rows"]]


def table(rows: Sequence[Row]) -> str:
    """Aligned lines for a terminal, a block a workload: the median over repeats, and for the first figure how far the
    repeats lie from it."""
    blocks = []
    for workload in dict.fromkeys(row.workload for row in rows):
        of_it = [row for row in rows if row.workload == workload]
        columns = list(dict.fromkeys(name for row in of_it for name in row.figures))
        lines = [(workload, *columns)]
        notes = []
        for name in dict.fromkeys(row.name for row in of_it):
            same = [row for row in of_it if row.name == name]
            lines.append((name, *(_cell(same, column) for column in columns)))
            notes.append("; ".join(dict.fromkeys(row.note for row in same if row.note)))
        blocks.append("\n".join(_aligned(lines, ["", *notes])))
    return "\n\n".join(blocks)


def _cell(rows: Sequence[Row], column: str) -> str:
    values = [row.figures[column] for row in rows if column in row.figures]
    if not values:
        return "–"
    middle = median(values)
    shown = f"{middle:.0%}" if column.startswith("of ") else number(middle)
    if len(values) > 1 and middle and column == next(iter(rows[0].figures)):
        shown += f" ±{max(abs(value / middle - 1) for value in values):.1%}"
    return shown


def number(value: float) -> str:
    """Three digits, or all of them before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _aligned(lines: Sequence[tuple[str, ...]], notes: Sequence[str]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    shown = []
    for (name, *cells), note in zip(lines, notes, strict=True):
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        shown.append("  ".join([name.ljust(widths[0]), *right, note]).rstrip())
    return shown
