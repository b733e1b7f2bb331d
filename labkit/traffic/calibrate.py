"""Is the client fast enough? Its own part in what it measured, by calibration and by what was seen during the run."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from labkit.errors import UserError
from labkit.traffic.generate import Load, processes_needed, send_load
from labkit.traffic.golden_play import Script
from labkit.traffic.target import Connections, Transport, connections_of
from labkit.traffic.workload import Workload, schedule

MOST_ADDED = 0.15
"""A client that adds more than this share to the answers' time was the bottleneck."""
MOST_CPU = 0.85
"""A client process that used more of a core than this had no time to spare."""
LEAST_LAG_S = 0.02
MOST_LAG = 0.10
"""The 99th percentile of the event loop's lag, and the 95th of sends behind schedule, may reach this share of the
median latency, or LEAST_LAG_S if that is more."""

CALIBRATION_S = 3.0
"""About how long a calibration may take."""


@dataclass(frozen=True)
class Calibration:
    """What the client adds to answers of known timing, at the concurrency of the workload. Times in seconds."""

    requests: int
    scripted_s: float
    """How long each answer takes, by script."""
    added_p50_s: float
    added_p95_s: float
    """(ended − sent) at the client minus (ended − received) at the server."""
    added_share: float
    """added_p95_s / the server's own time."""
    server_late_p95_s: float
    """How late the server itself was behind its script; not the client's doing."""
    failures: int

    def reasons(self) -> list[str]:
        found = []
        if self.server_late_p95_s > max(LEAST_LAG_S, MOST_ADDED * self.scripted_s):
            # What the server sends late the client cannot have on time, and the machine had no time for either.
            found.append(
                f"the server of known timing was itself {self.server_late_p95_s * 1e3:.0f} ms behind its script (P95), "
                "so nothing is known of the client; is the machine busy with something else?"
            )
        elif self.added_share > MOST_ADDED:
            found.append(f"the client adds {self.added_share:.0%} to answers of known timing (limit {MOST_ADDED:.0%})")
        if self.failures:
            found.append(f"{self.failures} of {self.requests} requests failed against a server that cannot fail")
        return found


def calibrate(
    workload: Workload,
    script: Script,
    processes: int | None = None,
    transport: Transport = "http/1.1",
    connections: Connections | None = None,
) -> Calibration:
    """Sends ``workload`` for about CALIBRATION_S at a golden server that plays ``script``, in a process of its own.

    Over ``transport`` and ``connections``, as the run that is to be judged. Streams that wait for each other because
    HTTP/1.1 has fewer connections than there are streams are the knob's doing, not the client's: there are then as
    many users as connections.
    """
    shared = connections_of(transport, connections)
    processes = processes or processes_needed(workload, shared)
    takes_s = script.ttft_s + (script.tokens - 1) * script.itl_s
    if not workload.open_loop and transport.startswith("http/1.1") and isinstance(shared, int):
        workload = workload.but(users=min(workload.users, shared))
    changes: dict[str, Any] = {"arrivals": "constant" if workload.open_loop else "closed", "trace": None, "cv": 1.0}
    if workload.open_loop:
        rate = workload.rate if workload.trace is None else _trace_rate(workload)
        changes |= {"rate": rate, "requests": max(20, min(math.ceil(rate * CALIBRATION_S), 5000))}
    else:
        rounds = max(1, min(3, math.floor(CALIBRATION_S / max(takes_s, 0.05))))
        changes |= {"requests": max(20, workload.users * rounds), "think_s": 0.0}
    short = workload.but(
        **changes,
        duration_s=None,
        ramp_s=0.0,
        warmup_s=0.0,
        timeout_s=max(30.0, 4 * takes_s),
        stream=True,
        max_tokens=script.tokens,
    )
    with tempfile.TemporaryDirectory(prefix="labkit-") as directory:
        log = Path(directory) / "golden.jsonl"
        command = [sys.executable, "-m", "labkit.traffic.golden", "--script", json.dumps([asdict(script)])]
        command += ["--log", str(log), "--transport", transport]
        server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )  # fmt: skip
        assert server.stdin is not None and server.stdout is not None
        try:
            ready = re.match(r"ready on (\S+)(?: \(certificate: (.+)\))?\n", server.stdout.readline())
            if ready is None:
                raise UserError("the calibration server did not start")
            load = send_load(
                ready[1], short, "golden", processes=processes, transport=transport,
                connections=shared, cafile=ready[2],
            )  # fmt: skip
            server.stdin.close()
            server.wait(timeout=30)
        finally:
            server.kill()
            server.wait()
        answered = {int(row["request_id"]): row for row in map(json.loads, log.read_text().splitlines())}
    return _compare(load.events, answered, takes_s)


def script_like(events: pd.DataFrame) -> Script:
    """A script with about the timing of the whole answers in ``events``, cut to what a calibration has time for."""
    done = events[events["kind"] == "done"]
    if done.empty:
        return Script(ttft_s=0.1, itl_s=0.01, tokens=20)
    times = events[events["request"].isin(done["request"])].groupby(["request", "kind"])["t_s"]
    first, last = times.min().unstack(), times.max().unstack()
    chunks = events[events["kind"] == "chunk"].groupby("request").size()
    per_answer = max(1, round(float(chunks.median()))) if len(chunks) else 1
    ttft = float((first["chunk"] - first["sent"]).median()) if "chunk" in first else 0.1
    spread = float((last["chunk"] - first["chunk"]).median()) if "chunk" in first else 0.0
    itl = spread / (per_answer - 1) if per_answer > 1 else 0.0
    ttft = min(max(ttft, 0.01), 0.5)
    tokens = min(per_answer, 1 + math.floor((CALIBRATION_S / 2 - ttft) / itl)) if itl > 0 else min(per_answer, 100)
    return Script(ttft_s=ttft, itl_s=itl, tokens=max(1, tokens))


