"""Live progress of a run on a terminal, one line a few seconds elsewhere (logs, CI)."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from labkit.traffic.generate import Progress

PLAIN_EVERY_S = 10.0


@contextmanager
def showing_progress(label: str) -> Iterator[Callable[[Progress], None]]:
    """Yields what to call with every Progress; writes to stderr."""
    console = Console(file=sys.stderr)
    if console.is_terminal:
        with Live(Text(label), console=console, refresh_per_second=4, transient=True) as live:
            yield lambda progress: live.update(Text(f"{label}: {progress_line(progress)}"))
        return
    last = time.monotonic()

    def say(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= PLAIN_EVERY_S:
            last = time.monotonic()
            print(f"{label}: {progress_line(progress)}", file=sys.stderr, flush=True)

    yield say


def progress_line(progress: Progress) -> str:
    p95 = "–" if math.isnan(progress.p95_s) else f"{progress.p95_s:.2f} s"
    left = "" if math.isnan(progress.left_s) else f", about {progress.left_s:.0f} s left"
    return (
        f"{progress.sent} sent, {progress.in_flight} in flight, {progress.ended - progress.failed} done, "
        f"{progress.failed} failed, P95 so far {p95}{left}"
    )
