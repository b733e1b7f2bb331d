"""What is said while a quantisation goes on."""

from __future__ import annotations

import io

from labkit.quantizer import progress
from labkit.quantizer.progress import Clock, minutes, showing_progress


def test_the_time_left_is_that_of_the_layers_done_here() -> None:
    times = iter([100.0, 100.0, 130.0, 160.0])
    clock = Clock(28, 4, now=lambda: next(times))
    assert clock.text(4) == "layer 5 of 28, 0:00"
    assert clock.text(5.5) == "layer 6 of 28, 0:30, about 7:30 left"
    assert clock.text(28) == "layer 28 of 28, 1:00, about 0:00 left"
    assert minutes(187.9) == "3:07"


def test_a_log_gets_a_line_now_and_then(monkeypatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    with showing_progress(2, stream=stream) as show:
        show(0.5)
        show(1.5)
    assert stream.getvalue().splitlines()[0].startswith("layer 1 of 2, 0:00, about 0:00 left")
    assert len(stream.getvalue().splitlines()) == 2
    monkeypatch.setattr(progress, "LOG_EVERY_S", 60.0)
    with showing_progress(2, stream=stream) as show:
        show(2.0)
    assert len(stream.getvalue().splitlines()) == 2


def test_a_terminal_gets_a_bar(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with showing_progress(4, 1, stream) as show:
        show(2.0)
    assert "quantising" in stream.getvalue() and "layer" in stream.getvalue()
