"""Sending a workload: client processes, their progress, and what they recorded."""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from labkit.errors import UserError
from labkit.traffic.ask import server_model
from labkit.traffic.events import events_table, read_spool
from labkit.traffic.target import Connections, Target, Transport
from labkit.traffic.worker import Order
from labkit.traffic.workload import Workload, schedule

CHUNKS_A_SECOND = 20_000
"""Chunks that one client process reads in a second with time to spare (parsing alone: about 50,000 on one core)."""

STREAM_CHUNKS_A_SECOND = 100
"""How fast one closed-loop user's stream is assumed to come when the number of processes is chosen."""

MOST_PROCESSES = 256
START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Progress:
    """How far a run is. ``p95_s`` is the latency from scheduled time so far, NaN before the first answer."""

    elapsed_s: float
    sent: int
    ended: int
    failed: int
    p95_s: float
    left_s: float

    @property
    def in_flight(self) -> int:
        return self.sent - self.ended


@dataclass(frozen=True)
class Load:
    """What a client saw of one run. ``window`` bounds the measured part, in the time of ``events``.

    ``zero`` is the start of the run on ``time.perf_counter``; ``lags`` is how late the clients' event loops were (s),
    ``cpu_shares`` the part of a core that each process used, ``cut`` why the run was stopped early (or empty),
    ``transport`` and ``connections`` what the streams went over.
    """

    model: str
    events: pd.DataFrame
    window: tuple[float, float]
    zero: float
    started_at: float
    lags: tuple[float, ...]
    cpu_shares: tuple[float, ...]
    cut: str = ""
    transport: Transport = "http/1.1"
    connections: Connections = "each"


def run_load(url: str, workload: Workload, model: str | None = None, **options: Any) -> pd.DataFrame:
    """Sends ``workload`` to ``url`` and returns the events (see labkit.traffic.events). Options as for
    ``send_load``."""
    return send_load(url, workload, model, **options).events


def send_load(
    url: str,
    workload: Workload,
    model: str | None = None,
    *,
    api_key: str | None = None,
    transport: str | None = None,
    connections: Connections | None = None,
    cafile: str | None = None,
    processes: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], str] | None = None,
    spool: Path | None = None,
) -> Load:
    """Sends ``workload`` to the server at ``url``.

    ``model`` None takes the server's first. ``transport``, ``connections`` and ``cafile``: see
    labkit.traffic.target; None takes what the address says. ``processes`` None starts as many client processes as the
    traffic needs, but never more than there are connections to share.
    ``stop`` is asked four times a second and ends the run when it gives a reason. ``spool`` keeps the records in that
    directory while the run lasts (default: a temporary one). Raises UserError when no server answers at ``url`` or a
    client process fails.
    """
    target = Target.parse(url, api_key, transport, connections, cafile).settled()
    assert target.transport != "alpn"
    if model is None:
        model = server_model(target)
    processes = _processes(workload, processes, target.shared_by)
    with tempfile.TemporaryDirectory(prefix="labkit-") as temporary:
        directory = spool or Path(temporary)
        orders = [
            Order(
                target.share(share, processes),
                model,
                workload,
                share,
                processes,
                str(directory / f"spool-{share}.jsonl"),
            )
            for share in range(processes)
        ]
        team = _Team(orders)
        try:
            started_at, zero = team.start()
            cut = team.run(workload, zero, progress, stop)
        finally:
            team.kill()
        records = [record for order in orders for record in _read(Path(order.spool))]
    window = measured_window(workload, records)
    if cut:
        window = (window[0], max(window[0], min(window[1], max((r["end"] for r in records), default=0.0))))
    return Load(
        model, events_table(records), window, zero, started_at, tuple(team.lags), tuple(team.cpu_shares), cut,
        target.transport, target.shared_by,
    )  # fmt: skip


def processes_needed(workload: Workload, connections: Connections = "each") -> int:
    """Client processes for the chunks that are to be expected, never more than cores or than connections to share."""
    if workload.open_loop:
        chunks = workload.rate * workload.max_tokens
    else:
        chunks = workload.users * STREAM_CHUNKS_A_SECOND
    most = min(os.cpu_count() or 1, connections if isinstance(connections, int) else MOST_PROCESSES)
    return max(1, min(math.ceil(chunks / CHUNKS_A_SECOND), most))


def _processes(workload: Workload, asked: int | None, connections: Connections) -> int:
    if asked is None:
        return processes_needed(workload, connections)
    if not 1 <= asked <= MOST_PROCESSES:
        raise UserError(f"processes must be between 1 and {MOST_PROCESSES}, got {asked}")
    if isinstance(connections, int) and asked > connections:
        raise UserError(
            f"{asked} client processes cannot share {connections} connections; take fewer processes or more of them"
        )
    return asked


