from __future__ import annotations

import time
from typing import Any

import pandas as pd
import pytest

from labkit.report import widgets
from labkit.report.widgets import Tile, dashboard, knob, live

TILES = (Tile("waiting", "engine", "waiting"), Tile("memory", "host", "rss", "bytes"))


class Counter:
    name, description = "engine", "counts"

    def __init__(self) -> None:
        self.reads = 0

    def read(self) -> dict[str, float]:
        self.reads += 1
        return {"waiting": float(self.reads)}


class Handle:
    def __init__(self) -> None:
        self.shown: list[Any] = []

    def update(self, value: Any) -> None:
        self.shown.append(value)


def test_headless_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: pytest.fail("nothing is shown headless"))
    probe = Counter()
    with live([probe], TILES, interactive=False):
        pass
    assert probe.reads == 0
    assert knob("policy", ("a", "b"), "b", interactive=False).value == "b"


def test_it_ends_as_one_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Handle()
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: handle)
    with live([Counter()], TILES, interactive=True):
        time.sleep(1.1)
    drawn = handle.shown[:-1]
    assert 2 <= len(drawn) <= 5  # at most four times a second
    assert "polyline" in drawn[-1].data and len(drawn[-1].data) < 3000
    figure = handle.shown[-1]
    assert len(figure.data[0].x) >= 3 and figure.data[0].x[0] == 0.0


def test_tiles_show_the_last_number_or_a_dash() -> None:
    samples = pd.DataFrame({"t_s": [0.0, 1.0], "probe": "engine", "name": "waiting", "value": [3.0, 7.0]})
    page = dashboard(samples, TILES)
    assert "7.00" in page and "–" in page
    constant = dashboard(samples.assign(value=0.0), TILES)
    assert "nan" not in constant


def test_a_value_that_is_no_option_is_refused() -> None:
    with pytest.raises(ValueError, match="policy must be one of a, b; got 'c'"):
        knob("policy", ("a", "b"), "c", interactive=False)
    assert widgets.Fixed(3).value == 3
