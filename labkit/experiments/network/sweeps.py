"""What is varied over a link: streams and buffers, transports and losses, requests in chunks, the way by an edge.

Every function gives a table with one row a run (of ``uploads`` and ``by_the_edge``: a request) and takes turns: all
variants once, then all again in the opposite order, so that a machine that grows slow does so for all alike.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd

from labkit.experiments.network.caller import Seen
from labkit.experiments.network.site import Site, Wire
from labkit.link.edge import Edge
from labkit.link.leg import Leg
from labkit.models.directory import name_of
from labkit.serving.schedule import Schedule
from labkit.traffic.target import Connections, Target
from labkit.traffic.workload import Workload

Say = Callable[[str], None]
DIRECT, EDGE = "direct", "by the edge"
AT_HAND, AS_IT_COMES = "at hand", "comes piece by piece"


@dataclass(frozen=True)
class Way:
    """A transport and over how many connections its streams go; None is what is usual over it."""

    transport: str
    connections: Connections | None = None

    def __str__(self) -> str:
        number = {None: "", "each": ", a connection each", 1: ", one connection"}
        return self.transport + number.get(self.connections, f", {self.connections} connections")


def has_no_wire(site: Site, say: Say) -> bool:
    """Whether the link has no packets to look at; says so."""
    if site.link.mode == "delay only":
        say("nothing measured: " + "; ".join(site.link.notes))
    return site.link.mode == "delay only"


def by_streams(
    site: Site, variants: Sequence[tuple[Way, int]], legs: Sequence[Leg], plan: Schedule, repeats: int, say: Say
) -> pd.DataFrame:
    """Every way with its number of streams, over every leg. One row a run: see ``_row``. Without namespaces, none."""
    rows: list[dict[str, Any]] = []
    for leg in () if has_no_wire(site, say) else legs:
        site.lay(leg)
        for repeat, (way, count) in _in_turn(repeats, variants):
            rows.append(_run(site, way, count, plan, repeat, leg))
        say(f"{leg}: {_said(rows, len(variants) * repeats)}")
    return pd.DataFrame(rows)


def by_loss(
    site: Site,
    ways: Sequence[Way],
    losses: Sequence[float],
    congestions: Sequence[str],
    rtt_ms: float,
    count: int,
    plan: Schedule,
    repeats: int,
    say: Say,
) -> pd.DataFrame:
    """``count`` streams every way, at every loss and congestion control. One row a run: see ``_row``, and congestion.
    Without namespaces, none."""
    rows: list[dict[str, Any]] = []
    for congestion, loss in itertools.product(() if has_no_wire(site, say) else congestions, losses):
        leg = Leg(rtt_ms, loss)
        site.lay(leg, congestion)
        for repeat, way in _in_turn(repeats, ways):
            # The same losses for all ways of a repeat, and others in the next.
            site.link.reseed(repeat)
            rows.append(_run(site, way, count, plan, repeat, leg) | {"congestion": congestion})
        say(f"{leg}, {congestion}: {_said(rows, len(ways) * repeats)}")
    return pd.DataFrame(rows)


def by_mix(site: Site, ways: Sequence[Way], count: int, plan: Schedule, repeats: int, say: Say) -> pd.DataFrame:
    """The questions of the article's workload, ``count`` at once, each answered with ``plan.tokens`` tokens. One row a
    run: see ``_row``. Without namespaces, none."""
    if has_no_wire(site, say):
        return pd.DataFrame()
    leg, model = site.link.legs[0], name_of(site.deployments[ways[0].transport].model)
    rows = [_run(site, way, count, plan, repeat, leg, model) for repeat, way in _in_turn(repeats, ways)]
    say(f"bytes of {count} questions: {_said(rows, len(rows))}")
    return pd.DataFrame(rows)


def by_engine(site: Site, names: Sequence[str], workload: Workload, repeats: int, say: Say) -> pd.DataFrame:
    """``workload`` against servers of ``site`` that run a model. One row a run: way (its name), transport, repeat,
    requests, failures, correct, prompt_tokens, tokens, and the wire's as in ``_row``."""
    rows = []
    for repeat, name in _in_turn(repeats, names):
        target = site.target(name)
        scheme = urlsplit(site.servers[name].url).scheme
        url, transport = f"{scheme}://{target.authority}", str(target.transport)
        found, wire = site.watched(lambda: site.caller.load(url, workload, transport, target.cafile))  # noqa: B023
        rows.append({"way": name, "transport": transport, "repeat": repeat, **found, **_wire(wire)})
        say(f"{name}: {found['requests']} answers, {found['failures']} failures")
    return pd.DataFrame(rows)


def uploads(
    site: Site, transport: str, prompt_bytes: int, chunks: int, over_ms: float, repeats: int, say: Say
) -> pd.DataFrame:
    """A long prompt sent whole or in ``chunks`` chunks, when it is at hand and when its pieces come to the sender over
    ``over_ms``. One row a request: prompt, chunked (bool), repeat, ttft_ms, invalid."""
    target = site.target(transport)
    rows = []
    for repeat, prompt, chunked in _in_turn(repeats, (AT_HAND, AS_IT_COMES), (False, True)):
        waits = over_ms if prompt == AS_IT_COMES else 0.0
        sizes = (prompt_bytes, chunks, chunked, waits)
        [ttft_ms], wire = site.watched(lambda: site.caller.uploads(target.host, target.port, 1, *sizes))  # noqa: B023
        rows.append(
            {"prompt": prompt, "chunked": chunked, "repeat": repeat, "ttft_ms": ttft_ms, "invalid": wire.invalid}
        )
    say(f"{len(rows)} long prompts over {site.link.legs[0]}")
    return pd.DataFrame(rows)


