"""The rules for claims that no general rule of ``claims`` fits: the first deployment and its collapse."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from labkit.experiments import metrics
from labkit.experiments.anatomy import batches, pooled, users_of
from labkit.experiments.claims import (
    TIMEOUT_S,
    USERS,
    Evidence,
    Verdict,
    claim,
    judge_facts,
    not_testable,
)
from labkit.experiments.intervals import Estimate, bootstrap, percentile, share
from labkit.experiments.metrics import SLO
from labkit.experiments.store import Run
from labkit.probes.sampler import series

LIMIT_S = 0.8
FOUR_HOURS_S = 4 * 3600.0
MINUTE_27_S = 27 * 60.0
MIX = (("short", 0, 511, 0.6), ("medium", 512, 2047, 0.3), ("long", 2048, math.inf, 0.1))
LOW, HIGH = 10.0, 90.0
"""A sawtooth falls to LOW % or less and rises to HIGH % or more, again and again."""
SWINGS = 3
NEEDS_GPU = "one NVIDIA GPU, batches of 32, and weights of the size the bank used"


def slow_as_failed(runs: Sequence[Run], limit_s: float = TIMEOUT_S) -> Estimate:
    """Requests that failed or took longer than ``limit_s`` / all requests: the error rate of a client that gives up
    after that time. (Giving up would also have spared the service work, so it is not quite what such a client sees.)
    """
    table, window = pooled(runs)
    kept = metrics.attainment(table, window, SLO(latency_s=limit_s))
    return Estimate(1 - kept.value, 1 - kept.high, 1 - kept.low, kept.n, "share", kept.confidence)


def judge_service_level(runs: Sequence[Run]) -> Verdict:
    """C01, from the runs with the most users: refuted when the limit is broken on a GPU by 300 users or fewer,
    confirmed when 300 users over 4 hours stay within it; on another machine, or in less time, not testable."""
    if reason := invalid(runs):
        return Verdict("C01", "no verdict", reason)
    most = max(map(users_of, runs))
    table, window = pooled([run for run in runs if users_of(run) == most])
    shown = metrics.within_limit(table, window, LIMIT_S)
    p95 = Evidence.of(f"P95 latency, {most} users", metrics.latency(table, window, 95))
    said = (
        f"{shown.misses} of {shown.n} requests of {most} users failed or took more than {LIMIT_S * 1e3:.0f} ms, "
        + {
            "over": "so the P95 is above the limit (99 % confidence)",
            "within": "so the P95 is within the limit (99 % confidence)",
            "undecided": f"which decides nothing about the P95 ({shown.needed} requests would)",
        }[shown.verdict]
    )
    lasted = window[1] - window[0]
    gpu = bool(runs[0].manifest["machine"].get("gpus"))
    if shown.verdict == "over" and gpu:
        return Verdict("C01", "refuted", f"{_sentence(said)}.", (p95,))
    if shown.verdict == "within" and gpu and most >= USERS and lasted >= FOUR_HOURS_S:
        return Verdict("C01", "confirmed", f"{_sentence(said)}, for {lasted / 3600:.1f} hours.", (p95,))
    lacks = [] if gpu else ["this machine has no GPU"]
    lacks += [] if most >= USERS else [f"there were at most {most} users"]
    lacks += [] if lasted >= FOUR_HOURS_S else [f"the traffic lasted {lasted / 60:.1f} minutes and not 4 hours"]
    needs = f"a GPU, {USERS} users, and a soak of 4 hours"
    verdict = not_testable("C01", f"{_sentence(', '.join(lacks))}. {_sentence(said)}", needs)
    return Verdict("C01", verdict.outcome, verdict.reason, (p95,))


def judge_collapse(runs: Sequence[Run]) -> Verdict:
    """C02, from the runs of the deployment as first deployed: what of the collapse was seen, and when."""
    most = [run for run in runs if users_of(run) == max(map(users_of, runs))]
    gpu = bool(runs[0].manifest["machine"].get("gpus"))
    waiting, cpu = mean_sample(most, "engine", "waiting"), mean_sample(most, "host", "cpu")
    queues = np.concatenate([inside(run, "engine", "waiting") for run in most])
    died = any(run.manifest.get("server", {}).get("died") for run in runs)
    lasted = max(run.window[1] - run.window[0] for run in runs)
    said = " ".join(" ".join(run.manifest.get("server", {}).get("last_lines", [])) for run in runs).lower()
    failures = any((run.requests["failure"] == "5xx").any() for run in runs)
    facts: dict[str, bool | None] = {
        "requests pile up (somebody waits for a batch most of the time)": (
            bool((queues > 0).mean() > 0.5) if len(queues) else None
        ),
        "the CPU is at 98 %": None if math.isnan(cpu.value) else cpu.high >= 98,
        "the GPU runs out of memory (needs a GPU)": ("out of memory" in said or failures) if gpu else None,
        "the service goes down": died,
        f"it does so in minute 27 (needs a run of half an hour; the longest took {lasted / 60:.1f} min)": (
            died if lasted >= MINUTE_27_S or died else None
        ),
    }
    shown = [Evidence.of("requests waiting for a batch, mean", waiting), Evidence.of("CPU in use, mean", cpu)]
    return judge_facts("C02", facts, [item for item in shown if not math.isnan(item.value)], invalid(runs))


def judge_mix(runs: Sequence[Run]) -> Verdict:
    """C03: are the prompts that the server counted spread as the article says? What the bank's users really sent is
    in no log of ours."""
    table, window = pooled(runs)
    lengths = table["prompt_tokens"][table["failure"] == ""]
    facts: dict[str, bool | None] = {}
    shown = []
    for name, low, high, claimed in MIX:
        hits = int(((lengths >= low) & (lengths <= high)).sum())
        found = share(hits, len(lengths))
        shown.append(Evidence.of(f"{name} prompts sent, claimed {claimed * 100:.0f} %", found))
        facts[f"{name} prompts are {claimed * 100:.0f} % of what is sent here"] = found.low <= claimed <= found.high
    facts["the bank's users send this mix (needs the bank's log)"] = None
    return judge_facts("C03", facts, shown)


def judge_sawtooth(runs: Sequence[Run]) -> Verdict:
    """C06 from the GPU's utilisation in the runs with the most users."""
    most = [run for run in runs if users_of(run) == max(map(users_of, runs))]
    values = np.concatenate([inside(run, "gpu", "utilisation") for run in most])
    if not len(values):
        return not_testable("C06", f"No GPU was read here ({probe_text(most[0], 'gpu')})", "one NVIDIA GPU")
    count = sum(swings(inside(run, "gpu", "utilisation")) for run in most)
    shown = [
        Evidence(f"falls from {HIGH:.0f} % or more to {LOW:.0f} % or less", count, count, count, len(values), ""),
        Evidence("highest reading", values.max(), values.max(), values.max(), len(values), "%"),
        Evidence("lowest reading", values.min(), values.min(), values.min(), len(values), "%"),
    ]
    facts: dict[str, bool | None] = {
        f"it rises to {HIGH:.0f} % or more": bool((values >= HIGH).any()),
        f"it falls to {LOW:.0f} % or less": bool((values <= LOW).any()),
        f"it swings between the two at least {SWINGS} times": count >= SWINGS,
    }
    return judge_facts("C06", facts, shown, invalid(most))


