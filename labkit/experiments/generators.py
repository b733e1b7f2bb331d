"""Load generators put to the test: what each says of a server, and what that server really did.

Three experiments, each against a golden server in a process of its own: faults of every kind, as many users at once as
the article had, and a server that freezes for a while. Behind them are the claims about the article's client (C04) and
about JMeter and Locust (C05).
"""

from __future__ import annotations

import math
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from labkit.errors import UserError
from labkit.experiments.claims import Evidence, Verdict, judge_facts, not_testable
from labkit.experiments.generator_tools import (
    ARTICLE,
    GENERATORS,
    JMETER,
    LABKIT,
    LOCUST,
    MODEL,
    Told,
    children_cpu_s,
    threads_client,
    told_of_threads,
)
from labkit.experiments.generator_truth import WHOLE, Truth, faulty_scripts, golden_process, takes_s, truth_of
from labkit.experiments.intervals import percentile, share
from labkit.experiments.metrics import requests_table
from labkit.traffic.generate import send_load
from labkit.traffic.golden_play import Script
from labkit.traffic.workload import ARTICLE_TIMEOUT_S, Workload

ONE_SECOND = Script(ttft_s=0.2, itl_s=0.08, tokens=11)
AGREES = 0.10
"""Numbers that differ by no more than this share agree."""
MIX_AGREES = 0.05
"""The same of the shares of a mix, in points: whoever stops by the clock stops in the middle of it."""
TOOLS_NEED = (
    "both installed (`make peer-jmeter peer-locust` puts them into .venv-peers, as `make test-peers` does) and a "
    "profile that runs them, cpu or h200"
)
SHOWS = 0.5
"""A freeze shows in a percentile that is at least this share of what users who come at a constant rate see."""


@dataclass(frozen=True)
class Measured:
    """One generator's run. ``told`` and ``truth`` are None where it could not run; ``absent`` says why.

    ``cpu_s`` is the CPU time of its processes, their start included.
    """

    tool: str
    told: Told | None = None
    truth: Truth | None = None
    cpu_s: float = math.nan
    absent: str = ""


@dataclass(frozen=True)
class Measurement:
    """The runs of one experiment, all with as many ``users`` and the same ``timeout_s``."""

    rows: tuple[Measured, ...]
    users: int
    timeout_s: float
    mix: tuple[tuple[str, float], ...]
    """What was to be asked: shares of the lengths of prompts."""

    def of(self, tool: str) -> Measured | None:
        """The generator's run, None where it did not run."""
        return next((row for row in self.rows if row.tool == tool and row.told is not None), None)

    def times_ideal(self, truth: Truth) -> float:
        """How many times longer a run of whole answers took than if all users had waited for the server alone."""
        return truth.span_s * self.users / math.fsum(truth.latencies)


@dataclass(frozen=True)
class Frozen:
    """Latencies (seconds) of a server that froze for ``freeze_s`` once. ``expected``: of constant arrivals, by
    arithmetic; ``scheduled`` and ``sent``: the open loop's, by either clock; ``closed``: the article's client."""

    freeze_s: float
    answer_s: float
    rate: float
    users: int
    expected: tuple[float, ...]
    scheduled: tuple[float, ...]
    sent: tuple[float, ...]
    closed: tuple[float, ...]


def measure_generators(
    tools: Sequence[str] = (LABKIT, ARTICLE),
    users: int = 20,
    requests: int = 60,
    timeout_s: float = ARTICLE_TIMEOUT_S,
    seed: int = 0,
) -> Measurement:
    """Every generator against whole answers and every kind of fault, see ``faulty_scripts``: 13 of 20 are whole.

    ``tools`` of GENERATORS. Whoever is not installed, or cannot run, is named with the reason. Raises UserError where
    one of our own fails.
    """
    workload = Workload.article(users=users, requests=requests, timeout_s=timeout_s, max_tokens=32, seed=seed)
    return _measure(tools, faulty_scripts(timeout_s), workload)


def measure_under_load(
    tools: Sequence[str] = (LABKIT, ARTICLE),
    users: int = 300,
    requests: int = 600,
    script: Script = ONE_SECOND,
    timeout_s: float = 30.0,
    seed: int = 0,
) -> Measurement:
    """Every generator with many users against whole answers that all take the same time; as ``measure_generators``.

    What they add to the server's own time, in latency and in all, is theirs. The timeout is long, so that it does not
    cut off what there is to see.
    """
    workload = Workload.article(users=users, requests=requests, timeout_s=timeout_s, max_tokens=32, seed=seed)
    return _measure(tools, (script,), workload)


