from __future__ import annotations

import pandas as pd
import pytest

from labkit.experiments.network import rules
from labkit.experiments.network.sweeps import AS_IT_COMES, AT_HAND, DIRECT, EDGE


def runs(variants: list[dict], **metrics) -> pd.DataFrame:
    """Three runs of every variant, which hold ``metrics[name](variant)`` times 0.99, 1 and 1.01."""
    rows = []
    for variant in variants:
        values = {name: value(variant) for name, value in metrics.items()}
        for repeat, factor in enumerate((0.99, 1.0, 1.01)):
            row = {name: value * factor for name, value in values.items()}
            rows.append({**variant, "repeat": repeat, "invalid": "", **row})
    return pd.DataFrame(rows)


WAYS = [str(way) for way in (rules.HTTP1, rules.HTTP2, rules.GRPC, rules.GRPC_APART)]


def losses(held_on_one: float = 0.4, late_on_one: float = 80.0) -> pd.DataFrame:
    variants = [{"way": way, "loss": loss, "congestion": "cubic"} for way in WAYS for loss in (0.0, 0.03)]
    one = {str(rules.GRPC), str(rules.HTTP2)}
    return runs(
        variants,
        held=lambda v: held_on_one if v["way"] in one and v["loss"] else 0.1,
        p95_ms=lambda v: late_on_one if v["way"] in one and v["loss"] else 30.0 + 30 * (v["loss"] > 0),
        p99_ms=lambda v: late_on_one if v["way"] in one and v["loss"] else 40.0 + 30 * (v["loss"] > 0),
        ttft_ms=lambda v: 150.0 if v["way"] in one else 190.0,
    )


def streams(again=lambda v: 0.15 if v["streams"] == 300 else 0.0) -> pd.DataFrame:
    variants = [
        {"way": way, "streams": count, "rate_mbit": 8.0, "buffer_kb": buffer}
        for way in WAYS[:2]
        for count in (100, 200, 300)
        for buffer in (16.0, 64.0)
    ]
    return runs(variants, retransmitted=again, p95_ms=lambda v: 900.0 if v["way"] == WAYS[0] else 400.0)


@pytest.mark.parametrize(("back", "outcome"), [(3700.0, "confirmed"), (3400.0, "confirmed"), (2000.0, "refuted")])
def test_the_ratio_of_bytes_is_held_against_the_articles(back, outcome):
    table = runs([{"transport": "http/1.1"}], up_bytes=lambda v: 1000.0, down_bytes=lambda v: back)
    table["up_bytes"] = 1000.0
    verdict = rules.judge_bytes(table)
    assert verdict.outcome == outcome and verdict.evidence[0].value == pytest.approx(back / 1000)


def test_where_retransmission_begins_depends_on_the_link_or_not():
    everywhere = rules.judge_retransmission(streams())
    assert everywhere.outcome == "confirmed" and "15.0 %" in str(everywhere.evidence[0])
    small_only = streams(lambda v: 0.15 if v["streams"] > 100 and v["buffer_kb"] == 16 else 0.0)
    verdict = rules.judge_retransmission(small_only)
    assert verdict.outcome == "partly" and "on every link: no" in verdict.reason
    assert rules.knees(small_only) == {"8 Mbit/s, buffer 16 kB": 200, "8 Mbit/s, buffer 64 kB": None}
    assert rules.judge_retransmission(streams(lambda v: 0.0)).outcome == "refuted"  # at none is at no number


def test_blocking_is_what_one_connection_does_to_others_when_packets_are_lost():
    assert rules.judge_blocking(losses(0.4, 200.0)).outcome == "confirmed"
    assert rules.judge_blocking(losses(0.4, 60.0)).outcome == "partly"  # the latest tokens are not later
    nothing = rules.judge_blocking(losses(0.1, 60.0))
    assert "share a channel: no" in nothing.reason and nothing.outcome == "partly"


def test_the_usual_congestion_control_is_judged_by_itself():
    other = losses(held_on_one=0.01, late_on_one=5.0).assign(congestion="bbr")
    both = pd.concat([losses(0.4, 200.0), other], ignore_index=True)
    assert rules.judge_blocking(both) == rules.judge_blocking(losses(0.4, 200.0))
    assert rules.judge_multiplexing(streams(), both).outcome == "partly"


def test_multiplexing_is_asked_of_three_links():
    assert rules.judge_multiplexing(streams(), losses(late_on_one=20.0)).outcome == "confirmed"
    assert rules.judge_multiplexing(streams(), losses(late_on_one=200.0)).outcome == "partly"


def test_chunks_are_asked_of_two_kinds_of_prompts():
    variants = [{"prompt": prompt, "chunked": how} for prompt in (AT_HAND, AS_IT_COMES) for how in (False, True)]
    verdict = rules.judge_chunks(
        runs(variants, ttft_ms=lambda v: 200.0 if v["chunked"] and v["prompt"] == AS_IT_COMES else 400.0)
    )
    assert verdict.outcome == "partly" and "at hand: no" in verdict.reason and "piece by piece: yes" in verdict.reason


def test_an_edge_is_asked_of_new_and_open_connections_and_of_losses():
    variants = [{"way": way, "loss": loss} for way in (DIRECT, EDGE) for loss in (0.0, 0.03)]
    table = runs(
        variants,
        cold_ms=lambda v: 230.0 if v["way"] == EDGE else 410.0,
        warm_ms=lambda v: 200.0,
        p95_ms=lambda v: 70.0 if v["way"] == EDGE else 150.0,
    )
    verdict = rules.judge_edge(table)
    assert verdict.outcome == "partly" and "open connection: no" in verdict.reason
    assert [item.value for item in verdict.evidence] == pytest.approx([410 / 230, 1.0, 150 / 70], rel=0.03)


def test_runs_over_a_link_that_was_off_do_not_count():
    table = losses()
    table.loc[(table["way"] == WAYS[2]) & (table["repeat"] == 1), "invalid"] = "RTT 55 ms for 40 ms"
    verdict = rules.judge_blocking(table)
    assert verdict.outcome == "no verdict" and "RTT 55 ms for 40 ms" in verdict.reason
    table.loc[table["way"] == WAYS[2], "invalid"] = "RTT 55 ms for 40 ms"
    assert rules.judge_blocking(table).outcome == "no verdict"


def test_without_a_wire_nothing_is_testable():
    nothing = pd.DataFrame()
    for verdict in (
        rules.judge_bytes(nothing),
        rules.judge_retransmission(nothing),
        rules.judge_blocking(nothing),
        rules.judge_multiplexing(nothing, nothing),
        rules.judge_edge(nothing),
    ):
        assert verdict.outcome == "not testable here" and "namespaces" in verdict.reason
