"""How far a quantisation is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TextIO

LOG_EVERY_S = 10.0


@contextmanager
def showing_progress(layers: int, begin: int = 0, stream: TextIO | None = None) -> Iterator[Callable[[float], None]]:
    """Yields what to call with the number of layers that are done, a fraction of one included.

    ``begin`` layers were done before, and tell nothing of the time that one takes. Writes to stderr by default.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(file=stream or sys.stderr)
    clock = Clock(layers, begin)
    if not console.is_terminal:
        yield _Log(clock, console.file).show
        return
    columns = (TextColumn("quantising"), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(clock.text(begin), total=layers, completed=begin)
        yield lambda done: bar.update(task, completed=done, description=clock.text(done))


class Clock:
    """Tells the time that is left from the time that was taken."""

    def __init__(self, layers: int, begin: int, now: Callable[[], float] = time.monotonic) -> None:
        self._layers, self._begin, self._now = layers, begin, now
        self._began = now()

    def text(self, done: float) -> str:
        """Such as "layer 3 of 28, 0:24, about 3:20 left"."""
        elapsed, here = self._now() - self._began, done - self._begin
        left = f", about {minutes(elapsed / here * (self._layers - done))} left" if here > 0 else ""
        return f"layer {min(int(done) + 1, self._layers)} of {self._layers}, {minutes(elapsed)}{left}"


class _Log:
    def __init__(self, clock: Clock, stream: IO[str]) -> None:
        self._clock, self._stream, self._said = clock, stream, time.monotonic()

    def show(self, done: float) -> None:
        if time.monotonic() - self._said >= LOG_EVERY_S:
            self._said = time.monotonic()
            print(self._clock.text(done), file=self._stream, flush=True)


def minutes(seconds: float) -> str:
    """3:07."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