def judge_pressure(runs: Sequence[Run]) -> Verdict:
    """C07 from the host's probe in the runs with the most users."""
    most = [run for run in runs if users_of(run) == max(map(users_of, runs))]
    queue = np.concatenate([inside(run, "host", "runnable") for run in most])
    stated = claim("C07").value or 0.0
    facts: dict[str, bool | None] = {
        f"the run queue stays above {stated:g} (95 % of the readings)": (
            bool((queue > stated).mean() >= 0.95) if len(queue) else None
        )
    }
    swapped = [np.ptp(inside(run, "host", name)) for run in most for name in ("swap_in_bytes", "swap_out_bytes")
               if len(inside(run, "host", name))]  # fmt: skip
    space = max((float(inside(run, "host", "swap_total_bytes").max(initial=0.0)) for run in most), default=0.0)
    facts["memory swaps" if space else "memory swaps (this machine has no swap space)"] = (
        bool(max(swapped) > 0) if swapped and space else None
    )
    shown = [Evidence.of("run queue, median", percentile(queue, 50, "tasks"))] if len(queue) else []
    if swapped and space:
        total = float(sum(swapped))
        shown.append(Evidence("swapped in and out", total, total, total, len(swapped), "bytes"))
    return judge_facts("C07", facts, shown, invalid(most))


