from __future__ import annotations

import math

import pytest

from labkit.experiments.intervals import Estimate, digits
from labkit.experiments.split import Split
from labkit.report.tables import Change, Table, change_table, interval, quantity, split_table


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.7421, "s", "742\u00a0ms"),
        (2.1734, "s", "2.17\u00a0s"),
        (0.00007421, "s", "74.2\u00a0µs"),
        (0, "s", "0\u00a0ms"),
        (0.0834, "share", "8.34\u00a0%"),
        (127.4, "req/s", "127\u00a0req/s"),
        (4.5906, "×", "4.59×"),
        (3 * 2**30, "bytes", "3.00\u00a0GiB"),
        (512 * 2**20, "bytes", "512\u00a0MiB"),
        (0, "share", "0\u00a0%"),
        (math.nan, "s", "–"),
        (None, "s", "–"),
    ],
)
def test_quantities(value: float | None, unit: str, shown: str) -> None:
    assert quantity(value, unit) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.001234, "0.00123"),
        (9.996, "10.00"),
        (1234.5, "1234"),
        (123456, "123\u202f456"),
        (-2.5, "−2.50"),
        (math.inf, "∞"),
        (math.nan, "–"),
    ],
)
def test_three_digits(value: float, shown: str) -> None:
    assert digits(value) == shown


def test_value_and_interval_share_a_unit() -> None:
    assert interval(Estimate(0.93, 0.85, 1.02, 96, "s")) == "930\u00a0ms\n850 to 1020"
    assert interval(Estimate(2.0, -math.inf, math.inf, 3, "s")) == "2.00\u00a0s\n? to ?"
    assert interval(Estimate(math.inf, 1.5, math.inf, 9, "×")) == "∞×\n1.50 to ∞"


def test_the_articles_table() -> None:
    changes = [
        Change("P95", Estimate(4.0, 3.8, 4.2, 96, "s"), Estimate(1.0, 0.95, 1.05, 96, "s"), "C34"),
        Change("throughput", Estimate(2.0, 1.9, 2.1, 20, "req/s"), Estimate(9.0, 8.6, 9.4, 20, "req/s"), "C35"),
        Change("own", Estimate(2.0, 1.9, 2.1, 20, "req/s"), Estimate(1.0, 0.9, 1.1, 20, "req/s"), better="higher"),
    ]
    table = change_table(changes, "this machine")
    assert table.rows[0] == (
        "P95", "4.00\u00a0s\n3.80 to 4.20", "1.00\u00a0s\n0.950 to 1.05", "4.00×\n3.62 to 4.42",
        "2173\u00a0ms", "742\u00a0ms", "2.93×",
    )  # fmt: skip
    assert table.rows[1][3].startswith("4.50×") and table.rows[1][-1] == "4.59×"
    assert table.rows[2][3].startswith("0.500×") and table.rows[2][4:] == ("–", "–", "–")


def test_a_table_as_page_and_as_text() -> None:
    table = Table(("", "a<b"), (("row & one", "1\n2 to 3"),), "here")
    page = table._repr_html_()
    assert "a&lt;b" in page and "row &amp; one" in page and "<br><small>2 to 3</small>" in page
    assert "<caption>here" in page
    assert repr(table).splitlines()[1:] == ["row & one  1 2 to 3", "here"]
    with pytest.raises(ValueError, match="2 columns"):
        Table(("", "a"), (("only",),))


def test_processes_that_share_a_model_stand_beside_one() -> None:
    table = split_table(Split(2, 1, 12, 11, 0.5, 1.25), "this machine")
    assert table.rows[0] == ("one process", "500\u00a0ms", "12 of 12")
    assert table.rows[1] == ("2 processes (gloo, CPU)", "1.25\u00a0s", "11 of 12")
    assert split_table(Split(2, 2, 12, 12, 0.5, 0.25), "").rows[1][0] == "2 processes (NCCL)"
