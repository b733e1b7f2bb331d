"""One deployment under one workload: start the server, send the traffic, sample the probes, end the server, keep the
run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit.deployment import Deployment
from labkit.errors import UserError
from labkit.experiments.record import finish
from labkit.experiments.store import Run, RunStore
from labkit.probes.engine import EngineProbe
from labkit.probes.gpu import GpuProbe
from labkit.probes.host import HostProbe
from labkit.probes.sampler import Probe, Sampler
from labkit.traffic.calibrate import Calibration
from labkit.traffic.generate import Progress, send_load
from labkit.traffic.workload import Workload

LAST_LINES = 12
END_TIMEOUT_S = 10.0
AFTER_DEATH_S = 2.0
"""A run goes on for so long after its server died, to record what its users saw, and is then cut."""


@dataclass(frozen=True)
class Server:
    """A server process that answers at ``url``; its output goes to ``log``. ``http_url`` is where it tells of itself:
    the same, or beside it where ``url`` is no HTTP. ``cafile`` is the certificate that it made for TLS."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    ready_after_s: float
    http_url: str
    cafile: str | None = None

    def death(self) -> str:
        """How the process ended by itself, or an empty string while it lives."""
        code = self.process.poll()
        return "" if code is None else exit_text(code)


def measure(
    deployment: Deployment,
    workload: Workload,
    store: RunStore,
    *,
    name: str | None = None,
    hz: float = 5.0,
    calibration: Calibration | None = None,
    processes: int | None = None,
    ready_timeout_s: float = 600.0,
    progress: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
    notes: dict[str, Any] | None = None,
    command: Sequence[str] | None = None,
) -> Run:
    """Serves ``deployment`` in a process of its own, sends ``workload`` at it, and keeps what happened as a run.

    ``hz`` is the rate of the probes, ``calibration`` what is known of the client at this workload, ``notes`` goes
    into the manifest, ``command`` starts another server than ``labkit serve``. A server that dies in mid-run is a
    result: the failures are in the events, how it ended and its last words in ``manifest["server"]``. Raises
    UserError when it never gets ready.
    """
    with store.create(name or workload.name) as draft:
        with running_server(deployment, draft.path / "server.log", ready_timeout_s, say, command) as server:
            engine = EngineProbe(server.http_url, cafile=server.cafile)
            probes: list[Probe] = [HostProbe(server.process.pid), GpuProbe(), engine]
            with Sampler(probes, hz) as sampler:
                load = send_load(
                    server.url, workload, processes=processes, progress=progress, stop=_stop_after_death(server),
                    spool=draft.path, transport=deployment.transport, cafile=server.cafile,
                )  # fmt: skip
            samples = sampler.frame()
            samples["t_s"] -= load.zero
            death = server.death()
        facts: dict[str, Any] = {
            **(notes or {}),
            "deployment": vars(deployment),
            "server": {"ready_after_s": server.ready_after_s, "died": death, "last_lines": last_lines(server.log)},
            "probes": sampler.report(),
        }
        return finish(draft, load, workload, calibration, facts, samples)


@contextmanager
def running_server(
    deployment: Deployment,
    log: Path,
    ready_timeout_s: float = 600.0,
    say: Callable[[str], None] = lambda text: None,
    command: Sequence[str] | None = None,
    popen: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen,
) -> Iterator[Server]:
    """A ready server for ``deployment``, ended (with all its children) whatever happens. ``popen`` starts it elsewhere
    than here, such as on a host of a link.

    Raises UserError with the server's own words when it dies before it is ready, or is not ready in time.
    """
    started = time.monotonic()
    with open(log, "wb") as output:
        process = popen(
            command or serve_command(deployment),
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={name: value for name, value in os.environ.items() if name != "LABKIT_API_KEY"},
        )  # fmt: skip
    try:
        url, http_url = _wait_until_ready(process, log, started + ready_timeout_s, say)
        made = re.search(r"^labkit: certificate (.+)$", log.read_text(errors="replace"), re.M)
        yield Server(url, process, log, time.monotonic() - started, http_url, made[1] if made else None)
    finally:
        end_group(process)


def serve_command(deployment: Deployment) -> list[str]:
    serve = [sys.executable, "-m", "labkit.cli", "serve", "--port", "0", "--die-with-parent"]
    return [*serve, "--deployment", deployment.to_json()]


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process started with its own session, and its children: asked first, killed after END_TIMEOUT_S."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        except PermissionError:  # macOS says this of a group of zombies
            break
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def exit_text(code: int) -> str:
    """``exit code 1``, or ``killed by SIGKILL (out of memory?)``."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")


def last_lines(log: Path, count: int = LAST_LINES) -> list[str]:
    lines = log.read_text(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-count:]


def _wait_until_ready(
    process: subprocess.Popen[bytes], log: Path, deadline: float, say: Callable[[str], None]
) -> tuple[str, str]:
    """Where it answers, and where it tells of itself by HTTP."""
    said = 0
    while True:
        died = process.poll() is not None
        text = log.read_text(errors="replace")
        lines = text[: text.rfind("\n") + 1].splitlines()
        for line in lines[said:]:
            say(line)
            if ready := re.search(r"\bready on ((?:https?|grpc)://[^\s,]+)(?:, .* on (http://\S+))?", line):
                return ready[1], ready[2] or ready[1]
        said = len(lines)
        if died:
            words = " | ".join(last_lines(log, 3)) or "it said nothing"
            raise UserError(f"the server ended before it was ready ({exit_text(process.returncode)}): {words}")
        if time.monotonic() > deadline:
            words = " | ".join(last_lines(log, 1)) or "nothing"
            raise UserError(f"the server was not ready in time; its last words: {words}")
        time.sleep(0.05)


def _stop_after_death(server: Server) -> Callable[[], str]:
    died_at: float | None = None

    def stop() -> str:
        nonlocal died_at
        death = server.death()
        if not death:
            return ""
        died_at = died_at or time.monotonic()
        return f"the server died: {death}" if time.monotonic() - died_at > AFTER_DEATH_S else ""

    return stop
