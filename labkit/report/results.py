"""Tables of runs: what a notebook shows of them besides figures."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import pandas as pd

from labkit.experiments import metrics
from labkit.experiments.anatomy import batches, group_by_users, pooled, users_of, waiting_and_work
from labkit.experiments.claims import (
    TIMEOUT_S,
    USERS,
    VERDICTS_VARIABLE,
    Evidence,
    Verdict,
    judge_ratio,
    load_claims,
    not_testable,
    read_verdicts,
)
from labkit.experiments.compare import Comparison, compare
from labkit.experiments.intervals import Estimate, digits
from labkit.experiments.ladder import Rung, runs_by_rung
from labkit.experiments.metrics import SLO, Window
from labkit.experiments.rules import LIMIT_S, inside, invalid, mean_sample, probe_text, slow_as_failed
from labkit.experiments.store import Run
from labkit.probes.profiler import by_group
from labkit.report.environment import machine_line
from labkit.report.shelf import Shelf
from labkit.report.tables import Change, Table, interval, quantity

NONE = Estimate(math.nan, math.nan, math.nan, 0, "share")


def throughput_of(run: Run) -> Estimate:
    """Requests per second of one run."""
    return metrics.throughput(run.requests, run.window)


def many(users: int) -> str:
    """ "1 user", "8 users": with a space that keeps it on one line."""
    return f"{users}\u00a0user{'s' if users > 1 else ''}"


def prediction_table(prediction: pd.DataFrame) -> Table:
    """The prediction of ``anatomy.predicted``."""
    rows = [
        (many(int(users)), quantity(float(rate), "requests/s"), quantity(float(latency), "s"))
        for users, rate, latency in prediction[["users", "throughput", "latency_s"]].to_numpy()
    ]
    return Table(("", "predicted throughput", "predicted mean latency"), tuple(rows))


def machine_of(runs: Sequence[Run]) -> str:
    """The caption of what was measured: machine, day of the runs, and what else ran there."""
    days = sorted({str(run.manifest["started_at"])[:10] for run in runs})
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    busy = disturbance(runs)
    return f"{machine_line(runs[0].manifest['machine'])}; {span}" + (f"; {busy}" if busy else "")


def disturbance(runs: Sequence[Run]) -> str:
    """How much of the machine was used by anything but the server, in the most disturbed run; "" if not known."""
    found = []
    for run in runs:
        whole, server = inside(run, "host", "cpu"), inside(run, "host", "tree_cpu")
        if len(whole) and len(server):
            found.append(max(0.0, whole.mean() / 100 * run.manifest["machine"]["cores"] - server.mean() / 100))
    if not found:
        return ""
    return f"other programs, the client included, used at most {max(found):.1f} cores (mean of a run)"


def users_table(runs: Sequence[Run]) -> Table:
    """One row a number of users: requests, latency by both clocks, TTFT, throughput, right answers."""
    rows = []
    for users, group in group_by_users(runs).items():
        table, window = pooled(group)
        rows.append((
            many(users), str(len(table)),
            interval(metrics.latency(table, window, 50)),
            interval(metrics.latency(table, window, 95)), interval(metrics.latency(table, window, 95, "sent")),
            interval(metrics.ttft(table, window, 50)), interval(metrics.throughput(table, window)),
            interval(metrics.accuracy(table, window)),
        ))  # fmt: skip
    columns = ("", "requests", "P50", "P95 from scheduled", "P95 from sent", "TTFT P50", "throughput", "right answers")
    return Table(columns, tuple(rows), f"{machine_of(runs)}. In small print: 95 % intervals; ? is an open end.")


def failures_table(runs: Sequence[Run]) -> Table:
    """One row a number of users: failures by kind, and what the article's limits make of the same answers."""
    kinds = sorted({kind for run in runs for kind in metrics.error_rates(run.requests, run.window)})
    rows = []
    for users, group in group_by_users(runs).items():
        table, window = pooled(group)
        shown = metrics.within_limit(table, window, LIMIT_S)
        needed = {"over": "yes, P95 is above", "within": "yes, P95 is within"}.get(
            shown.verdict, f"no ({shown.needed} needed)"
        )
        rows.append((
            many(users), str(len(table)), interval(metrics.error_rate(table, window)),
            *(interval(metrics.error_rate(table, window, kind)) for kind in kinds), interval(slow_as_failed(group)),
            interval(_missed(table, window, LIMIT_S)), needed,
        ))  # fmt: skip
    columns = ("", "requests", "failed", *kinds, f"over {TIMEOUT_S:g} s or failed",
               f"over {LIMIT_S * 1e3:.0f} ms or failed", "enough requests to judge the P95?")  # fmt: skip
    return Table(columns, tuple(rows), "In small print: 95 % intervals (Wilson). Judged at 99 % confidence.")


