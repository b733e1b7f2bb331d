"""How far behind its schedule a server sends tokens, when the engine computes nothing: the server's own overhead."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from labkit.bench.rows import Book, Row
from labkit.deployment import Deployment
from labkit.experiments.measure import running_server, serve_command
from labkit.experiments.network.caller import streams
from labkit.serving.extras import require_http3
from labkit.serving.schedule import Schedule
from labkit.traffic.target import TRANSPORTS, Target

STREAMS = 300
SCHEDULE = Schedule(ttft_ms=1000.0, itl_ms=20.0, tokens=250)
RAMP_S = 1.0
"""Over which the streams begin, so that their tokens are due at different times."""
STARVED = 0.05
"""Part of the time that a process was ready to run and had no core, from which on a note says so."""


@dataclass(frozen=True)
class Lateness:
    """Of all tokens of all streams: ms from when each was due to when the client had it; and what it took."""

    p50_ms: float
    p99_ms: float
    most_ms: float
    tokens: int
    failures: tuple[str, ...]
    server_us: float
    """CPU time of the server for a token."""
    client_us: float
    waited: float
    """Part of the run that the busiest thread of the server was ready and waited for a core."""

    def row(self, name: str, repeat: int) -> Row:
        if not self.tokens:
            return Row(WORKLOAD, name, note=self.failures[0] if self.failures else "no token came", repeat=repeat)
        figures = {
            "late P99 ms": self.p99_ms,
            "P50 ms": self.p50_ms,
            "most ms": self.most_ms,
            "server µs a token": self.server_us,
            "client µs a token": self.client_us,
            "of it waiting": self.waited,
        }
        notes = [f"{len(self.failures)} streams failed, such as: {self.failures[0]}"] if self.failures else []
        if self.waited > STARVED:
            notes.append("the server waited for a core")
        return Row(WORKLOAD, name, figures, "; ".join(notes), repeat)


WORKLOAD = f"serving, {STREAMS} streams of {1000 / SCHEDULE.itl_ms:g} tokens/s on schedule"


def measure_serving(
    deployment: Deployment, book: Book, say: Callable[[str], None], only: Sequence[str] = (), repeat: int = 3
) -> None:
    """Adds rows: lateness of the tokens over every transport, ``repeat`` times in turn. The client runs in this
    process. ``only``: transports whose name holds one of the words. Raises UserError for a server that does not start,
    and for HTTP/3 where its library is not installed.
    """
    transports = [name for name in TRANSPORTS if not only or any(word in name for word in only)]
    if "http/3" in transports:
        require_http3()
    for turn in range(repeat):
        for transport in transports[:: -1 if turn % 2 else 1]:
            found = lateness(dataclasses.replace(deployment, transport=transport))  # type: ignore[arg-type]
            say(f"serving, {transport}: {found.tokens} tokens, P99 {found.p99_ms:.1f} ms late")
            book.add(found.row(transport, turn))


def lateness(deployment: Deployment, streams: int = STREAMS, schedule: Schedule = SCHEDULE) -> Lateness:
    """Starts a server with ``schedule`` for an engine, and lets ``streams`` run. Raises UserError as ``running_server``
    does."""
    command = [*serve_command(deployment), "--schedule", str(schedule)]
    with tempfile.TemporaryDirectory(prefix="labkit-") as directory:
        log = Path(directory) / "server.log"
        with running_server(deployment, log, command=command) as server:
            target = Target.parse(server.url, transport=deployment.transport, cafile=server.cafile)
            return _run(target, server.process.pid, streams, schedule)


def _run(target: Target, pid: int, count: int, schedule: Schedule) -> Lateness:
    server = psutil.Process(pid)
    gc.collect()
    gc.disable()  # the client must not be what is late
    try:
        cpu, mine, waits, began = _cpu_s(server), time.process_time(), _waits_s(pid), time.perf_counter()
        found = asyncio.run(streams(target, count, schedule, RAMP_S))
        took = time.perf_counter() - began
        cpu, mine, later = _cpu_s(server) - cpu, time.process_time() - mine, _waits_s(pid)
    finally:
        gc.enable()
    tokens = max(len(found.late_ms), 1)
    p50, p99, most = np.percentile(found.late_ms, (50, 99, 100)) if found.late_ms else (0.0, 0.0, 0.0)
    return Lateness(
        float(p50), float(p99), float(most), len(found.late_ms), found.failures,
        cpu / tokens * 1e6, mine / tokens * 1e6,
        max((later[thread] - waits.get(thread, 0.0) for thread in later), default=0.0) / took,
    )  # fmt: skip


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _waits_s(pid: int) -> dict[str, float]:
    """Thread -> seconds that it was ready to run and had no core; empty where the system does not tell."""
    waits = {}
    for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            waits[thread.parent.name] = int(thread.read_text().split()[1]) / 1e9
        except (OSError, IndexError, ValueError):  # the thread ended, or the kernel does not count
            continue
    return waits
