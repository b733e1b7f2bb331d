"""Tables, figures and sentences of the notebook on the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from labkit.experiments.intervals import Estimate, digits
from labkit.experiments.network.rules import (
    GRPC,
    GRPC_APART,
    HTTP1,
    HTTP2,
    byte_ratio,
    knees,
    links,
    of_runs,
    usual,
)
from labkit.experiments.network.sweeps import AS_IT_COMES, AT_HAND, DIRECT, EDGE
from labkit.report import figures
from labkit.report.display import Shown
from labkit.report.environment import machine_caption
from labkit.report.tables import Table, interval, quantity

NOTHING = Shown(
    "<p><em>Not measured: no network namespaces here.</em></p>", "Not measured: no network namespaces here."
)
SPREAD = "Median of the runs; small print: the least and the greatest of them."


def conditions_table(conditions: Sequence[dict[str, Any]]) -> Table:
    """Every wire that was laid: asked for, measured, and whether runs over it count."""
    rows = []
    for each in conditions:
        rate = "–" if each["rate_mbit"] is None else f"{digits(each['rate_mbit'])}\u00a0Mbit/s"
        lost = f"{each['lost']} of {each['sent']}" if each["sent"] else "–"
        asked = f"{each['asked']}, {each['congestion']}"
        rows.append((asked, f"{digits(each['rtt_ms'])}\u00a0ms", lost, rate, each["off"] or "yes"))
    caption = f"{machine_caption()}. A link that is off by more than 10 % gives no verdict."
    return Table(("asked for", "RTT", "packets lost", "rate", "counts"), tuple(rows), caption)


def bytes_table(mix: pd.DataFrame, engine: pd.DataFrame, tokens: int) -> Table | Shown:
    """One row a transport: bytes each way for a request of the article's mix, and their ratio; last, the model's."""
    if mix.empty:
        return NOTHING
    rows = [
        (f"{way}, {tokens} tokens an answer", *_bytes(part, int(part["streams"].iloc[0])))
        for way, part in mix.groupby("way", sort=False)
    ]
    for name, part in engine.groupby("way", sort=False):
        rows.append((str(name), *_bytes(part, int(part["requests"].iloc[0]))))
    columns = ("", "sent a request", "received a request", "received / sent", "connections opened")
    caption = f"{machine_caption()}. Frames on the client's wire, all headers and acknowledgements included. {SPREAD}"
    return Table(columns, tuple(rows), caption)


def bytes_figure(mix: pd.DataFrame, engine: pd.DataFrame, claimed: float) -> go.Figure | Shown:
    """The ratio, a bar a transport, beside the article's."""
    if mix.empty:
        return NOTHING
    parts = [(str(way), part) for table in (engine, mix) for way, part in table.groupby("way", sort=False)]
    return figures.ladder(
        _bars([(name, byte_ratio(part)) for name, part in parts]),
        "bytes received for each byte sent",
        title="How many bytes come back for each that was sent",
        note="Counted on the wire of the client. The same questions; what differs is how answers are wrapped.",
        reference=("the article's", claimed),
    )


def retransmission_figure(table: pd.DataFrame, loads: str) -> go.Figure | Shown:
    """Sent again, over the number of streams, one line a link. ``loads``: what a stream is, in words."""
    if table.empty:
        return NOTHING
    rows = []
    for link, part in links(table[table["way"] == str(HTTP1)]):
        for streams, runs in part.groupby("streams"):
            found = of_runs(runs["retransmitted"] * 100)
            rows.append((link, streams, found.value, found.low, found.high))
    return figures.lines(
        pd.DataFrame(rows, columns=["name", "streams", "value", "low", "high"]),
        "streams",
        "streams at once, each on a connection of its own",
        "segments sent again (%)",
        title="Retransmission begins where the link is full",
        note=f"{loads}. Median of the runs, and the least and the greatest.",
    )


