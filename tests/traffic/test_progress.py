from __future__ import annotations

import math

import pytest

from labkit.traffic import progress as module
from labkit.traffic.generate import Progress
from labkit.traffic.progress import progress_line, showing_progress


def test_a_line_says_how_far_a_run_is():
    line = progress_line(Progress(elapsed_s=5, sent=10, ended=7, failed=2, p95_s=1.234, left_s=12.4))
    assert line == "10 sent, 3 in flight, 5 done, 2 failed, P95 so far 1.23 s, about 12 s left"
    assert progress_line(Progress(0, 0, 0, 0, math.nan, math.nan)).endswith("P95 so far –")


@pytest.mark.parametrize("every,lines", [(0.0, 3), (60.0, 0)])
def test_a_log_gets_a_line_now_and_then(monkeypatch, capsys, every, lines):
    monkeypatch.setattr(module, "PLAIN_EVERY_S", every)
    with showing_progress("run") as show:
        for _ in range(3):
            show(Progress(1, 1, 0, 0, math.nan, math.nan))
    assert capsys.readouterr().err.count("run: 1 sent") == lines