def measure_freeze(
    rate: float = 20.0, seconds: float = 8.0, freeze_s: float = 2.0, users: int = 4, answer_s: float = 0.05
) -> Frozen:
    """Stops a server's process once, for ``freeze_s`` of about ``seconds``: under an open loop at a constant rate
    (ours), and under the article's client with ``users``, who wait for their answers and do not ask meanwhile.

    Raises ValueError where the freeze does not fit in, and UserError where it missed the run.
    """
    if not 0 < freeze_s < seconds / 2:
        raise ValueError(f"freeze_s must be above 0 and below half of the {seconds:g} s; got {freeze_s!r}")
    script, at_s = Script(ttft_s=answer_s, tokens=1), (seconds - freeze_s) / 3
    short = {"mix": {"short": 1.0}, "timeout_s": seconds + 30, "max_tokens": 32}
    with golden_process([script]) as server:
        freezing = _Freeze(server.pid, freeze_s)
        load = send_load(
            server.url, Workload(arrivals="constant", rate=rate, duration_s=seconds, **short), MODEL, processes=1,  # type: ignore[arg-type]
            progress=lambda now: freezing.begin() if now.elapsed_s >= at_s else None,
        )  # fmt: skip
        began_s = freezing.end() - load.zero
    table = requests_table(load.events)
    asked = math.ceil(users * (seconds - freeze_s) / answer_s)
    closed = Workload(users=users, requests=asked, **short)  # type: ignore[arg-type]
    with golden_process([script]) as server:
        freezing = _Freeze(server.pid, freeze_s)
        with threads_client(server.url, closed, seconds) as found:
            time.sleep(at_s)
            freezing.begin()
            told = told_of_threads(found(), closed)
        freezing.end()
    scheduled, sent = tuple(table["end"] - table["scheduled"]), tuple(table["end"] - table["sent"])
    for latencies in (scheduled, told.latencies):
        if max(latencies, default=0.0) < 0.9 * freeze_s:
            raise UserError("the freeze fell outside of the run; is the machine overloaded?")
    expected = expected_latencies(table["scheduled"], began_s, freeze_s, answer_s)
    return Frozen(freeze_s, answer_s, rate, users, expected, scheduled, sent, told.latencies)


def expected_latencies(
    arrivals: Iterable[float], began_s: float, freeze_s: float, answer_s: float
) -> tuple[float, ...]:
    """How long requests take that arrive at these times, when the server stands still from ``began_s`` on for
    ``freeze_s`` and otherwise takes ``answer_s`` for an answer, for any number at once. Seconds."""
    over_s, latencies = began_s + freeze_s, []
    for arrival in arrivals:
        if began_s <= arrival < over_s:
            latencies.append(over_s - arrival + answer_s)
        else:
            overtaken = arrival < began_s < arrival + answer_s
            latencies.append(over_s - arrival if overtaken else answer_s)
    return tuple(latencies)


def judge_client(faults: Measurement, load: Measurement, frozen: Frozen) -> Verdict:
    """C04: whether the article's client gets right what it counts, against the log of the server it measured."""
    row, loaded = faults.of(ARTICLE), load.of(ARTICLE)
    if row is None or loaded is None:
        raise ValueError(f"both measurements need {ARTICLE!r} among their tools")
    told, truth = _both(row)
    busy = load.times_ideal(_both(loaded)[1]) <= 1 + AGREES
    wanted, seen = percentile(frozen.expected, 95, "s"), percentile(frozen.closed, 95, "s")
    facts = {
        "its successes are the whole answers": told.success == truth.outcomes[WHOLE],
        "truncated streams are noticed": _counts(row, "truncated"),
        "answers of HTTP 500 are counted": _counts(row, "5xx"),
        "errors inside a 200 are counted": _counts(row, "stream_error"),
        f"answers slower than {faults.timeout_s:g} s are counted as timeouts": _counts(row, "timeout"),
        f"at {load.users} users its P50 and P95 are within {AGREES:.0%} of the server's": _same_latency(loaded),
        f"it keeps {load.users} users busy (its run takes at most {AGREES:.0%} longer than the server)": busy,
        f"a freeze of {frozen.freeze_s:g} s shows in its P95": seen.value >= SHOWS * wanted.value,
    }
    taken, missing = max(0, told.success - truth.outcomes[WHOLE]), max(0, truth.requests - told.requests)
    evidence = (
        Evidence.of("its successes that were none", share(taken, told.success)),
        Evidence.of("requests in none of its counts", share(missing, truth.requests)),
        *_latencies(loaded, f"{load.users} users"),
        Evidence.of("freeze: P95 of constant arrivals", wanted),
        Evidence.of("freeze: P95 that it sees", seen),
    )
    return judge_facts("C04", facts, evidence)