def measured_window(workload: Workload, records: list[dict[str, Any]]) -> tuple[float, float]:
    """When the measured part began and ended, in seconds of the run.

    With ``duration_s`` it is exactly that long. With a number of requests it ends with the last answer, drain included:
    throughput is then the work over the time it took.
    """
    begin = workload.measured_from_s
    if workload.duration_s is not None:
        return begin, begin + workload.duration_s
    return begin, max((r["end"] for r in records if r["scheduled"] >= begin), default=begin)


@dataclass
class _Team:
    """The client processes of a run."""

    orders: list[Order]
    lags: list[float] = field(default_factory=list)
    cpu_shares: list[float] = field(default_factory=list)
    _processes: list[subprocess.Popen[str]] = field(default_factory=list)
    _said: queue.Queue[tuple[int, dict[str, Any] | None]] = field(default_factory=queue.Queue)
    _errors: list[Any] = field(default_factory=list)

    def start(self) -> tuple[float, float]:
        """Starts the processes, waits until all are ready and starts them together: (wall time, perf_counter) of the
        start."""
        for number, order in enumerate(self.orders):
            errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
            self._errors.append(errors)
            # A session of its own keeps Ctrl-C from it: the parent decides what an interruption means.
            process = subprocess.Popen(
                [sys.executable, "-m", "labkit.traffic.worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
            )  # fmt: skip
            self._processes.append(process)
            threading.Thread(target=self._listen, args=(number, process), daemon=True).start()
            self._tell(number, order.to_json())
        waiting, deadline = len(self.orders), time.monotonic() + START_TIMEOUT_S
        while waiting:
            self._next(max(0.0, deadline - time.monotonic()))
            waiting -= 1
        zero = time.perf_counter() + 0.02
        for number in range(len(self.orders)):
            self._tell(number, repr(zero))
        return time.time(), zero

    def run(self, workload: Workload, zero: float, progress: Callable[[Progress], None] | None,
            stop: Callable[[], str] | None) -> str:  # fmt: skip
        """Until every process has ended: why the run was cut short, or an empty string."""
        latest: list[dict[str, Any]] = [{"sent": 0, "ended": 0, "failed": 0} for _ in self.orders]
        latencies: list[float] = []
        expected = expected_requests(workload)
        running = len(self.orders)
        while running:
            said = self._next(0.25, patient=True)
            if said is not None:
                number, message = said
                latest[number] = message
                latencies += message["latencies"]
                if message.get("end"):
                    running -= 1
                    self.lags += message["lags"]
                    self.cpu_shares.append(message["cpu_share"])
            if progress is not None:
                elapsed = time.perf_counter() - zero
                sent, ended, failed = (sum(one[key] for one in latest) for key in ("sent", "ended", "failed"))
                p95 = sorted(latencies)[math.ceil(0.95 * len(latencies)) - 1] if latencies else math.nan
                progress(Progress(elapsed, sent, ended, failed, p95, _time_left(workload, expected, elapsed, ended)))
            reason = stop() if stop is not None else ""
            if reason and running:
                return reason
        return ""

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for errors in self._errors:
            errors.close()

    def _tell(self, number: int, line: str) -> None:
        pipe = self._processes[number].stdin
        assert pipe is not None
        try:
            pipe.write(line + "\n")
            pipe.flush()
        except BrokenPipeError:
            self._died(number)

    def _listen(self, number: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                self._said.put((number, json.loads(line)))
        except ValueError:  # killed in the middle of a line
            pass
        self._said.put((number, None))

    def _next(self, timeout_s: float, patient: bool = False) -> tuple[int, dict[str, Any]] | None:
        """The next message of any process; None when ``patient`` and there is none in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                number, message = self._said.get(timeout=max(0.001, deadline - time.monotonic()))
            except queue.Empty:
                if patient:
                    return None
                raise UserError(
                    f"a client process was not ready within {timeout_s:.0f} s; is the machine overloaded?"
                ) from None
            if message is not None:
                return number, message
            if self._processes[number].wait() != 0:
                self._died(number)

    def _died(self, number: int) -> None:
        self._processes[number].wait()
        self._errors[number].seek(0)
        lines = [line for line in self._errors[number].read().splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit code {self._processes[number].returncode}"
        raise UserError(f"a client process died: {reason.removeprefix('labkit.errors.UserError: ')}")


def expected_requests(workload: Workload) -> int | None:
    """How many requests a run sends in all; None where only the clock ends it."""
    if workload.open_loop:
        return sum(1 for _ in schedule(workload))
    return workload.requests if workload.measured_from_s == 0 else None


def _time_left(workload: Workload, expected: int | None, elapsed: float, ended: int) -> float:
    """A guess in seconds; NaN before there is anything to go by."""
    if workload.duration_s is not None:
        return max(0.0, workload.measured_from_s + workload.duration_s - elapsed)
    if expected is None:
        expected, elapsed = workload.requests or 0, elapsed - workload.measured_from_s
    return elapsed / ended * max(0, expected - ended) if ended and elapsed > 0 else math.nan


def _read(path: Path) -> list[dict[str, Any]]:
    return read_spool(path) if path.exists() else []
