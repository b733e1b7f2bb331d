"""The figure of the README: the newest walk of the ladder as one SVG that needs nothing else, on light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from labkit.errors import UserError
from labkit.experiments import metrics
from labkit.experiments.compare import compare
from labkit.experiments.intervals import Estimate
from labkit.experiments.ladder import ladder, runs_by_rung
from labkit.experiments.metrics import Window
from labkit.experiments.store import Run, RunStore
from labkit.report.results import alike, interval_at, machine_of, rungs_frame, throughput_of, users_line
from labkit.report.tables import quantity

WIDTH, LEFT, BAR, ROW = 780, 210, 420, 34
STYLE = (
    "text{font:14px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#24292f}"
    ".small{font-size:12px;fill:#57606a}.title{font-size:15px;font-weight:600}"
    ".first{fill:#8c959f}.later{fill:#0072b2}.range{stroke:#24292f;stroke-width:1.5;fill:none}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9da7b3}.later{fill:#3fa2e0}.range{stroke:#e6edf3}}"
)


def newest_walk(store: RunStore) -> list[Run]:
    """The runs of the walk that began last and has at least two rungs, in the order of the ladder.

    Raises UserError when there is none.
    """
    order = [rung.name for rung in ladder(device="cuda")]
    walks: dict[str, list[Run]] = {}
    for run in store.list():
        if run.valid and "walk" in run.manifest and run.manifest["rung"] in order:
            walks.setdefault(run.manifest["walk"], []).append(run)
    for runs in sorted(walks.values(), key=lambda runs: str(runs[0].manifest["started_at"]), reverse=True):
        if len(runs_by_rung(runs)) > 1:
            return sorted(runs, key=lambda run: (order.index(run.manifest["rung"]), run.manifest["repeat"]))
    raise UserError(f"{store.root} holds no walk of the ladder; run `labkit run 06_results` first")


def first_result_svg(runs: Sequence[Run]) -> str:
    """Throughput and P95 latency of each rung as bars with 95 % intervals, and under them the ratio between the ends,
    the machine and the day."""
    groups = list(runs_by_rung(runs).values())
    panels: list[tuple[str, Callable[[pd.DataFrame, Window], Estimate]]] = [
        ("Answers per second (more is better)", metrics.throughput),
        ("P95 latency: 95 % of the answers come within (less is better)", lambda t, w: metrics.latency(t, w, 95)),
    ]
    body, at = [], 0
    for title, metric in panels:
        body.append(f'<text class="title" x="0" y="{at + 22}">{html.escape(title)}</text>')
        body += _bars(rungs_frame(runs, metric), at + 36)
        at += 36 + ROW * len(groups) + 18
    whole = compare(groups[0], groups[-1], throughput_of)
    names = [group[0].manifest["rung"] for group in (groups[0], groups[-1])]
    ratio = interval_at(whole.ratio).replace("\n", ", interval ")
    for line in (
        f"{names[1]} against {names[0]}: {ratio} confidence; same answers: {alike(whole)}",
        f"{users_line(runs)}; whiskers are 95 % intervals, an end that so few requests leave open is not drawn",
        machine_of(runs),
    ):
        at += 18
        body.append(f'<text class="small" x="0" y="{at}">{html.escape(line)}</text>')
    label = html.escape(f"{names[1]} against {names[0]}: {ratio} as many answers per second")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {at + 12}" width="{WIDTH}" height="{at + 12}" '
        f'role="img" aria-label="{label}">\n<style>{STYLE}</style>\n' + "\n".join(body) + "\n</svg>\n"
    )


def write_first_result(store: RunStore, target: Path) -> None:
    """Draws the newest walk into ``target``."""
    from labkit.files import write_atomic

    write_atomic(target, first_result_svg(newest_walk(store)))


def _bars(table: pd.DataFrame, top: int) -> list[str]:
    ends = [high if math.isfinite(high) else value for value, high in zip(table["value"], table["high"], strict=True)]
    scale = BAR / max(ends)
    rows = []
    for place, (rung, value, low, high, unit) in enumerate(table.itertuples(index=False, name=None)):
        y, middle = top + ROW * place, top + ROW * place + 12
        begin = LEFT + scale * (max(low, 0.0) if math.isfinite(low) else value)
        end = LEFT + scale * (high if math.isfinite(high) else value)
        kind = "later" if place else "first"
        rows.append(f'<text x="{LEFT - 10}" y="{middle + 5}" text-anchor="end">{html.escape(rung)}</text>')
        rows.append(f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{scale * value:.1f}" height="24" rx="2"/>')
        whisker = f"M{begin:.1f} {middle - 5}v10M{begin:.1f} {middle}H{end:.1f}M{end:.1f} {middle - 5}v10"
        rows.append(f'<path class="range" d="{whisker}"/>')
        rows.append(f'<text x="{end + 10:.1f}" y="{middle + 5}">{html.escape(quantity(value, unit))}</text>')
    return rows