def by_the_edge(
    site: Site,
    transport: str,
    rtt_ms: float,
    losses: Sequence[float],
    count: int,
    plan: Schedule,
    repeats: int,
    say: Say,
) -> pd.DataFrame:
    """Directly to the origin, and by an edge in between, which keeps its connections to the origin: one stream after
    the other over new connections and over one that is open, then ``count`` at once. Losses are on the client's leg.

    One row a repeat: way, loss, cold_ms and warm_ms (TTFT), p50_ms, p95_ms and p99_ms (lateness of the streams'
    tokens), failures, invalid. Without namespaces, none.
    """
    if has_no_wire(site, say):
        return pd.DataFrame()
    direct = site.target(transport, 1)
    rows: list[dict[str, Any]] = []
    ca = None if direct.cafile is None else Path(direct.cafile)
    with Edge(site.link, direct.port, upstream="http/2", origin_ca=ca) as edge:
        near = dataclasses.replace(
            direct, host=edge.endpoint[0], port=edge.endpoint[1], cafile=str(edge.certificate.certificate)
        )
        for loss in losses:
            site.lay(Leg(rtt_ms, loss))
            for repeat, (way, target) in _in_turn(repeats, ((DIRECT, direct), (EDGE, near))):
                site.link.reseed(repeat)
                found, wire = site.watched(lambda: _three_ways(site, target, count, plan))  # noqa: B023
                rows.append({"way": way, "loss": loss, "repeat": repeat, **found, "invalid": wire.invalid})
            say(f"{2 * repeats} times over {site.link.legs[0]}, direct and by the edge")
    return pd.DataFrame(rows)


def _three_ways(site: Site, target: Target, count: int, plan: Schedule) -> dict[str, Any]:
    one = site.caller.cold_and_warm(target, dataclasses.replace(plan, tokens=2))
    many = site.caller.streams(target, count, plan)
    cold, warm = one.ttft_ms if len(one.ttft_ms) == 2 else (np.nan, np.nan)
    return {"cold_ms": cold, "warm_ms": warm, **_late(many), "failures": len(one.failures) + len(many.failures)}


def _run(site: Site, way: Way, count: int, plan: Schedule, repeat: int, leg: Leg, model: str = "") -> dict[str, Any]:
    target = site.target(way.transport, way.connections)
    seen, wire = site.watched(lambda: site.caller.streams(target, count, plan, model=model))
    return _row(way, count, repeat, leg, seen, wire)


def _row(way: Way, count: int, repeat: int, leg: Leg, seen: Seen, wire: Wire) -> dict[str, Any]:
    """way (str), transport, streams, repeat, loss, rate_mbit, buffer_kb; p50_ms, p95_ms and p99_ms (lateness of all
    tokens), held (share of the tokens that came more than half a round trip later than the wire needs), ttft_ms
    (median), failures (streams), took_s; and of the wire: retransmitted (share of the origin's segments), up_bytes and
    down_bytes (Ethernet frames at the client), connections, invalid (why the run does not count). What no namespace
    counted is NaN."""
    return {
        "way": str(way), "transport": way.transport, "streams": count, "repeat": repeat, "loss": leg.loss,
        "rate_mbit": leg.rate_mbit, "buffer_kb": (leg.buffer_bytes or 0) / 1e3, **_late(seen),
        "held": float(np.mean(np.asarray(seen.late_ms) > leg.rtt_ms)) if seen.late_ms else np.nan,
        "ttft_ms": _median(seen.ttft_ms), "failures": len(seen.failures), "took_s": seen.took_s,
        **_wire(wire, seen.failures),
    }  # fmt: skip


def _wire(wire: Wire, failures: Sequence[str] = ()) -> dict[str, Any]:
    client, origin = wire.client, wire.origin
    invalid = wire.invalid or (f"{len(failures)} streams failed, such as: {failures[0]}" if failures else "")
    if client is None or origin is None:
        nothing = dict.fromkeys(("retransmitted", "up_bytes", "down_bytes", "connections"), np.nan)
        return {**nothing, "invalid": invalid}
    return {
        "retransmitted": origin.retransmitted_share,
        "up_bytes": client.bytes_sent,
        "down_bytes": client.bytes_received,
        "connections": client.connections_opened,
        "invalid": invalid,
    }


def _late(seen: Seen) -> dict[str, float]:
    found = np.percentile(seen.late_ms, (50, 95, 99)) if seen.late_ms else (np.nan,) * 3
    return dict(zip(("p50_ms", "p95_ms", "p99_ms"), map(float, found), strict=True))


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if values else np.nan


def _in_turn(repeats: int, *variants: Iterable[Any]) -> Iterable[tuple[Any, ...]]:
    every = list(itertools.product(*variants))
    for repeat in range(repeats):
        for one in every[:: -1 if repeat % 2 else 1]:
            yield repeat, *one


def _said(rows: Sequence[dict[str, Any]], latest: int) -> str:
    mine = rows[-latest:]
    failures, invalid = sum(row["failures"] for row in mine), sum(bool(row["invalid"]) for row in mine)
    return f"{len(mine)} runs, {failures} streams failed, {invalid} runs do not count"
