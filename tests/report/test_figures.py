from __future__ import annotations

import math

import pandas as pd
import pytest

from labkit.report import figures


def words(figure: object) -> list[str]:
    return [annotation.text for annotation in figure.layout.annotations]  # type: ignore[attr-defined]


def test_latency_is_labelled_in_place_with_its_interval() -> None:
    table = pd.DataFrame(
        {"users": [16, 1, 1], "deployment": ["first", "first", "second"], "value": [3.2, 0.2, 0.05],
         "low": [3.0, -math.inf, 0.04], "high": [math.inf, 0.25, 0.06]}
    )  # fmt: skip
    figure = figures.latency_by_users(table, limit_s=0.8, title="t", note="n")
    assert words(figure) == ["second, 50.0\u00a0ms", "first, 3.20\u00a0s", "limit 800\u00a0ms", "n"]
    first = figure.data[0]
    assert list(first.x) == [1, 16]  # in order of users
    assert list(first.error_y.array) == pytest.approx([0.05, 0.0])  # an open end is not drawn
    assert list(first.error_y.arrayminus) == pytest.approx([0.0, 0.2])
    limit = figure.layout.annotations[2]
    assert limit.y == pytest.approx(math.log10(0.8)) and figure.layout.shapes[0].y0 == 0.8
    assert figure.layout.yaxis.title.text.endswith("(s)")


def test_labels_of_lines_that_end_together_do_not_cover_each_other() -> None:
    table = pd.DataFrame(
        {"users": [1, 8] * 3, "deployment": ["a", "a", "b", "b", "c", "c"], "value": [1.0, 40.0, 2.0, 41.0, 1.0, 10.0],
         "low": 1.0, "high": 41.0}
    )  # fmt: skip
    figure = figures.latency_by_users(table)
    low, high = math.log10(1.0), math.log10(41.0)
    heights = {a.text[0]: (a.y - low) / (high - low) * 280 + a.yshift for a in figure.layout.annotations}
    assert heights["b"] - heights["a"] >= 16.9 and heights["a"] - heights["c"] > 60
    shifts = {annotation.text[0]: annotation.yshift for annotation in figure.layout.annotations}
    assert shifts["c"] == shifts["a"] == 0


def test_a_probe_that_read_nothing_says_so() -> None:
    samples = pd.DataFrame({"t_s": [0.0, 1.0], "probe": "host", "name": "cpu", "value": [10.0, 20.0]})
    figure = figures.timeline(
        samples, [("host", "cpu", "CPU (%)"), ("gpu", "utilisation", "GPU (%)")], window=(0.0, 1.0)
    )
    assert words(figure) == ["gpu: not read here"]
    assert list(figure.data[0].y) == [10.0, 20.0] and len(figure.data[1].x) == 0
    assert figure.layout.yaxis.title.text == "CPU (%)" and figure.layout.xaxis2.title.text == "time of the run (s)"


def test_the_ladder_keeps_its_order_and_names_its_reference() -> None:
    table = pd.DataFrame(
        {"rung": ["a", "b"], "value": [1.0, 3.0], "low": [0.9, 2.8], "high": [1.1, 3.3], "unit": "req/s"}
    )
    figure = figures.ladder(table, "throughput (req/s)", reference=("article", 583.0))
    assert list(figure.data[0].y) == ["a", "b"] and figure.layout.yaxis.autorange == "reversed"
    assert words(figure) == [" 1.00\u00a0req/s", " 3.00\u00a0req/s", " article 583"]


def test_an_unbounded_gain_is_drawn_at_its_lower_end() -> None:
    table = pd.DataFrame(
        {"metric": ["errors"], "value": [math.inf], "low": [2.0], "high": [math.inf], "claimed": [41.5]}
    )
    figure = figures.gains(table)
    assert words(figure)[:2] == ["at least 2.00×", "41.5×"]
    assert list(figure.data[0].x) == [2.0] and list(figure.data[0].error_x.array) == [0.0]


def test_the_parts_of_a_request_are_stacked_in_order() -> None:
    table = pd.DataFrame({"deployment": ["a", "a"], "part": ["waiting", "decode"], "seconds": [3.0, 0.5]})
    figure = figures.time_breakdown(table)
    assert [bar.name for bar in figure.data] == ["waiting", "decode"] and figure.layout.barmode == "stack"
    assert figure.data[1].text[0] == "decode<br>500\u00a0ms"


def test_lines_on_a_logarithmic_axis_are_labelled_at_their_end() -> None:
    table = pd.DataFrame({"name": "a", "batch": [1, 100], "value": [5.0, 9.0]})
    figure = figures.lines(table, "batch", "batch size", "tokens/s", log_x=True)
    assert figure.layout.annotations[0].x == pytest.approx(2.0) and figure.data[0].error_y.array is None


def test_a_logarithmic_height_has_ticks_and_labels_in_its_own_units() -> None:
    table = pd.DataFrame({"x": [1, 10, 1, 10], "name": ["a", "a", "b", "b"], "value": [0.01, 1.0, 0.1, 0.02]})
    figure = figures.lines(table, "x", "tokens", "seconds", log_x=True, log_y=True)
    assert figure.layout.yaxis.type == "log" and 0.05 in figure.layout.yaxis.tickvals
    assert [annotation.y for annotation in figure.layout.annotations] == pytest.approx([math.log10(0.02), 0.0])