def streams_table(table: pd.DataFrame) -> Table | Shown:
    """One row a link, way and number of streams: sent again, lateness, failures."""
    if table.empty:
        return NOTHING
    rows = []
    for link, part in links(table):
        for (way, streams), runs in part.groupby(["way", "streams"], sort=False):
            name, again = f"{link}: {way}, {streams} streams", of_runs(runs["retransmitted"], "share")
            rows.append((name, interval(again), *_latenesses(runs), _failed(runs)))
    columns = ("", "sent again", "late: P50", "P95", "P99", "streams failed")
    return Table(columns, tuple(rows), f"{machine_caption()}. {SPREAD}")


def loss_table(table: pd.DataFrame) -> Table | Shown:
    """One row a way, loss and congestion control: tokens held up, and how late they were."""
    if table.empty:
        return NOTHING
    rows = []
    for (congestion, _, way), part in table.groupby(["congestion", "loss", "way"], sort=False):
        name = f"{way}; {_percent(part)} lost, {congestion}"
        held = interval(of_runs(part["held"], "share"))
        rows.append((name, held, *_latenesses(part), interval(of_runs(part["ttft_ms"], "ms")), _failed(part)))
    columns = ("", "tokens held up", "late: P50", "P95", "P99", "time to first token", "streams failed")
    caption = (
        f"{machine_caption()}. Late: from when a token was due at the server to when the client had it, half a round "
        f"trip at least. Held up: by more than another half. {SPREAD}"
    )
    return Table(columns, tuple(rows), caption)


def loss_figure(table: pd.DataFrame, metric: str, congestion: str) -> go.Figure | Shown:
    """``metric`` ("held" or "p95_ms") over the loss, one line a way."""
    if table.empty:
        return NOTHING
    scale = 100 if metric == "held" else 1
    rows = []
    for (_, way), part in table[table["congestion"] == congestion].groupby(["loss", "way"], sort=False):
        found = of_runs(part[metric] * scale)
        rows.append((way, 100 * part["loss"].iloc[0], found.value, found.low, found.high))
    title, axis = {
        "held": ("One lost packet holds up whoever shares its connection", "tokens held up (%)"),
        "p95_ms": ("How late tokens come when packets are lost", "lateness, P95 (ms)"),
    }[metric]
    return figures.lines(
        pd.DataFrame(rows, columns=["name", "loss", "value", "low", "high"]),
        "loss",
        "packets lost (%)",
        axis,
        title=title,
        note=f"Congestion control: {congestion}. Median of the runs, and the least and the greatest.",
    )


def uploads_figure(table: pd.DataFrame) -> go.Figure:
    """Time to the first token, whole and in chunks."""
    rows = []
    for prompt in (AT_HAND, AS_IT_COMES):
        for chunked, how in ((False, "whole"), (True, "in chunks")):
            part = table[(table["prompt"] == prompt) & (table["chunked"] == chunked)]
            rows.append((f"prompt {prompt}: {how}", of_runs(part["ttft_ms"], "ms")))
    return figures.ladder(
        _bars(rows),
        "time to first token (ms)",
        title="A long prompt, sent whole and in chunks",
        note="From when its first piece is there. Median of the requests, and the least and the greatest.",
    )


def edge_figure(table: pd.DataFrame) -> go.Figure | Shown:
    """Directly and by the edge: new connections, open ones, and the lateness of streams at the most losses."""
    if table.empty:
        return NOTHING
    worst = table["loss"].max()
    kinds: tuple[tuple[str, float, str], ...] = (
        ("new connection, first token", 0.0, "cold_ms"),
        ("open connection, first token", 0.0, "warm_ms"),
        (f"streams, {100 * worst:g} % lost: late (P95)", worst, "p95_ms"),
    )
    rows = [
        (f"{name}: {way}", of_runs(table[(table["way"] == way) & (table["loss"] == loss)][metric], "ms"))
        for name, loss, metric in kinds
        for way in (DIRECT, EDGE)
    ]
    return figures.ladder(
        _bars(rows),
        "milliseconds",
        title="What an edge near the client changes",
        note="Median of the runs, and the least and the greatest.",
    )