def judge_tools(faults: Measurement, load: Measurement) -> Verdict:
    """C05: whether JMeter and Locust send the article's mix, and say of it what the server's log says. What did not run
    is not observable."""
    rows = {tool: (faults.of(tool), load.of(tool)) for tool in (JMETER, LOCUST)}
    if not any(row for pair in rows.values() for row in pair):
        return not_testable("C05", "Neither JMeter nor Locust ran", TOOLS_NEED)
    facts: dict[str, bool | None] = {}
    evidence: list[Evidence] = []
    for tool, (row, loaded) in rows.items():
        counts = f"{tool} counts requests and successes within {AGREES:.0%} of the server's log"
        times = f"{tool}'s P50 and P95 at {load.users} users are within {AGREES:.0%} of it"
        facts[f"{tool} asks in the article's mix"] = None if row is None else _in_mix(row, faults)
        facts[counts] = None if row is None else _same_count(row)
        facts[times] = None if loaded is None else _same_latency(loaded)
        if loaded is not None:
            evidence += _latencies(loaded, tool)
    verdict = judge_facts("C05", facts, evidence)
    if None not in facts.values():
        return verdict
    return replace(verdict, reason=f"{verdict.reason} To observe all of it takes {TOOLS_NEED}.")


def agree(said: float, true: float) -> bool:
    """Whether two numbers are within AGREES of each other."""
    return abs(said - true) <= AGREES * abs(true)


def _measure(tools: Sequence[str], scripts: Sequence[Script], workload: Workload) -> Measurement:
    if unknown := set(tools) - set(GENERATORS):
        raise ValueError(f"no such generator: {', '.join(sorted(unknown))}; there are {', '.join(GENERATORS)}")
    takes = [min(takes_s(script), workload.timeout_s) for script in scripts]
    seconds = max(*takes, 0.0, statistics.fmean(takes) * (workload.requests or 0) / workload.users)
    rows = tuple(_run(tool, scripts, workload, seconds) for tool in tools)
    return Measurement(rows, workload.users, workload.timeout_s, workload.mix)


def _run(tool: str, scripts: Sequence[Script], workload: Workload, seconds: float) -> Measured:
    with tempfile.TemporaryDirectory(prefix="labkit-") as folder:
        try:
            with golden_process(scripts) as server:
                before = children_cpu_s()
                told = GENERATORS[tool](server.url, workload, seconds, Path(folder))
                used = children_cpu_s() - before
        except UserError as error:
            if tool in (LABKIT, ARTICLE):
                raise
            return Measured(tool, absent=str(error))
    return Measured(tool, told, truth_of(server.log, scripts, workload.timeout_s), used)


class _Freeze:
    """Stops a process and lets it go on. A shell of its own does it, so that nothing is left standing if we end."""

    def __init__(self, pid: int, seconds: float) -> None:
        self._command = f"kill -STOP {pid}; sleep {seconds:g}; kill -CONT {pid}"
        self._shell: subprocess.Popen[bytes] | None = None
        self._began = math.nan

    def begin(self) -> None:
        """The second call does nothing."""
        if self._shell is None:
            self._began = time.perf_counter()
            self._shell = subprocess.Popen(["sh", "-c", self._command], start_new_session=True)

    def end(self) -> float:
        """Waits for it; when it began, on ``time.perf_counter``. Raises UserError if it never did."""
        if self._shell is None:
            raise UserError("the server was to freeze, and the run was over before; is the machine overloaded?")
        self._shell.wait()
        return self._began


def _both(row: Measured) -> tuple[Told, Truth]:
    assert row.told is not None and row.truth is not None, "it ran"
    return row.told, row.truth


def _counts(row: Measured, kind: str) -> bool:
    told, truth = _both(row)
    return told.failures.get(kind, 0) == truth.outcomes[kind]


def _same_count(row: Measured) -> bool:
    told, truth = _both(row)
    return agree(told.requests, truth.requests) and agree(told.success, truth.outcomes[WHOLE])


def _same_latency(row: Measured) -> bool:
    told, truth = _both(row)
    return all(agree(told.latency(q).value, truth.latency(q).value) for q in (50, 95))


def _in_mix(row: Measured, measurement: Measurement) -> bool:
    told, _ = _both(row)
    asked = sum(told.mix.values())
    return asked > 0 and all(
        abs(told.mix.get(bucket, 0) / asked - part) <= MIX_AGREES for bucket, part in measurement.mix
    )


def _latencies(row: Measured, name: str) -> tuple[Evidence, Evidence]:
    told, truth = _both(row)
    said = Evidence.of(f"{name}: P95 it says", told.latency(95))
    return said, Evidence.of(f"{name}: P95 by the server's log", truth.latency(95))
