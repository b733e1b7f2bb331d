"""Servers on the origin of a link and somebody who asks on its client; every run with what the wire did meanwhile."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from labkit.deployment import Deployment
from labkit.experiments.measure import Server, running_server, serve_command
from labkit.experiments.network.caller import Caller
from labkit.link.leg import Leg
from labkit.link.link import Link
from labkit.probes.wire import WireCounters
from labkit.serving.schedule import Schedule
from labkit.traffic.target import Connections, Target

Found = TypeVar("Found")
CALIBRATION_TRIES = 3


@dataclass(frozen=True)
class Wire:
    """What a run did to the wire, as each end counted it; None without namespaces. ``invalid`` says why the link was
    not the one asked for, and is empty if it was."""

    client: WireCounters | None
    origin: WireCounters | None
    invalid: str


@dataclass
class Site:
    """An open link with its servers, by name, and the deployments that they serve."""

    link: Link
    caller: Caller
    deployments: Mapping[str, Deployment]
    servers: Mapping[str, Server]
    calibration_s: float
    off: str = ""
    """Why the link as it is now gives no verdict; empty if it does."""
    conditions: list[dict[str, Any]] = field(default_factory=list)
    """Every wire that was laid: what was asked for, what was measured."""

    def target(self, name: str, connections: Connections | None = None) -> Target:
        """Where the client reaches a server, as far as it knows."""
        server = self.servers[name]
        parts = urlsplit(server.url)
        host, port = self.link.endpoint("origin", parts.port or 0)
        url = f"{parts.scheme}://{host}:{port}"
        return Target.parse(url, None, self.deployments[name].transport, connections, server.cafile)

    def lay(self, leg: Leg, congestion: str | None = "cubic") -> str:
        """Changes the client's wire and measures it, a few times if it was off. Why no run over it counts, or ""."""
        self.link.change(leg, congestion)
        for _ in range(CALIBRATION_TRIES):
            calibration = self.link.calibrate(self.calibration_s)
            self.off = "; ".join(calibration.reasons())
            if calibration.valid or self.link.mode == "delay only":
                break
        measured = calibration.legs[0]
        rates = [each.rate_mbit for each in measured.directions] if leg.rate_mbit else []
        self.conditions.append(
            {"asked": str(leg), "congestion": congestion or "the system's", "rtt_ms": measured.rtt_ms,
             "lost": measured.lost, "sent": measured.sent, "rate_mbit": min(rates, default=None), "off": self.off}
        )  # fmt: skip
        return self.off

    def watched(self, run: Callable[[], Found]) -> tuple[Found, Wire]:
        """What a run found, and what it did to the wire."""
        if self.link.mode == "delay only":
            return run(), Wire(None, None, self.off)
        relayed, hosts = self.link.relayed(), ("client", "origin")
        before = [self.link.counters(host) for host in hosts]
        found = run()
        client, origin = (self.link.counters(host) - then for host, then in zip(hosts, before, strict=True))
        return found, Wire(client, origin, self.off or "; ".join(self.link.kept_up(relayed)))


def open_together(stack: contextlib.ExitStack, *sites: contextlib.AbstractContextManager[Site]) -> list[Site]:
    """Enters several at once, for servers take long to start; they end with ``stack``."""
    with ThreadPoolExecutor(len(sites)) as threads:
        return list(threads.map(stack.enter_context, sites))


@contextlib.contextmanager
def open_site(
    link: Link, plan: Schedule, transports: Sequence[str], models: Mapping[str, Deployment] | None = None,
    calibration_s: float = 0.6,
) -> Iterator[Site]:  # fmt: skip
    """Starts servers on the origin of ``link``, which is open, all at once: one for each of ``transports``, named after
    it, that sends by ``plan``, and one for each of ``models`` that runs its model.

    Raises UserError as ``running_server`` does.
    """
    deployments = {name: Deployment(transport=name) for name in transports} | dict(models or {})  # type: ignore[arg-type]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="labkit-")))

        def start(name: str) -> Server:
            deployment, log = deployments[name], folder / f"{list(deployments).index(name)}.log"
            command = [*serve_command(deployment), "--host", link.address("origin")]
            if name in transports:
                command += ["--schedule", str(plan)]
            running = running_server(deployment, log, command=command, popen=on_origin)
            return stack.enter_context(running)

        def on_origin(argv: list[str], **options: Any) -> subprocess.Popen[bytes]:
            return link.popen("origin", argv, **options)

        caller = stack.enter_context(Caller(link))  # it loads while they do
        with ThreadPoolExecutor(len(deployments)) as threads:
            servers = dict(zip(deployments, threads.map(start, deployments), strict=True))
        yield Site(link, caller, deployments, servers, calibration_s)