def network_takeaway(
    mix: pd.DataFrame, streams: pd.DataFrame, losses: pd.DataFrame, chunks: pd.DataFrame, edge: pd.DataFrame
) -> str:
    """What the measurements say, in Markdown."""
    lines = []
    if not mix.empty:
        ratios = [byte_ratio(part).value for _, part in mix.groupby("way")]
        lines.append(
            f"**Bytes.** The same questions and answers are {digits(min(ratios))} to {digits(max(ratios))} bytes back "
            "for each byte sent, by transport: the ratio says how answers are wrapped, and how long they are."
        )
    if not streams.empty:
        begins = "; ".join(
            f"{link}: {'not at all' if count is None else f'at {count} streams'}"
            for link, count in knees(streams[streams["way"] == str(HTTP1)]).items()
        )
        lines.append(f"**Retransmission** begins where the link is full, not at a number of users ({begins}).")
    if not losses.empty:
        worst = usual(losses)[usual(losses)["loss"] == losses["loss"].max()]
        held = {way: _of(worst, way, "held") for way in (HTTP1, HTTP2, GRPC, GRPC_APART)}
        lines.append(
            f"**Head-of-line blocking** is TCP's, not gRPC's: with {_percent(worst)} of the packets lost, "
            f"{_share(held[GRPC])} of the tokens were held up on one gRPC channel and {_share(held[HTTP2])} on one "
            f"HTTP/2 connection, {_share(held[GRPC_APART])} on channels of their own and {_share(held[HTTP1])} over "
            "HTTP/1.1. Sharing a connection pays on a full link and costs on one that loses packets."
        )
    saved = {prompt: _chunk_gain(chunks, prompt) for prompt in (AT_HAND, AS_IT_COMES)}
    lines.append(
        f"**Chunks** bring the first token {_sooner(saved[AS_IT_COMES])} when the prompt itself comes piece by piece, "
        f"and {_sooner(saved[AT_HAND])} when it is at hand."
    )
    if not edge.empty:
        clean = edge[edge["loss"] == 0]
        gained = {metric: _edge_gain(clean, metric) for metric in ("cold_ms", "warm_ms")}
        lines.append(
            f"**An edge** brings the first token {_sooner(gained['cold_ms'])} over a new connection, and "
            f"{_sooner(gained['warm_ms'])} over an open one: what it shortens is handshakes and the way of what is "
            "sent again, not the way itself."
        )
    return "\n".join(f"- {line}" for line in lines)


def _bytes(part: pd.DataFrame, requests: int) -> tuple[str, str, str, str]:
    each: Callable[[str], str] = lambda name: quantity(of_runs(part[name] / requests / 1e3).value, "kB")  # noqa: E731
    opened = quantity(of_runs(part["connections"]).value)
    return each("up_bytes"), each("down_bytes"), interval(byte_ratio(part)), opened


def _latenesses(part: pd.DataFrame) -> list[str]:
    return [interval(of_runs(part[name], "ms")) for name in ("p50_ms", "p95_ms", "p99_ms")]


def _failed(part: pd.DataFrame) -> str:
    return f"{part['failures'].sum()} of {part['streams'].sum()}"


def _bars(rows: Sequence[tuple[str, Estimate]]) -> pd.DataFrame:
    return pd.DataFrame(
        [(name, each.value, each.low, each.high, each.unit) for name, each in rows if not math.isnan(each.value)],
        columns=["rung", "value", "low", "high", "unit"],
    )


def _of(table: pd.DataFrame, way: object, metric: str) -> float:
    return of_runs(table[table["way"] == str(way)][metric]).value


def _percent(table: pd.DataFrame) -> str:
    return f"{100 * table['loss'].iloc[0]:g}\u00a0%"


def _sooner(ms: float) -> str:
    if abs(ms) < 1:
        return "no sooner"
    return f"{digits(abs(ms))}\u00a0ms {'sooner' if ms > 0 else 'later'}"


def _share(value: float) -> str:
    return quantity(value, "share")


def _chunk_gain(table: pd.DataFrame, prompt: str) -> float:
    part = table[table["prompt"] == prompt]
    return float(part[~part["chunked"]]["ttft_ms"].median() - part[part["chunked"]]["ttft_ms"].median())


def _edge_gain(table: pd.DataFrame, metric: str) -> float:
    return float(
        table[table["way"] == DIRECT][metric].median() - table[table["way"] == EDGE][metric].median()
    )  # fmt: skip
