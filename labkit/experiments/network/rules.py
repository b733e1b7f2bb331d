"""What the measurements over a link say of the claims about the network (C13 to C18)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from labkit.experiments.claims import NO_GAIN, Evidence, Verdict, claim, judge_facts, judge_level, not_testable
from labkit.experiments.compare import ratio_of_medians
from labkit.experiments.intervals import Estimate
from labkit.experiments.network.sweeps import AS_IT_COMES, AT_HAND, DIRECT, EDGE, Way

LEAST_RUNS = 3
"""Runs of every variant, over a link that was what it should be, without which there is no verdict."""
BEGINS = 0.01
"""Retransmissions have begun where they are this share of the segments."""

HTTP1, HTTP2, GRPC = Way("http/1.1"), Way("http/2", 1), Way("grpc", 1)
GRPC_APART = Way("grpc", "each")
NO_NAMESPACES = "This machine gives no network namespaces, so there is no wire to look at"
NAMESPACES = "Linux, as root or where ordinary users may have namespaces"


def of_runs(values: Iterable[float], unit: str = "") -> Estimate:
    """Median of a few runs, from the least to the greatest of them, which holds the true median in 1 − 2^(1−n) of all
    cases."""
    found = [float(value) for value in values if not np.isnan(value)]
    if not found:
        return Estimate(np.nan, np.nan, np.nan, 0, unit)
    return Estimate(float(np.median(found)), min(found), max(found), len(found), unit, 1 - 2.0 ** (1 - len(found)))


def byte_ratio(table: pd.DataFrame) -> Estimate:
    """Bytes to the client for each that it sent, headers of every layer included."""
    return of_runs(table["down_bytes"] / table["up_bytes"], "×")


def judge_bytes(engine: pd.DataFrame) -> Verdict:
    """C13, by the model's own answers to the article's mix of questions over HTTP/1.1."""
    if engine.empty or engine["down_bytes"].isna().all():
        return not_testable("C13", NO_NAMESPACES, NAMESPACES)
    used, reason = counted(engine[engine["transport"] == "http/1.1"], [])
    if reason:
        return Verdict("C13", "no verdict", reason)
    return judge_level("C13", byte_ratio(used), label="bytes received / sent")


def judge_retransmission(table: pd.DataFrame) -> Verdict:
    """C14, by HTTP/1.1 with a connection a stream, over links of different rates and buffers."""
    if table.empty:
        return not_testable("C14", NO_NAMESPACES, NAMESPACES)
    share = claim("C14").value or 0.0
    used, reason = counted(table[table["way"] == str(HTTP1)], ["rate_mbit", "buffer_kb", "streams"])
    if reason:
        return Verdict("C14", "no verdict", reason)
    most, least = int(used["streams"].max()), int(used["streams"].min())
    fullest = {link: of_runs(part["retransmitted"], "share") for link, part in links(used, most)}
    emptiest = {link: of_runs(part["retransmitted"], "share") for link, part in links(used, least)}
    starts = set(knees(used).values())
    facts = {
        f"more is sent again with {most} streams than with {least}, on every link": all(
            fullest[link].low > emptiest[link].high for link in fullest
        ),
        f"it reaches {share:g} % on a link": any(each.high * 100 >= share for each in fullest.values()),
        f"it reaches {share:g} % on every link": all(each.high * 100 >= share for each in fullest.values()),
        "it begins at the same number of streams on every link": len(starts) == 1 and None not in starts,
    }
    evidence = [Evidence.of(f"sent again, {most} streams, {link}", each) for link, each in fullest.items()]
    return judge_facts("C14", facts, evidence)


def knees(table: pd.DataFrame) -> dict[str, int | None]:
    """For every link, the least number of streams at which one in a hundred segments is sent again; None if at none."""
    found: dict[str, int | None] = {}
    for link, part in links(table):
        shares = part.groupby("streams")["retransmitted"].median()
        begun = shares[shares >= BEGINS]
        found[link] = int(begun.index[0]) if len(begun) else None
    return found


def judge_blocking(table: pd.DataFrame) -> Verdict:
    """C15: gRPC streams on one channel against each on a channel of its own, with the most losses and without any."""
    if table.empty:
        return not_testable("C15", NO_NAMESPACES, NAMESPACES)
    used, reason = counted(usual(table), ["way", "loss"])
    if reason:
        return Verdict("C15", "no verdict", reason)
    lossy, clean = used["loss"] == used["loss"].max(), used["loss"] == 0
    held = _gain(used[lossy], "way", str(GRPC_APART), str(GRPC), "held")
    latest = _gain(used[lossy], "way", str(GRPC_APART), str(GRPC), "p99_ms")
    without = _gain(used[clean], "way", str(GRPC_APART), str(GRPC), "p95_ms")
    facts = {
        "with losses, more tokens are held up where streams share a channel": surely(held),
        "without losses they are not later there (P95)": _not(surely(without)),
        "with losses the latest tokens (P99) are later there, too": surely(latest),
    }
    evidence = (
        Evidence.of("tokens held up, one channel / a channel each", held),
        Evidence.of("P99 lateness, one channel / a channel each", latest),
        Evidence.of("P95 lateness without losses, likewise", without),
    )
    return judge_facts("C15", facts, evidence)


def judge_multiplexing(streams: pd.DataFrame, losses: pd.DataFrame) -> Verdict:
    """C16: HTTP/2, all streams on one connection, against HTTP/1.1 with a connection each: over a link without losses,
    over one that is full (the first that was laid), over one that loses."""
    if streams.empty or losses.empty:
        return not_testable("C16", NO_NAMESPACES, NAMESPACES)
    full, reason_full = counted(
        streams[streams["streams"] == streams["streams"].max()], ["way", "rate_mbit", "buffer_kb"]
    )
    lossy, reason_lossy = counted(usual(losses), ["way", "loss"])
    if reason := reason_full or reason_lossy:
        return Verdict("C16", "no verdict", reason)
    ways = str(HTTP2), str(HTTP1)
    sooner = _gain(lossy[lossy["loss"] == 0], "way", *ways, "ttft_ms")
    on_full = _gain(links(full)[0][1], "way", *ways, "p95_ms")
    on_lossy = _gain(lossy[lossy["loss"] == lossy["loss"].max()], "way", *ways, "p95_ms")
    facts = {
        "the first token comes sooner, for there is no connection to open": surely(sooner),
        "over a full link tokens are less late (P95)": surely(on_full),
        "over a link that loses packets tokens are less late (P95)": surely(on_lossy),
    }
    evidence = (
        Evidence.of("time to first token, HTTP/1.1 / HTTP/2", sooner),
        Evidence.of("P95 lateness over a full link, likewise", on_full),
        Evidence.of("P95 lateness over a link with losses, likewise", on_lossy),
    )
    return judge_facts("C16", facts, evidence)


def judge_chunks(table: pd.DataFrame) -> Verdict:
    """C17: a long prompt sent whole against sent in chunks."""
    used, reason = counted(table, ["prompt", "chunked"])
    if reason:
        return Verdict("C17", "no verdict", reason)
    gains = {
        prompt: _gain(used[used["prompt"] == prompt], "chunked", True, False, "ttft_ms")
        for prompt in (AT_HAND, AS_IT_COMES)
    }
    facts = {f"sooner with a prompt that is {AT_HAND}": surely(gains[AT_HAND]),
             f"sooner with one that {AS_IT_COMES}": surely(gains[AS_IT_COMES])}  # fmt: skip
    evidence = [Evidence.of(f"time to first token, whole / in chunks, {name}", each) for name, each in gains.items()]
    return judge_facts("C17", facts, evidence)


def judge_edge(table: pd.DataFrame) -> Verdict:
    """C18: by an edge near the client against directly."""
    if table.empty:
        return not_testable("C18", NO_NAMESPACES, NAMESPACES)
    used, reason = counted(table, ["way", "loss"])
    if reason:
        return Verdict("C18", "no verdict", reason)
    lossy, clean = used[used["loss"] == used["loss"].max()], used[used["loss"] == 0]
    gains = {
        "first token over a new connection": _gain(clean, "way", EDGE, DIRECT, "cold_ms"),
        "first token over an open connection": _gain(clean, "way", EDGE, DIRECT, "warm_ms"),
        "tokens with losses near the client (P95)": _gain(lossy, "way", EDGE, DIRECT, "p95_ms"),
    }
    facts = {f"sooner by the edge: {name}": surely(each) for name, each in gains.items()}
    evidence = [Evidence.of(f"{name}, direct / by the edge", each) for name, each in gains.items()]
    return judge_facts("C18", facts, evidence)


def surely(gained: Estimate) -> bool | None:
    """Whether something is better: no if the median run is not, or none by more than 5 %; yes if all of the interval is
    (of three runs a side: every run, which chance alone does in 1 of 20 cases); else None."""
    if gained.high <= NO_GAIN or gained.value <= 1:
        return False
    return True if gained.low > 1 else None


def counted(table: pd.DataFrame, by: Sequence[str]) -> tuple[pd.DataFrame, str | None]:
    """The runs over a link that was what it should be, and why they are too few for a verdict, or None."""
    used = table[table["invalid"] == ""]
    groups = used.groupby(list(by)).size() if by else pd.Series([len(used)])
    every = len(table.groupby(list(by))) if by else 1
    if len(groups) == every and groups.min() >= LEAST_RUNS:
        return used, None
    reasons = sorted(set(table.loc[table["invalid"] != "", "invalid"]))
    why = f"; {len(table) - len(used)} do not count, such as: {reasons[0]}" if reasons else ""
    return used, f"Fewer than {LEAST_RUNS} runs of every kind{why}."


def usual(table: pd.DataFrame) -> pd.DataFrame:
    """The runs with the first congestion control that was measured, which is the usual one."""
    return table[table["congestion"] == table["congestion"].iloc[0]]


def links(table: pd.DataFrame, streams: int | None = None) -> list[tuple[str, pd.DataFrame]]:
    """The runs of every link with a limited rate, by its name in few words."""
    chosen = table if streams is None else table[table["streams"] == streams]
    named = chosen.assign(link=[
        f"{rate:g} Mbit/s, buffer {buffer:g} kB"
        for rate, buffer in zip(chosen["rate_mbit"], chosen["buffer_kb"], strict=True)
    ])  # fmt: skip
    return [(str(link), part) for link, part in named.groupby("link", sort=False)]


def _gain(table: pd.DataFrame, column: str, new: object, old: object, metric: str) -> Estimate:
    """How many times less ``metric`` is with ``new`` than with ``old``."""
    values: Callable[[object], list[float]] = lambda name: table.loc[table[column] == name, metric].tolist()  # noqa: E731
    return replace(ratio_of_medians(values(new), values(old)), unit="×")


def _not(held: bool | None) -> bool | None:
    return None if held is None else not held