def time_parts(runs: Sequence[Run]) -> pd.DataFrame:
    """For ``figures.time_breakdown``: the mean latency in its parts for each number of users."""
    rows = []
    for users, group in group_by_users(runs).items():
        parts = pd.DataFrame([waiting_and_work(run) for run in group]).mean()
        label = many(users)
        rows += [(label, part, float(seconds)) for part, seconds in parts.items()]
    return pd.DataFrame(rows, columns=["deployment", "part", "seconds"])


def pressure(run: Run) -> tuple[pd.DataFrame, list[tuple[str, str, str]]]:
    """Samples and rows for ``figures.timeline``: GPU where there is one, then CPU, run queue, memory, swap, engine.

    Bytes become GiB, under names that end in _gib.
    """
    samples = run.samples.copy()
    in_bytes = samples["name"].str.endswith("_bytes")
    samples.loc[in_bytes, "value"] /= 2**30
    samples["name"] = samples["name"].str.replace("_bytes", "_gib", regex=False)
    gpu = [("gpu", "utilisation", "GPU (%)"), ("gpu", "memory_used_gib", "GPU memory (GiB)")]
    rows = [
        ("host", "cpu", "CPU (%)"), ("host", "runnable", "run queue (tasks)"), ("host", "tree_rss_gib", "server (GiB)"),
        ("host", "swap_used_gib", "swap (GiB)"), ("engine", "running", "in a batch"), ("engine", "waiting", "waiting"),
    ]  # fmt: skip
    return samples, (gpu if (samples["probe"] == "gpu").any() else []) + rows


def operators_table(operators: pd.DataFrame, most: int = 10) -> Table:
    """The dearest operators of ``profiler.operators``."""
    dearest = operators[["op", "group", "calls", "self_s", "share"]].head(most)
    rows = [
        (str(op), str(group), str(calls), quantity(float(self_s), "s"), quantity(float(share), "share"))
        for op, group, calls, self_s, share in dearest.to_numpy()
    ]
    return Table(("operator", "kind", "calls", "own time", "share"), tuple(rows))


def padding_table(runs: Sequence[Run]) -> Table:
    """One row a number of users: batches, requests in them, tokens asked for, tokens computed, the share wasted."""
    rows = []
    for users, group in group_by_users(runs).items():
        table = pd.concat([batches(run) for run in group])
        asked, computed = float(table["asked"].sum()), float(table["computed"].sum())
        rows.append((
            many(users), str(len(table)), digits(float(table["requests"].mean())),
            digits(float(table["requests"].max())), digits(asked), digits(computed),
            quantity(computed / asked, "×"), quantity(1 - asked / computed, "share"),
        ))  # fmt: skip
    columns = ("", "batches", "requests a batch, mean", "largest batch", "tokens asked for", "tokens computed",
               "computed / asked", "wasted")  # fmt: skip
    return Table(columns, tuple(rows), "Tokens of prompts and answers; computed counts each row of a batch as long as "
                 "its longest prompt and longest answer.")  # fmt: skip


def rungs_frame(runs: Sequence[Run], metric: Callable[[pd.DataFrame, Window], Estimate]) -> pd.DataFrame:
    """For ``figures.ladder``: a metric of every rung, repeats pooled."""
    rows = []
    for name, group in runs_by_rung(runs).items():
        found = metric(*pooled(group))
        rows.append((name, found.value, found.low, found.high, found.unit))
    return pd.DataFrame(rows, columns=["rung", "value", "low", "high", "unit"])


