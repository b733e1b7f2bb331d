"""Tables with units and sensible digits: HTML for a page, plain text for a terminal, from the same cells."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from labkit.experiments.claims import claim, ratio_of
from labkit.experiments.intervals import Estimate, digits

if TYPE_CHECKING:
    from labkit.experiments.split import Split


@dataclass(frozen=True, repr=False)
class Table:
    """Shows itself in a notebook, and as text in a terminal. The first column names things, the others are numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    """Belongs to every table of results: the machine it was measured on."""
    numbers: bool = True
    """False aligns every column to the left: it holds words."""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row of {len(row)} cells does not fit {len(self.columns)} columns: {row!r}")

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        body = "".join("<tr>" + "".join(_cells(row)) + "</tr>" for row in self.rows)
        words = "" if self.numbers else " words"
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        inner = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f'<div class="labkit-table{words}">{inner}</div>'

    def __repr__(self) -> str:
        return self.text()

    def text(self, width: int = 120) -> str:
        """For a terminal."""
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=None, pad_edge=False, header_style="bold")
        for position, column in enumerate(self.columns):
            table.add_column(Text(column), justify="right" if position and self.numbers else "left")
        for row in self.rows:
            table.add_row(*(Text(cell.replace("\n", " ")) for cell in row))
        console = Console(file=io.StringIO(), width=width, force_jupyter=False)
        console.print(table)
        assert isinstance(console.file, io.StringIO)
        lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
        return "\n".join(lines + ([self.caption] if self.caption else []))


@dataclass(frozen=True)
class Change:
    """One row of before and after. ``claim`` adds what the article says; ``gain`` replaces the quotient of the two."""

    name: str
    before: Estimate
    after: Estimate
    claim: str | None = None
    better: str = "lower"
    gain: Estimate | None = None

    @property
    def ratio(self) -> Estimate:
        """How many times better it got, above 1 is better."""
        if self.gain is not None:
            return self.gain
        lower = (claim(self.claim).better if self.claim else self.better) == "lower"
        return ratio_of(self.before, self.after) if lower else ratio_of(self.after, self.before)


def change_table(changes: Sequence[Change], caption: str = "") -> Table:
    """The article's table: before, after, ratio (each with its interval), and the article's own figures beside them."""
    rows = []
    for change in changes:
        stated = claim(change.claim) if change.claim else None
        article = (
            (quantity(stated.before, stated.unit), quantity(stated.after, stated.unit), quantity(stated.gain, "×"))
            if stated is not None
            else ("–", "–", "–")
        )
        rows.append((change.name, interval(change.before), interval(change.after), interval(change.ratio), *article))
    columns = ("", "before", "after", "times better", "article: before", "article: after", "article: times better")
    return Table(columns, tuple(rows), caption)


def split_table(split: Split, machine: str) -> Table:
    """One process beside several that share the model."""
    joined = "NCCL" if split.gpus >= split.processes else "gloo, CPU"
    rows = (
        ("one process", quantity(split.alone_s, "s"), f"{split.asked} of {split.asked}"),
        (f"{split.processes} processes ({joined})", quantity(split.split_s, "s"), f"{split.same} of {split.asked}"),
    )
    return Table(("", "time for all answers", "the same answers"), rows, machine)


def quantity(value: float | None, unit: str | None = "") -> str:
    """Three significant digits and the unit: 0.742 s is 742 ms, less than 1 ms are µs, a share is per cent, bytes are
    MiB or GiB."""
    if value is None or math.isnan(value):
        return "–"
    factor, shown = _scale(value, unit or "")
    return _joined(digits(value * factor), shown)


def interval(estimate: Estimate) -> str:
    """Value and interval on two lines, in one unit: "742 ms" and "701 to 790". An end the data leave open is "?"."""
    if math.isnan(estimate.value):
        return "–"
    return "\n".join(parts(estimate.value, estimate.low, estimate.high, estimate.unit))


def parts(value: float, low: float, high: float, unit: str) -> tuple[str, str]:
    """Value with unit, and interval, in the one scale that fits the value."""
    factor, shown = _scale(value, unit)
    ends = [digits(end * factor) if math.isfinite(end) else "?" for end in (low, high)]
    if math.isinf(high) and unit == "×":
        ends[1] = "∞"
    return _joined(digits(value * factor), shown), f"{ends[0]} to {ends[1]}"


def _scale(value: float, unit: str) -> tuple[float, str]:
    if unit == "s" and 0 < abs(value) < 1e-3:
        return 1e6, "µs"
    if unit == "s" and abs(value) < 1:
        return 1e3, "ms"
    if unit == "share":
        return 100.0, "%"
    if unit == "bytes":
        return (2.0**-30, "GiB") if abs(value) >= 2**30 else (2.0**-20, "MiB")
    return 1.0, unit


def _joined(number: str, unit: str) -> str:
    return number + unit if unit in ("", "×") else f"{number}\u00a0{unit}"


def _cells(row: Sequence[str]) -> list[str]:
    first = f'<th scope="row">{html.escape(row[0])}</th>'
    rest = []
    for cell in row[1:]:
        value, _, beside = cell.partition("\n")
        small = f"<br><small>{html.escape(beside)}</small>" if beside else ""
        rest.append(f"<td>{html.escape(value)}{small}</td>")
    return [first, *rest]
