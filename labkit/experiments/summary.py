"""The usual metrics of a run, in the order in which one reads them."""

from __future__ import annotations

from labkit.experiments import metrics
from labkit.experiments.intervals import Estimate
from labkit.experiments.store import Run


def summary(run: Run) -> dict[str, Estimate]:
    """Name -> estimate. Latency by both clocks, failures as misses in the adjusted one."""
    table, window = run.requests, run.window
    rows: dict[str, Estimate] = {}
    for q in (50, 90, 95, 99):
        rows[f"latency P{q}, from scheduled"] = metrics.latency(table, window, q)
    rows["latency P95, from sent"] = metrics.latency(table, window, 95, "sent")
    rows["latency P95, failures as misses"] = metrics.adjusted_latency(table, window, 95)
    rows["TTFB P50"] = metrics.ttfb(table, window, 50)
    rows["TTFT P50"] = metrics.ttft(table, window, 50)
    rows["TTFT P95"] = metrics.ttft(table, window, 95)
    rows["first answer token P50"] = metrics.first_answer(table, window, 50)
    rows["ITL P95, raw gaps"] = metrics.itl(table, window, 95)
    rows["ITL P95, per token"] = metrics.itl(table, window, 95, per_token=True)
    rows["TPOT P50"] = metrics.tpot(table, window, 50)
    rows["throughput"] = metrics.throughput(table, window)
    rows["token throughput"] = metrics.token_throughput(table, window)
    rows["error rate"] = metrics.error_rate(table, window)
    for kind, estimate in metrics.error_rates(table, window).items():
        rows[f"  {kind}"] = estimate
    rows["accuracy"] = metrics.accuracy(table, window)
    return rows


def summary_text(run: Run, limit_s: float | None = None) -> str:
    """The summary as aligned lines: metric, value, 95 % interval, and n; then what speaks against trusting it.

    With ``limit_s`` also what a latency limit makes of the run, and whether a P95 within it is shown.
    """
    estimates = summary(run)
    if limit_s is not None:
        slo = metrics.SLO(latency_s=limit_s)
        estimates[f"within {limit_s:g} s"] = metrics.attainment(run.requests, run.window, slo)
        estimates[f"goodput within {limit_s:g} s"] = metrics.goodput(run.requests, run.window, slo)
    rows = [(name, *_cells(estimate), str(estimate.n)) for name, estimate in estimates.items()]
    rows.insert(0, ("metric", "value", "95 % interval", "n"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{name:<{widths[0]}}  {value:>{widths[1]}}  {interval:<{widths[2]}}  {n:>{widths[3]}}".rstrip()
        for name, value, interval, n in rows
    ]
    begin, end = run.window
    law = metrics.littles_law(run.requests, run.window)
    lines.append(
        f"measured from {begin:.1f} s to {end:.1f} s, {len(metrics.measured(run.requests, run.window))} requests"
    )
    lines.append(
        f"Little's law: {law.in_flight:.2f} in flight, {law.throughput:.2f}/s x {law.latency_s:.3g} s = "
        f"{law.throughput * law.latency_s:.2f} ({law.difference:+.1%})"
    )
    if limit_s is not None:
        shown = metrics.within_limit(run.requests, run.window, limit_s)
        words = {
            "within": "shown",
            "over": "refuted",
            "undecided": f"undecided ({shown.needed} requests would show it)",
        }
        lines.append(
            f"P95 within {limit_s:g} s: {words[shown.verdict]}, {shown.misses} misses in {shown.n} requests, at 99 %"
        )
    arrivals = run.manifest["arrivals"]
    if "intended" in arrivals:
        lines.append(
            f"arrivals: {arrivals['intended']} intended, {arrivals['sent']} sent, {arrivals['dropped']} dropped"
        )
    lines += [f"NO VERDICT FROM THIS RUN: {reason}" for reason in run.manifest["reasons"]]
    return "\n".join(lines)


def _cells(estimate: Estimate) -> tuple[str, str]:
    value, _, interval = str(estimate).partition(" [")
    return value, f"[{interval}" if interval else ""