def rungs_table(rungs: Sequence[Rung]) -> Table:
    """What each rung turns, and why."""
    rows = []
    for before, rung in zip([None, *rungs], rungs, strict=False):
        turned = before.deployment.differs_in(rung.deployment) if before else {}
        knobs = ", ".join(f"{name}: {here} → {there}" for name, (here, there) in turned.items())
        rows.append((rung.name, knobs or "the start", rung.why))
    return Table(("rung", "knobs turned", "why"), tuple(rows), numbers=False)


def steps_table(runs: Sequence[Run]) -> Table:
    """One row a rung: throughput against the rung before and against the first, and whether the answers are alike."""
    groups = runs_by_rung(runs)
    first = next(iter(groups.values()))
    rows, before = [], first
    for name, group in groups.items():
        step, whole = (compare(other, group, throughput_of) for other in (before, first))
        cells = ("–", "–", "–") if group is first else (
            interval_at(step.ratio), interval_at(whole.ratio), alike(whole)
        )  # fmt: skip
        accuracy = metrics.accuracy(*pooled(group))
        rows.append((name, *cells, f"{interval(accuracy)}", str(accuracy.n)))
        before = group
    columns = ("rung", "throughput against the rung before", "against the first rung", "same answers?",
               "right answers", "n")  # fmt: skip
    return Table(columns, tuple(rows), f"{machine_of(runs)}. Ratios of medians over the repeats, each with the "
                 "confidence that so many repeats attain; right answers with Wilson's 95 % interval.")  # fmt: skip


def alike(comparison: Comparison) -> str:
    """ "all 72", or how many answers differ, or came in one of the runs only."""
    common = sum(work.common for work in comparison.work)
    different = sum(len(work.different) for work in comparison.work)
    apart = sum(work.only_here + work.only_there for work in comparison.work)
    text = f"all {common}" if not different else f"{different} of {common} differ"
    return text + (f", {apart} in one run only" if apart else "")


def interval_at(estimate: Estimate) -> str:
    """``interval`` of a ratio with the confidence it attains."""
    unit = Estimate(estimate.value, estimate.low, estimate.high, estimate.n, "×", estimate.confidence)
    return f"{interval(unit)} at {estimate.confidence * 100:.0f} %" if math.isfinite(estimate.value) else "–"


def article_changes(runs: Sequence[Run]) -> list[Change]:
    """The article's five rows, first against last rung, and what was measured besides.

    Before and after are those of all repeats pooled; how many times better latency, throughput and first word got is
    the ratio of the medians of the repeats (``compare``), as in the headline.
    """
    groups = list(runs_by_rung(runs).values())
    first, last = groups[0], groups[-1]

    def pair(metric: Callable[[pd.DataFrame, Window], Estimate]) -> tuple[Estimate, Estimate]:
        return metric(*pooled(first)), metric(*pooled(last))

    def times(metric: Callable[[pd.DataFrame, Window], Estimate], here: list[Run], there: list[Run]) -> Estimate:
        ratio = compare(here, there, lambda run: metric(run.requests, run.window)).ratio
        return Estimate(ratio.value, ratio.low, ratio.high, ratio.n, "×", ratio.confidence)

    def p95(table: pd.DataFrame, window: Window) -> Estimate:
        return metrics.latency(table, window, 95)

    def first_word(table: pd.DataFrame, window: Window) -> Estimate:
        return metrics.ttft(table, window, 50)

    gpu = [_present(mean_sample(group, "gpu", "utilisation")) for group in (first, last)]
    cpu = [mean_sample(group, "host", "cpu") for group in (first, last)]
    return [
        Change("P95 latency", *pair(p95), claim="C34", gain=times(p95, last, first)),
        Change("throughput", *pair(metrics.throughput), claim="C35", gain=times(metrics.throughput, first, last)),
        Change(f"failed, or slower than {TIMEOUT_S:g} s", slow_as_failed(first), slow_as_failed(last), claim="C36"),
        Change("mean GPU utilisation", gpu[0], gpu[1], claim="C37"),
        Change("time to first token, P50", *pair(first_word), claim="C38", gain=times(first_word, last, first)),
        Change("failed", *pair(metrics.error_rate)),
        Change("mean CPU utilisation", cpu[0], cpu[1], gain=NONE),
    ]