def client_reasons(load: Load, workload: Workload, calibration: Calibration | None) -> list[str]:
    """Why the client, not the server, may have set what was measured; empty when it was out of the way."""
    reasons = calibration.reasons() if calibration is not None else []
    facts = client_facts(load)
    limit = max(LEAST_LAG_S, MOST_LAG * facts["latency_p50_s"]) if facts["latency_p50_s"] else LEAST_LAG_S
    if facts["loop_lag_p99_s"] > limit:
        reasons.append(
            f"the client's event loop ran {facts['loop_lag_p99_s'] * 1e3:.0f} ms late (P99; limit {limit * 1e3:.0f} ms)"
        )
    if workload.open_loop and facts["send_lag_p95_s"] > limit:
        reasons.append(
            f"requests were sent {facts['send_lag_p95_s'] * 1e3:.0f} ms late (P95; limit {limit * 1e3:.0f} ms)"
        )
    if facts["cpu_share_most"] > MOST_CPU:
        reasons.append(
            f"a client process used {facts['cpu_share_most']:.0%} of a core (limit {MOST_CPU:.0%}); use more processes"
        )
    return reasons


def client_facts(load: Load) -> dict[str, float]:
    """For the manifest: processes, lags in seconds (of the event loops, of sends behind schedule), CPU, median
    latency."""
    of = {kind: part.groupby("request")["t_s"].first() for kind, part in load.events.groupby("kind")}
    late = (of["sent"] - of["scheduled"]).dropna() if "sent" in of else pd.Series(dtype=float)
    latency = (of["done"] - of["scheduled"]).dropna() if "done" in of else pd.Series(dtype=float)
    return {
        "processes": len(load.cpu_shares),
        "loop_lag_p99_s": _quantile(load.lags, 0.99),
        "loop_lag_max_s": max(load.lags, default=0.0),
        "send_lag_p95_s": _quantile(late, 0.95),
        "send_lag_max_s": float(late.max()) if len(late) else 0.0,
        "cpu_share_most": max(load.cpu_shares, default=0.0),
        "latency_p50_s": _quantile(latency, 0.5),
    }


def audit_arrivals(load_events: pd.DataFrame, workload: Workload) -> dict[str, Any]:
    """What was to be sent and what was: counts, and for gaps between sends CV and index of dispersion, intended and
    actual.

    The index of dispersion is variance / mean of the counts in windows of ten mean gaps: 1 for Poisson, near 0 for
    constant.
    """
    sent = np.sort(load_events.loc[load_events["kind"] == "sent", "t_s"].to_numpy(dtype=float))
    audit: dict[str, Any] = {"sent": len(sent), "actual": gap_statistics(sent)}
    if workload.open_loop:
        intended = np.array([arrival.t_s for arrival in schedule(workload)], dtype=float)
        audit |= {"intended": len(intended), "dropped": len(intended) - len(sent), "schedule": gap_statistics(intended)}
    return audit


def gap_statistics(times: np.ndarray) -> dict[str, float | None]:
    """``cv`` of the gaps and ``dispersion`` of the counts of sorted times [n]; None with too few of them."""
    if len(times) < 3 or times[-1] <= times[0]:
        return {"cv": None, "dispersion": None}
    gaps = np.diff(times)
    bins = math.floor(len(gaps) / 10)
    dispersion = None
    if bins >= 5:
        counts, _ = np.histogram(times, bins=np.linspace(times[0], times[-1], bins + 1))
        dispersion = float(counts.var(ddof=1) / counts.mean())
    return {"cv": float(gaps.std() / gaps.mean()), "dispersion": dispersion}


def _compare(events: pd.DataFrame, answered: dict[int, dict[str, Any]], takes_s: float) -> Calibration:
    sent, done = (
        events[events["kind"] == kind].groupby("request")["t_s"].first().to_dict() for kind in ("sent", "done")
    )
    added, own, late = [], [], []
    for request, row in answered.items():
        if row["ended"] is not None and request in done:
            server_s = row["ended"] - row["received"]
            added.append(float(done[request]) - float(sent[request]) - server_s)
            own.append(server_s)
            late += [at - due for due, at in row["sends"]]
    p95 = _quantile(added, 0.95)
    return Calibration(
        requests=len(sent),
        scripted_s=takes_s,
        added_p50_s=_quantile(added, 0.5),
        added_p95_s=p95,
        added_share=p95 / max(_quantile(own, 0.5), 1e-3),
        server_late_p95_s=_quantile(late, 0.95),
        failures=len(sent) - len(added),
    )


def _quantile(values: Sequence[float] | pd.Series, q: float) -> float:
    return float(np.quantile(np.asarray(values, dtype=float), q)) if len(values) else 0.0


def _trace_rate(workload: Workload) -> float:
    times = [arrival.t_s or 0.0 for arrival in schedule(workload)]
    return max(1.0, (len(times) - 1) / max(times[-1] - times[0], 1e-3)) if len(times) > 1 else 1.0
