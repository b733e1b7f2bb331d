from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from labkit.experiments.network.rules import GRPC, GRPC_APART, HTTP1, HTTP2
from labkit.experiments.network.sweeps import AS_IT_COMES, AT_HAND, DIRECT, EDGE
from labkit.report import network

WIRE = {"connections": 4, "invalid": "", "failures": 0}
LATE = {"p50_ms": 24.0, "p95_ms": 60.0, "p99_ms": 110.0, "ttft_ms": 190.0}


def table(*rows: dict[str, Any], **runs: list[float]) -> pd.DataFrame:
    """Every row three times, with the three values of each of ``runs``."""
    return pd.DataFrame(
        [
            {**WIRE, **LATE, **row, "repeat": repeat, **{name: values[repeat] for name, values in runs.items()}}
            for row in rows
            for repeat in range(3)
        ]
    )


MIX = table({"way": "grpc", "streams": 10, "up_bytes": 20_000}, down_bytes=[10_000, 14_000, 12_000])
ENGINE = table({"way": "the model", "requests": 5, "up_bytes": 25_000, "down_bytes": 92_500})
STREAMS = table(
    *({"way": str(HTTP1), "streams": n, "rate_mbit": 8.0, "buffer_kb": kb} for n in (50, 300) for kb in (16.0, 256.0)),
    retransmitted=[0.1, 0.3, 0.2],
)
LOSSES = table(
    *({"way": str(way), "streams": 40, "loss": loss, "congestion": "cubic"}
      for way in (HTTP1, HTTP2, GRPC, GRPC_APART) for loss in (0.0, 0.03)),
    held=[0.2, 0.4, 0.3],
)  # fmt: skip
CHUNKS = table(*({"prompt": p, "chunked": c} for p in (AT_HAND, AS_IT_COMES) for c in (False, True)))
EDGES = table(
    *({"way": way, "loss": loss, "cold_ms": 420.0 if way == DIRECT else 230.0, "warm_ms": 200.0}
      for way in (DIRECT, EDGE) for loss in (0.0, 0.03))
)  # fmt: skip


def test_bytes_are_those_of_one_request_and_the_ratio_is_that_of_the_runs():
    text = network.bytes_table(MIX, ENGINE, 64).text(140)
    assert "grpc, 64 tokens an answer" in text and "2.00\u00a0kB" in text and "1.20\u00a0kB" in text
    assert "0.600× 0.500 to 0.700" in text  # 12 over 20, from 10 to 14
    assert "5.00\u00a0kB" in text and "3.70× 3.70 to 3.70" in text  # the model's
    figure = network.bytes_figure(MIX, ENGINE, 3.7)
    assert list(figure.data[0].x) == pytest.approx([3.7, 0.6])
    assert any("3.70" in note.text for note in figure.layout.annotations)


def test_retransmission_is_a_line_a_link():
    figure = network.retransmission_figure(STREAMS, "Each stream: a token every 50 ms")
    lines = {trace.name: (list(trace.x), list(trace.y)) for trace in figure.data if trace.name}
    assert lines["8 Mbit/s, buffer 16 kB"][0] == [50, 300] and lines["8 Mbit/s, buffer 16 kB"][1] == [20, 20]
    assert "8 Mbit/s, buffer 256 kB" in lines
    assert "20.0\u00a0% 10.0 to 30.0" in network.streams_table(STREAMS).text(160)


def test_losses_are_shown_by_way_and_loss():
    text = network.loss_table(LOSSES).text(160)
    assert "grpc, one connection; 3\u00a0% lost, cubic" in text and "30.0\u00a0% 20.0 to 40.0" in text
    assert "0 of 120" in text
    figure = network.loss_figure(LOSSES, "held", "cubic")
    assert {tuple(trace.x) for trace in figure.data} == {(0.0, 3.0)}
    assert {tuple(trace.y) for trace in figure.data} == {(30.0, 30.0)}
    assert {tuple(trace.y) for trace in network.loss_figure(LOSSES, "p95_ms", "cubic").data} == {(60.0, 60.0)}


def test_the_edge_and_the_chunks_are_bars():
    assert list(network.edge_figure(EDGES).data[0].x) == [420, 230, 200, 200, 60, 60]
    assert len(network.uploads_figure(CHUNKS).data[0].x) == 4


def test_links_that_were_off_are_told_from_those_that_count():
    laid = {"asked": "RTT 40 ms", "congestion": "cubic", "rtt_ms": 40.2, "lost": 3, "sent": 300, "rate_mbit": None}
    text = network.conditions_table([laid | {"off": ""}, laid | {"off": "RTT 55 ms for 40 ms"}]).text(160)
    assert "3 of 300" in text and "yes" in text and "RTT 55 ms for 40 ms" in text


def test_the_takeaway_says_the_measured_numbers():
    text = network.network_takeaway(MIX, STREAMS, LOSSES, CHUNKS, EDGES)
    assert "0.600 to 0.600 bytes" in text and "16 kB: at 50 streams" in text
    assert "3\u00a0% of the packets lost" in text
    assert "190\u00a0ms sooner over a new" in text and "no sooner over an open" in text


def test_what_was_not_measured_is_said_to_be_so():
    nothing = pd.DataFrame()
    for shown in (
        network.bytes_table(nothing, ENGINE, 64),
        network.bytes_figure(nothing, ENGINE, 3.7),
        network.retransmission_figure(nothing, ""),
        network.streams_table(nothing),
        network.loss_table(nothing),
        network.loss_figure(nothing, "held", "cubic"),
        network.edge_figure(nothing),
    ):
        assert shown is network.NOTHING
    assert "Chunks" in network.network_takeaway(nothing, nothing, nothing, CHUNKS, nothing)