def judge_changes(changes: Sequence[Change], runs: Sequence[Run]) -> list[Verdict]:
    """Verdicts of the changes that the article claims.

    None where runs are invalid or the answers differ; "partly" at best without a GPU or with fewer users than 300.
    """
    groups = list(runs_by_rung(runs).values())
    whole = compare(groups[0], groups[-1], throughput_of)
    spoilt = invalid(runs) or ("" if whole.fair else f"The answers are not the same: {alike(whole)}.")
    verdicts = []
    for change in changes:
        if change.claim is None:
            continue
        if change.before.n == 0:
            lacks = f"The {change.name} was not read here ({probe_text(groups[0][0], 'gpu')})"
            verdicts.append(not_testable(change.claim, lacks, "one NVIDIA GPU"))
        elif change.before.value == 0:
            lacks = f"{change.name}: none of {change.before.n} requests before, so there was nothing to improve"
            verdicts.append(not_testable(change.claim, lacks, "more users than the first rung can bear"))
        else:
            found = judge_ratio(change.claim, change.ratio, invalid=spoilt or None)
            shown = (Evidence.of("before", change.before), Evidence.of("after", change.after), *found.evidence)
            verdicts.append(_as_far_as_tested(replace(found, evidence=shown), runs))
    return verdicts


def gains_frame(changes: Sequence[Change]) -> pd.DataFrame:
    """For ``figures.gains``: the changes that the article claims and that were measured."""
    rows = []
    for change in changes:
        ratio = change.ratio
        if change.claim is not None and not math.isnan(ratio.value):
            rows.append((change.name, ratio.value, ratio.low, ratio.high, load_claims()[change.claim].gain))
    return pd.DataFrame(rows, columns=["metric", "value", "low", "high", "claimed"])


def headline(comparison: Comparison, runs: Sequence[Run]) -> Table:
    """The ratio of throughput between the ends of the ladder, and whether it may be believed."""
    names = list(runs_by_rung(runs))
    spread = [f"{digits(min(side))} to {digits(max(side))}" for side in (comparison.here, comparison.there)]
    row = (
        "answers per second", f"{digits(median(comparison.here))}\n{spread[0]}",
        f"{digits(median(comparison.there))}\n{spread[1]}", interval_at(comparison.ratio), alike(comparison),
    )  # fmt: skip
    caption = f"{machine_of(runs)}; {users_line(runs)}. Medians of the runs, their range in small print."
    if not comparison.fair:
        caption += " Not to be believed: " + "; ".join([*comparison.invalid, alike(comparison)])
    return Table(("", names[0], names[-1], "times more", "same answers?"), (row,), caption)


def results_takeaway(comparison: Comparison, runs: Sequence[Run]) -> str:
    """Two or three sentences of numbers, in Markdown."""
    groups = runs_by_rung(runs)
    first, last = (next(iter(groups)), list(groups)[-1])
    latency = [metrics.latency(*pooled(groups[name]), 95).value for name in (first, last)]
    words = [metrics.ttft(*pooled(groups[name]), 50).value for name in (first, last)]
    ratio = comparison.ratio
    steps = {name: median([throughput_of(run).value for run in group]) for name, group in groups.items()}
    pairs = list(zip(steps, list(steps)[1:], strict=False))
    largest = max(pairs, key=lambda pair: steps[pair[1]] / steps[pair[0]])[1] if pairs else first
    same = (
        "the same answers"
        if all(work.same for work in comparison.work)
        else f"not the same answers ({alike(comparison)})"
    )
    return (
        f"On this machine, with this model ({users_line(runs)}), *{last}* serves **{digits(ratio.value)} times** "
        f"as many requests per second as the service {first} (interval {digits(ratio.low)} to {digits(ratio.high)} at "
        f"{ratio.confidence * 100:.0f} % confidence), with {same}. P95 latency went from "
        f"{quantity(latency[0], 's')} to {quantity(latency[1], 's')}, the first word from {quantity(words[0], 's')} to "
        f"{quantity(words[1], 's')}. The largest step was *{largest}*."
    )


