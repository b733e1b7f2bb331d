"""Tables, frames and sentences about load generators, from measurements made by hand."""

from __future__ import annotations

from labkit.experiments.generator_tools import ARTICLE, GUIDELLM, JMETER, LABKIT, LOCUST, Told
from labkit.experiments.generator_truth import FAILURES, WHOLE, Truth
from labkit.experiments.generators import Frozen, Measured, Measurement
from labkit.report import figures, generators

PLAYED = {WHOLE: 6, "truncated": 2, "5xx": 1, "stream_error": 1, "timeout": 2}
TRUTH = Truth(PLAYED, {"whole": 6, "no end": 2, "HTTP 500": 1}, (0.5,) * 6, 0.2, 0.02, 2.0, 0.001)
RIGHT = Told(6, {kind: PLAYED[kind] for kind in FAILURES}, (0.5,) * 6, 0.21, 0.02)
WRONG = Told(8, {"5xx": 1, "timeout": 1}, (0.5,) * 7 + (1.0,) * 2, remark="2 × ConnectionError ended a thread")
MISNAMED = Told(6, {"truncated": 4, "5xx": 1, "stream_error": 1}, (0.5,) * 6)
LOST = Told(5, {kind: PLAYED[kind] for kind in FAILURES}, (0.5,) * 5)
FAULTS = Measurement(
    (Measured(LABKIT, RIGHT, TRUTH, 0.6), Measured(ARTICLE, WRONG, TRUTH, 1.2), Measured(LOCUST, MISNAMED, TRUTH, 1.0),
     Measured(GUIDELLM, LOST, TRUTH, 1.0), Measured(JMETER, absent="jmeter is not installed")),
    3, 5.0, (("short", 1.0),),
)  # fmt: skip
LOAD = Measurement(FAULTS.rows[:2], 3, 30.0, FAULTS.mix)
FROZEN = Frozen(1.0, 0.05, 20.0, 4, (0.9,) * 20, (0.91,) * 20, (0.9,) * 20, (0.05,) * 99 + (1.0,))


def test_each_count_stands_above_that_of_the_log() -> None:
    table = generators.counts_table(FAULTS, "a machine")
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows[LABKIT]["successes"] == "6\nlog: 6, ±0" and rows[ARTICLE]["successes"] == "8\nlog: 6, +2"
    assert rows[ARTICLE]["requests"] == "10\nlog: 12, −2" and rows[ARTICLE]["truncated"] == "0\nlog: 2, −2"
    assert rows[ARTICLE]["slower than 5 s"] == "1\nlog: 2, −1" and set(rows[JMETER].values()) == {JMETER, "–"}


def test_times_and_what_a_generator_does_not_measure() -> None:
    table = generators.times_table(FAULTS, "a machine")
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows[LABKIT]["TTFT P50"] == "210\u00a0ms\nlog: 200\u00a0ms, +5%"
    assert rows[ARTICLE]["latency P95"] == "1.00\u00a0s\nlog: 500\u00a0ms, +100%" and rows[ARTICLE]["ITL P50"] == "–"
    assert JMETER not in rows


def test_differences_are_named_from_the_numbers() -> None:
    found = dict(generators.differences_table(FAULTS).rows)
    assert found[LABKIT] == "counts as the server does"
    assert found[LOCUST] == "some failures go by the name of truncated that were another"
    assert found[GUIDELLM].startswith("it counts 1 fewer successes than there were whole answers; 1 request is in none")
    assert found[JMETER] == "not measured: jmeter is not installed"
    for words in (
        "of what was not whole, or not in time, it takes 2 for successes",
        "2 requests are in none",
        "of failed requests too",
        "ConnectionError",
    ):
        assert words in found[ARTICLE]


def test_load_and_freeze() -> None:
    table = generators.load_table(LOAD, "a machine")
    ours = dict(zip(table.columns, table.rows[0], strict=True))
    assert ours["its run against the server's time"] == "2.00×" and ours["answers"] == "3.00\u00a0/s"
    assert ours["CPU a request, start included"] == "50.0\u00a0ms" and ours["failed"] == "6"
    frozen = generators.freeze_table(FROZEN, "a machine")
    assert [row[3] for row in frozen.rows] == ["900\u00a0ms", "910\u00a0ms", "900\u00a0ms", "50.0\u00a0ms"]
    assert frozen.rows[-1][-1] == "1.00\u00a0s"
    assert len(generators.freeze_frame(FROZEN)) == 4 * 50


def test_figures_have_a_bar_for_each_that_ran() -> None:
    frame = generators.tail_frame(LOAD)
    assert frame["value"].tolist() == [1.0, 2.0]
    assert len(figures.ladder(frame, "said / log", reference=("log", 1.0)).data[0].x) == 2


def test_the_takeaway_is_computed() -> None:
    text = generators.generators_takeaway(FAULTS, LOAD, FROZEN)
    assert "Of 12 requests 6 were answered whole; the article's client says 8, and has no word for 2" in text
    assert "Counted as the server's log has it: labkit." in text and "P95 within 10 % of the server's: labkit." in text
    assert "took 2.00× the server's time" in text and "a P95 of 900\u00a0ms" in text and "tells 50.0\u00a0ms" in text
