"""The walked ladder as a table: what each rung turned, and what that did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import pandas as pd

from labkit.experiments import metrics
from labkit.experiments.compare import compare, ratio_of_medians
from labkit.experiments.intervals import Estimate
from labkit.experiments.ladder import Rung, runs_by_rung
from labkit.experiments.store import Run
from labkit.report.tables import Table, interval, quantity

Metric = Callable[[pd.DataFrame, tuple[float, float]], Estimate]
_COLUMNS: dict[str, Metric] = {
    "requests/s": metrics.throughput,
    "P95 latency": lambda table, window: metrics.latency(table, window, 95),
    "P50 TTFT": lambda table, window: metrics.ttft(table, window, 50),
    "errors": metrics.error_rate,
    "right answers": metrics.accuracy,
}


def ladder_table(rungs: Sequence[Rung], runs: Sequence[Run], caption: str = "") -> Table:
    """One row a rung: the knob, medians over the repeats, how many times the first rung's throughput it reaches (with
    interval), and whether its answers are the first rung's."""
    groups = runs_by_rung(runs)
    first = groups[rungs[0].name]
    rows = []
    for rung in rungs:
        here = groups[rung.name]
        medians = [_median(here, metric) for metric in _COLUMNS.values()]
        if rung is rungs[0]:
            gain, same = "1×", "–"
        else:
            change = compare(first, here, lambda run: metrics.throughput(run.requests, run.window))
            gain = interval(ratio_of_medians(change.here, change.there)).replace("\n", ", ")
            same = "; ".join(dict.fromkeys(map(str, change.work)))
        rows.append((rung.name, rung.knob or "–", *medians, gain, same))
    return Table(("rung", "knob", *_COLUMNS, "× first", "answers"), tuple(rows), caption)


def _median(runs: Sequence[Run], metric: Metric) -> str:
    estimates = [metric(run.requests, run.window) for run in runs]
    return quantity(median(each.value for each in estimates), estimates[0].unit)
