"""What `labkit run` shows while it works: one line a notebook that moves on a terminal, few lines in a log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from labkit.report.shelf import Execution

LOG_EVERY_S = 20.0
REDRAW_EVERY_S = 0.5


class Progress:
    """Writes to ``stream``: redraws one line on a terminal, adds a line every 20 s elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._name, self._cells, self._began, self._shown = "", 0, 0.0, 0.0
        self._earlier: tuple[float, ...] = ()

    def line(self, text: str) -> None:
        self._write(("\r\x1b[K" if self._terminal else "") + text + "\n")

    def begin(self, name: str, cells: int, earlier_s: Sequence[float]) -> None:
        """``cells``: code cells to come; ``earlier_s``: what each took the last time, to tell the time left."""
        self._name, self._cells, self._earlier = name, cells, tuple(earlier_s)
        self._began = self._shown = time.perf_counter()
        about = f", about {clock(sum(self._earlier))}" if self._knows() else ""
        self.line(f"{name}: {cells} cells{about}")

    def tick(self, cell_s: Sequence[float]) -> None:
        """``cell_s``: seconds of the cells that have ended."""
        now = time.perf_counter()
        if now - self._shown < (REDRAW_EVERY_S if self._terminal else LOG_EVERY_S):
            return
        self._shown = now
        elapsed = now - self._began
        text = f"{self._name}: cell {min(len(cell_s) + 1, self._cells)} of {self._cells}, {clock(elapsed)}"
        if self._knows():
            left = sum(self._earlier) - max(
                sum(self._earlier[: len(cell_s)]), min(elapsed, sum(self._earlier[: len(cell_s) + 1]))
            )
            text += f", about {clock(max(0.0, left))} left"
        self._write(f"\r\x1b[K{text}" if self._terminal else f"{text}\n")

    def end(self, name: str, status: str, duration_s: float, reason: str | None) -> None:
        self.line(f"{name}: {status} after {clock(duration_s)}" + (f": {reason}" if reason else ""))

    def _knows(self) -> bool:
        return len(self._earlier) == self._cells

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def summary(executions: Sequence[Execution], stream: TextIO) -> None:
    """The table at the end: notebook, status, duration, and where to look when it did not succeed."""
    from rich.console import Console
    from rich.table import Table

    table = Table("notebook", "status", "took", "reason", box=None, pad_edge=False, header_style="bold")
    for execution in executions:
        colour = "green" if execution.status == "succeeded" else "red"
        reason = (execution.reason or "").replace("[", "\\[")
        table.add_row(execution.notebook, f"[{colour}]{execution.status}[/]", clock(execution.duration_s), reason)
    Console(file=stream, force_jupyter=False).print(table)


def clock(seconds: float) -> str:
    """Minutes and seconds: 3:07."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