def judge_batch(runs: Sequence[Run]) -> Verdict:
    """C08 from the runs with the most users: how long the largest batches took, how many would fit into the GPU."""
    most = [run for run in runs if users_of(run) == max(map(users_of, runs))]
    tables = [batches(run).assign(seconds=lambda table: table["end_s"].diff()) for run in most]
    table = pd.concat(tables)
    size = int(table["requests"].max())
    seconds = bootstrap(table[table["requests"] == size]["seconds"].dropna(), "s")
    shown = (Evidence.of(f"one pass of a batch of {size}, prompts and answers", seconds),) if seconds.n else ()
    peak = max((float(inside(run, "gpu", "memory_used_bytes").max(initial=0.0)) for run in most), default=0.0)
    total = max((float(inside(run, "gpu", "memory_total_bytes").max(initial=0.0)) for run in most), default=0.0)
    if not peak:
        lacks = f"No GPU was read here ({probe_text(most[0], 'gpu')}), and the largest batch was of {size}"
        return Verdict("C08", "not testable here", not_testable("C08", lacks, NEEDS_GPU).reason, shown)
    stated, full = claim("C08").value or 0.0, size >= 32 and seconds.n > 0
    facts: dict[str, bool | None] = {
        f"a batch of 32 takes {stated:g} s (± 10 %)": (
            seconds.low <= stated * 1.1 and seconds.high >= stated * 0.9 if full else None
        ),
        "exactly two such batches fit in GPU memory": math.floor(total / peak) == 2 if full else None,
    }
    return judge_facts("C08", facts, shown, invalid(most))


def invalid(runs: Sequence[Run]) -> str | None:
    """Why no verdict may rest on these runs, or None."""
    reasons = [reason for run in runs if not run.valid for reason in run.manifest.get("reasons", ())]
    return f"{_sentence('; '.join(dict.fromkeys(reasons)))}." if reasons else None


def swings(values: Sequence[float] | np.ndarray, low: float = LOW, high: float = HIGH) -> int:
    """How often a series falls from ``high`` or more to ``low`` or less."""
    count, up = 0, False
    for value in values:
        if value >= high:
            up = True
        elif value <= low and up:
            count, up = count + 1, False
    return count


def mean_sample(runs: Sequence[Run], probe: str, name: str) -> Estimate:
    """Mean of a probe's readings in the measured windows, with an interval over ten equal parts of each window (the
    readings of one part are not independent)."""
    unit = {"cpu": "%", "utilisation": "%", "tree_cpu": "%"}.get(name, "")
    parts = [part.mean() for run in runs for part in np.array_split(inside(run, probe, name), 10) if len(part)]
    return bootstrap(parts, unit)


def inside(run: Run, probe: str, name: str) -> np.ndarray:
    """A probe's readings in the measured window: float64 [readings], empty when there are none."""
    found = series(run.samples, probe, name)
    chosen = found[(found["t_s"] >= run.window[0]) & (found["t_s"] <= run.window[1])]
    return chosen["value"].to_numpy(dtype=float)


def probe_text(run: Run, probe: str) -> str:
    """What the manifest says about a probe, such as "absent: NVML Shared Library Not Found"."""
    probes: Mapping[str, Mapping[str, str]] = run.manifest.get("probes", {}).get("probes", {})
    return str(probes.get(probe, {}).get("description", "not read"))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
