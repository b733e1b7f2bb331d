from __future__ import annotations

import io

import pytest

from labkit.report import progress
from labkit.report.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_time_left_comes_from_the_last_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    stream = Terminal()
    shown = Progress(stream)
    shown.begin("00_x", 3, [10.0, 60.0, 30.0])
    assert "3 cells, about 1:40" in stream.getvalue()
    now[0] += 25.0
    shown.tick([10.0])
    assert "cell 2 of 3, 0:25, about 1:15 left" in stream.getvalue()


def test_without_a_last_time_no_guess_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    stream = io.StringIO()
    shown = Progress(stream)
    shown.begin("00_x", 3, [10.0])
    for _ in range(100):
        now[0] += 1.0
        shown.tick([5.0])
    lines = stream.getvalue().splitlines()
    assert len(lines) == 6 and "left" not in stream.getvalue() and lines[1] == "00_x: cell 2 of 3, 0:20"
    assert "\r" not in stream.getvalue()  # a log is no terminal


def test_minutes_and_seconds() -> None:
    assert [progress.clock(seconds) for seconds in (0.4, 59.9, 187)] == ["0:00", "0:59", "3:07"]
