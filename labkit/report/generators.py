"""What the notebook on the network shows of the load generators: tables, frames for figures, and words."""

from __future__ import annotations

import math

import pandas as pd

from labkit.experiments.generator_tools import ARTICLE, Told
from labkit.experiments.generator_truth import WHOLE, Truth
from labkit.experiments.generators import Frozen, Measurement, agree
from labkit.experiments.intervals import percentile
from labkit.report.tables import Table, quantity

SMALL_PRINT = "Small print: the server's log, and by how much the generator is off."
KINDS = {"truncated": "truncated", "5xx": "HTTP 500", "stream_error": "error inside a 200"}


def counts_table(faults: Measurement, caption: str) -> Table:
    """One row a generator: how many requests it counts as what, against the server's log."""
    kinds = {**KINDS, "timeout": f"slower than {faults.timeout_s:g} s"}
    rows = []
    for tool, told, truth in _ran(faults):
        cells = [_counted(told.requests, truth.requests), _counted(told.success, truth.outcomes[WHOLE])]
        cells += [_counted(told.failures.get(kind, 0), truth.outcomes[kind]) for kind in kinds]
        rows.append((tool, *cells))
    rows += [(tool, *("–" for _ in range(2 + len(kinds)))) for tool in _absent(faults)]
    return Table(("", "requests", "successes", *kinds.values()), tuple(rows), f"{caption}. {SMALL_PRINT}")


def times_table(faults: Measurement, caption: str) -> Table:
    """One row a generator: the times that it tells of a server with faults, against those of the whole answers."""
    rows = []
    for tool, told, truth in _ran(faults):
        pairs = [(told.latency(q).value, truth.latency(q).value) for q in (50, 95)]
        pairs += [(told.ttft_p50_s, truth.ttft_p50_s), (told.itl_p50_s, truth.itl_p50_s)]
        rows.append((tool, *(_timed(said, true) for said, true in pairs)))
    columns = ("", "latency P50", "latency P95", "TTFT P50", "ITL P50")
    return Table(columns, tuple(rows), f"{caption}. {SMALL_PRINT} A dash: it does not measure that.")


def load_table(load: Measurement, caption: str) -> Table:
    """One row a generator under load: latency against the server's log, how much longer than the server alone the run
    took, the rate that came of it, and the CPU time a request."""
    rows = []
    for row in load.rows:
        if row.told is None or row.truth is None:
            continue
        told, truth = row.told, row.truth
        cells = [_timed(told.latency(q).value, truth.latency(q).value) for q in (50, 95)]
        failed = str(told.requests - told.success)
        rate = quantity(truth.outcomes[WHOLE] / truth.span_s, "/s")
        cpu = quantity(row.cpu_s / truth.requests, "s")
        cells += [failed, f"{load.times_ideal(truth):.2f}×", rate, cpu, quantity(truth.late_p95_s, "s")]
        rows.append((row.tool, *cells))
    columns = ("", "latency P50", "latency P95", "failed", "its run against the server's time", "answers",
               "CPU a request, start included", "server late, P95")  # fmt: skip
    return Table(columns, tuple(rows), f"{caption}; {load.users} users. {SMALL_PRINT}")


def differences_table(faults: Measurement) -> Table:
    """One row a generator: why its numbers are not the server's, or why it did not run."""
    rows = [(tool, "; ".join(_differences(told, truth)) or "counts as the server does") for tool, told, truth
            in _ran(faults)]  # fmt: skip
    rows += [(tool, f"not measured: {why}") for tool, why in _absent(faults).items()]
    return Table(("", "where its numbers come from"), tuple(rows), numbers=False)


def freeze_table(frozen: Frozen, caption: str) -> Table:
    """What each clock and loop sees of a server that froze once."""
    rows = []
    for name, latencies in _views(frozen).items():
        cells = [quantity(percentile(latencies, q).value, "s") for q in (50, 95, 99)]
        rows.append((name, str(len(latencies)), *cells, quantity(max(latencies), "s")))
    columns = ("", "requests", "latency P50", "P95", "P99", "longest")
    return Table(columns, tuple(rows), f"{caption}; the server stood still once, for {frozen.freeze_s:g} s.")


def freeze_frame(frozen: Frozen) -> pd.DataFrame:
    """For ``figures.lines``: name, percentile (50 to 99), value (latency in seconds)."""
    rows = [(name, q, percentile(latencies, q).value) for name, latencies in _views(frozen).items()
            for q in range(50, 100)]  # fmt: skip
    return pd.DataFrame(rows, columns=["name", "percentile", "value"])


