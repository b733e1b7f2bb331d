from __future__ import annotations

import json

import pytest

from labkit.bench.rows import Row, keeping, number, rows_of, table
from labkit.experiments.store import RunStore


def test_the_table_shows_medians_and_how_far_repeats_lie():
    rows = [
        Row("mix", "labkit", {"tokens/s": speed, "of copy": 0.5}, repeat=i) for i, speed in enumerate((90, 100, 120))
    ]
    rows.append(Row("mix", "peer", {"tokens/s": 12.345}, note="same answers 3/3"))
    rows.append(Row("decode", "labkit", note="failed: no memory"))
    lines = [line.split() for line in table(rows).splitlines()]
    assert lines == [
        ["mix", "tokens/s", "of", "copy"],
        ["labkit", "100", "±20.0%", "50%"],
        ["peer", "12.3", "–", "same", "answers", "3/3"],
        [],
        ["decode"],
        ["labkit", "failed:", "no", "memory"],
    ]


@pytest.mark.parametrize(("value", "shown"), [(31234.6, "31,235"), (999.4, "999"), (0.012345, "0.0123"), (4.1, "4.1")])
def test_three_digits_or_all_before_the_point(value, shown):
    assert number(value) == shown


def test_a_bench_becomes_a_run(tmp_path):
    store = RunStore(tmp_path)
    with keeping(store, {"deployment": {"model": "m"}}) as (book, made):
        row = book.add(Row("mix", "labkit", {"tokens/s": 1.0}))
    (run,) = store.list()
    assert run.path == made[0].path and run.valid and run.manifest["deployment"] == {"model": "m"}
    assert rows_of(run) == [row]
    assert run.manifest["machine"] and run.manifest["versions"] and run.events.empty


def test_every_row_is_on_disk_before_the_next(tmp_path):
    with keeping(RunStore(tmp_path), {}) as (book, _):
        for count in (1, 2):
            book.add(Row("mix", "labkit", repeat=count))
            (rest,) = tmp_path.glob("*.unfinished-*/rows.json")
            assert len(json.loads(rest.read_text())) == count


def test_what_was_measured_before_ctrl_c_is_kept_as_cut(tmp_path):
    store = RunStore(tmp_path)
    with pytest.raises(KeyboardInterrupt), keeping(store, {}) as (book, _):
        book.add(Row("mix", "labkit"))
        raise KeyboardInterrupt
    (run,) = store.list()
    assert not run.valid and run.manifest["cut"] == "interrupted" and len(rows_of(run)) == 1


def test_nothing_is_kept_of_a_bench_that_measured_nothing(tmp_path):
    with pytest.raises(ValueError), keeping(RunStore(tmp_path), {}):
        raise ValueError
    assert list(tmp_path.iterdir()) == []