def baseline_takeaway(runs: Sequence[Run], operators: pd.DataFrame) -> str:
    """What adding users did to the first deployment, in numbers, in Markdown."""
    groups = group_by_users(runs)
    least, most = min(groups), max(groups)
    p95 = [metrics.latency(*pooled(groups[users]), 95).value for users in (least, most)]
    rate = [metrics.throughput(*pooled(groups[users])).value for users in (least, most)]
    wasted = pd.concat([batches(run) for run in groups[most]])
    share = 1 - float(wasted["asked"].sum()) / float(wasted["computed"].sum())
    parts = pd.DataFrame([waiting_and_work(run) for run in groups[most]]).mean()
    kinds = by_group(operators)
    return (
        f"From {least} to {most} users the P95 latency went from {quantity(p95[0], 's')} to {quantity(p95[1], 's')}, "
        f"while the throughput went from {quantity(rate[0], 'requests/s')} to {quantity(rate[1], 'requests/s')}. "
        f"With {most} users a request spent {quantity(float(parts['waiting for a batch']), 's')} waiting for a batch "
        f"and {quantity(float(parts['in a batch']), 's')} in one, and **{quantity(share, 'share')} of the tokens "
        f"computed were padding**. The dearest kind of operator was *{kinds['group'].iloc[0]}* "
        f"({quantity(float(kinds['share'].iloc[0]), 'share')} of a batch). Nothing in this deployment refuses work, so "
        "more users only make everybody's wait longer."
    )


def together(*tables: pd.DataFrame) -> pd.DataFrame:
    """Several tables for one figure."""
    return pd.concat(tables, ignore_index=True)


def verdicts_so_far(profile: str, root: Path) -> dict[str, tuple[str, Verdict]]:
    """Claim -> (notebook, verdict) of the notebooks executed with this profile, the one under way included."""
    shelf = Shelf.of(root.absolute(), profile)
    found = {verdict.claim: (name, verdict) for name in shelf.names() for verdict in shelf.verdicts(name)}
    if path := os.environ.get(VERDICTS_VARIABLE):
        found |= {verdict.claim: ("this one", verdict) for verdict in read_verdicts(path)}
    return found


def claims_table(found: Mapping[str, tuple[str, Verdict]]) -> Table:
    """All claims with their verdicts, or "no verdict yet"."""
    rows = []
    for name, stated in load_claims().items():
        where, verdict = found.get(name, ("–", None))
        rows.append(
            (
                name,
                stated.text,
                verdict.outcome.replace(" ", "\u00a0") if verdict else "no\u00a0verdict\u00a0yet",
                where,
            )
        )
    return Table(("claim", "what the article says", "verdict", "notebook"), tuple(rows), numbers=False)


def users_line(runs: Sequence[Run]) -> str:
    """ "8 users, 24 requests a run, 3 runs a rung"."""
    groups = runs_by_rung(runs)
    users, repeats = sorted({users_of(run) for run in runs}), len(next(iter(groups.values())))
    return (
        f"{', '.join(map(str, users))} users, {runs[0].manifest['workload']['requests']} requests a run, "
        f"{repeats} run{'s' if repeats > 1 else ''} a rung"
    )


def _missed(table: pd.DataFrame, window: Window, limit_s: float) -> Estimate:
    kept = metrics.attainment(table, window, SLO(latency_s=limit_s))
    return Estimate(1 - kept.value, 1 - kept.high, 1 - kept.low, kept.n, "share")


def _as_far_as_tested(verdict: Verdict, runs: Sequence[Run]) -> Verdict:
    users, gpu = max(map(users_of, runs)), bool(runs[0].manifest["machine"].get("gpus"))
    if verdict.outcome != "confirmed" or (gpu and users >= USERS):
        return verdict
    under = f"{users} users on a machine with{'' if gpu else 'out'} a GPU, not {USERS} users on one"
    reason = f"{verdict.reason} The gain is reached, but under {under}; the article's own values were not tested."
    return replace(verdict, outcome="partly", reason=reason)


def _present(found: Estimate) -> Estimate:
    return found if found.n else NONE