def tail_frame(load: Measurement) -> pd.DataFrame:
    """For ``figures.ladder``: the P95 that a generator tells / that of the server's log."""
    ratios = [(tool, told.latency(95).value / truth.latency(95).value) for tool, told, truth in _ran(load)]
    rows = [(tool, ratio, ratio, ratio, "×") for tool, ratio in ratios]
    return pd.DataFrame(rows, columns=["rung", "value", "low", "high", "unit"])


def generators_takeaway(faults: Measurement, load: Measurement, frozen: Frozen) -> str:
    """What the measurements say, in Markdown. Needs the article's client among the generators."""
    row, loaded = faults.of(ARTICLE), load.of(ARTICLE)
    if row is None or loaded is None or row.told is None or row.truth is None or loaded.truth is None:
        raise ValueError(f"the takeaway is about {ARTICLE}; measure it")
    told, truth = row.told, row.truth
    seen, wanted = percentile(frozen.closed, 95).value, percentile(frozen.expected, 95).value
    exact = [tool for tool, said, true in _ran(faults) if not _differences(said, true)]
    counted = f"Counted as the server's log has it: {', '.join(exact)}." if exact else "None counted as the server did."
    close = [tool for tool, said, true in _ran(load) if agree(said.latency(95).value, true.latency(95).value)]
    near = ", ".join(close) or "none"
    return (
        f"- **Counts.** Of {truth.requests} requests {truth.outcomes[WHOLE]} were answered whole; {ARTICLE} says "
        f"{told.success}, and has no word for {truth.requests - told.requests}. {counted}\n"
        f"- **Load.** With {load.users} users at once these tell a P95 within 10 % of the server's: {near}. The run of "
        f"{ARTICLE} took {load.times_ideal(loaded.truth):.2f}× the server's time, so the throughput that it finds is "
        "lower by as much.\n"
        f"- **A freeze.** {quantity(frozen.freeze_s, 's')} of standstill are a P95 of {quantity(wanted, 's')} for "
        f"users who come at a constant rate. {ARTICLE.capitalize()} waits as well, asks nothing meanwhile, and tells "
        f"{quantity(seen, 's')}."
    )


def _differences(told: Told, truth: Truth) -> list[str]:
    """Where a generator's numbers differ from the log's, computed from both."""
    found = []
    taken = told.success - truth.outcomes[WHOLE]
    if taken:
        found.append(f"of what was not whole, or not in time, it takes {taken} for successes" if taken > 0 else
                     f"it counts {-taken} fewer successes than there were whole answers")  # fmt: skip
    renamed = [kind for kind in (*KINDS, "timeout") if told.failures.get(kind, 0) > truth.outcomes[kind]]
    if renamed:
        found.append(f"some failures go by the name of {', '.join(renamed)} that were another")
    if lost := truth.requests - told.requests:
        requests = "1 request is" if abs(lost) == 1 else f"{abs(lost)} requests are"
        found.append(f"{requests} {'in none of its counts' if lost > 0 else 'counted twice'}")
    if len(told.latencies) > told.success:
        found.append("its percentiles are of failed requests too")
    if told.remark:
        found.append(told.remark)
    return found


def _views(frozen: Frozen) -> dict[str, tuple[float, ...]]:
    rate = f"{frozen.rate:g} a second"
    return {
        f"{rate}, by arithmetic": frozen.expected,
        f"{rate}, labkit, from the scheduled time": frozen.scheduled,
        f"{rate}, labkit, from the sent time": frozen.sent,
        f"{frozen.users} users who wait, {ARTICLE}": frozen.closed,
    }


def _ran(measurement: Measurement) -> list[tuple[str, Told, Truth]]:
    return [(row.tool, row.told, row.truth) for row in measurement.rows if row.told and row.truth]


def _absent(measurement: Measurement) -> dict[str, str]:
    return {row.tool: row.absent for row in measurement.rows if row.told is None}


def _counted(said: int, true: int) -> str:
    return f"{said}\nlog: {true}, {_signed(said - true)}"


def _timed(said: float, true: float) -> str:
    if math.isnan(said):
        return "–"
    return f"{quantity(said, 's')}\nlog: {quantity(true, 's')}, {(said - true) / true:+.0%}".replace("-", "−")


def _signed(difference: int) -> str:
    return f"{difference:+d}".replace("-", "−") if difference else "±0"
