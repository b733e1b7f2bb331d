"""Metrics of requests whose every event time is set by hand: exact expectations."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from labkit.experiments import metrics
from labkit.experiments.metrics import SLO, requests_table
from labkit.traffic.events import events_table


def record(
    index,
    scheduled=0.0,
    sent=None,
    first_byte=None,
    chunks=(),
    end=None,
    failure="",
    correct=None,
    bucket="short",
    tokens=0,
):
    sent = scheduled if sent is None else sent
    chunks = [(t, n, part) for t, n, part in chunks]
    return {
        "index": index, "bucket": bucket, "family": "net", "scheduled": scheduled, "sent": sent,
        "first_byte": first_byte, "chunks": chunks, "end": end if end is not None else chunks[-1][0],
        "failure": failure, "message": "m" * bool(failure),
        "finish_reason": "stop", "prompt_tokens": 5, "completion_tokens": tokens or sum(n for _, n, _ in chunks),
        "reasoning": "", "text": "x", "correct": correct,
    }  # fmt: skip


def scripted(index, scheduled, ttft, itl, tokens, reasoning=0, lag=0.0, **more):
    """A request of known timing: sent ``lag`` late, tokens at sent + ttft + k itl."""
    sent = scheduled + lag
    chunks = [(sent + ttft + k * itl, 1, "reasoning" if k < reasoning else "answer") for k in range(tokens)]
    return record(index, scheduled, sent, sent + ttft / 2, chunks, chunks[-1][0] + 0.001, **more)


def steady(n=100, lag=0.0):
    """One request a second; request i takes ttft (i+1) ms, then 10 tokens 20 ms apart, the first 4 of them
    reasoning."""
    return requests_table(events_table(scripted(i, float(i), (i + 1) / 1000, 0.02, 10, 4, lag) for i in range(n)))


WINDOW = (0.0, 100.0)


def test_the_table_holds_what_happened_to_each_request():
    table = requests_table(events_table([
        scripted(3, 1.0, 0.5, 0.1, 3, 1, lag=0.25, correct=True, bucket="long"),
        record(7, 2.0, end=2.5, failure="shed"),
    ]))  # fmt: skip
    good, bad = table.loc[3], table.loc[7]
    assert good[["scheduled", "sent", "first_byte", "first_token"]].tolist() == pytest.approx([1.0, 1.25, 1.5, 1.75])
    assert good[["first_answer", "last_token", "end"]].tolist() == pytest.approx([1.85, 1.95, 1.951])
    assert (good["tokens"], good["prompt_tokens"], good["failure"], good["finish"]) == (3, 5, "", "stop")
    assert (good["bucket"], good["correct"], bad["failure"], bad["text"]) == ("long", True, "shed", "m")
    assert math.isnan(bad["first_token"]) and pd.isna(bad["correct"]) and len(bad["chunk_t"]) == 0


def test_latency_from_both_clocks():
    table = steady(lag=0.5)
    # E2E from sent is ttft + 9 * 20 ms + 1 ms; the 95th smallest of ttft = 1 … 100 ms is 95 ms.
    assert metrics.latency(table, WINDOW, 95, "sent").value == pytest.approx(0.095 + 0.18 + 0.001)
    assert metrics.latency(table, WINDOW, 95).value == pytest.approx(0.5 + 0.095 + 0.18 + 0.001)
    assert metrics.latency(table, WINDOW, 50).value == pytest.approx(0.5 + 0.050 + 0.18 + 0.001)
    assert metrics.mean_latency(table, WINDOW, "sent").value == pytest.approx(0.0505 + 0.181)


def test_first_byte_token_and_answer():
    table = steady(lag=0.5)
    assert metrics.ttfb(table, WINDOW, 50).value == pytest.approx(0.025)
    assert metrics.ttft(table, WINDOW, 50).value == pytest.approx(0.050)
    assert metrics.ttft(table, WINDOW, 50, "scheduled").value == pytest.approx(0.550)
    assert metrics.first_answer(table, WINDOW, 50).value == pytest.approx(0.050 + 4 * 0.02)


def test_time_between_tokens():
    table = steady()
    assert metrics.tpot(table, WINDOW, 95).value == pytest.approx(0.02)
    assert metrics.itl(table, WINDOW, 95).value == pytest.approx(0.02)
    assert metrics.itl(table, WINDOW, 95).n == 900


def test_chunks_of_several_tokens():
    # 1 token at 1.0, then 4 at 1.4, then 2 at 1.5: raw gaps 0.4, 0.1; per token 4 x 0.1, 2 x 0.05; TPOT 0.5 / 6
    chunks = [(1.0, 1, "answer"), (1.4, 4, "answer"), (1.5, 2, "answer")]
    table = requests_table(events_table([record(0, 0.0, chunks=chunks)]))
    assert metrics.itl(table, WINDOW, 99).value == pytest.approx(0.4)
    assert metrics.itl(table, WINDOW, 30, per_token=True).value == pytest.approx(0.05)
    assert metrics.itl(table, WINDOW, 34, per_token=True).value == pytest.approx(0.1)
    assert metrics.tpot(table, WINDOW).value == pytest.approx(0.5 / 6)


def test_lateness_is_of_every_token_from_its_own_time():
    # Tokens due at 1.0, 1.1, 1.2, 1.3 came at 1.05 and, three together, at 1.35: late by 0.05, 0.25, 0.15, 0.05.
    chunks = [(1.05, 1, "answer"), (1.35, 3, "answer")]
    rows = [record(0, 0.0, chunks=chunks), record(1, 0.0, end=2.0, failure="truncated"), scripted(2, 200.0, 1, 1, 1)]
    table = requests_table(events_table(rows))
    due = {0: np.array([1.0, 1.1, 1.2, 1.3])}
    late = {q: metrics.lateness(table, WINDOW, due, q).value for q in (50, 75, 99)}
    assert late == {50: pytest.approx(0.05), 75: pytest.approx(0.15), 99: pytest.approx(0.25)}
    assert metrics.lateness(table, WINDOW, due).n == 4  # neither the failed request's nor those after the window
    with pytest.raises(ValueError, match="request 0: 4 tokens came, 3 were scheduled"):
        metrics.lateness(table, WINDOW, {0: due[0][:3]})
    assert math.isnan(metrics.lateness(table.loc[[1]], WINDOW, {}).value)


def test_an_answer_in_one_chunk_has_no_tpot():
    table = requests_table(events_table([record(0, 0.0, chunks=[(1.0, 9, "answer")])]))
    assert math.isnan(metrics.tpot(table, WINDOW).value)
    assert math.isnan(metrics.itl(table, WINDOW).value) or metrics.itl(table, WINDOW).n == 0


def test_throughput_is_over_the_window_only():
    table = steady()
    window = (9.9, 19.9)  # requests 10 … 19 are sent and end inside; their 100 tokens too
    assert metrics.throughput(table, window).value == pytest.approx(1.0)
    assert metrics.throughput(table, window).n == 10
    assert metrics.token_throughput(table, window).value == pytest.approx(10.0)
    assert metrics.latency(table, window, 50).n == 10


def test_an_answer_that_ends_after_the_window_counts_its_tokens_but_not_itself():
    chunks = [(float(t), 1, "answer") for t in range(1, 5)]
    table = requests_table(events_table([record(0, 0.0, chunks=chunks, tokens=8)]))
    # Two of four chunks come before 2.5 s; the 8 tokens of usage are shared out over the four.
    assert metrics.token_throughput(table, (0.0, 2.5)).value == pytest.approx(4 / 2.5)
    assert metrics.throughput(table, (0.0, 2.5)).value == 0.0


def mixed():
    good = [
        scripted(i, i / 10, 0.1, 0.01, 5, correct=i % 4 != 0, bucket="short" if i % 2 else "long") for i in range(80)
    ]
    bad = [record(80 + i, 8.0 + i / 10, end=8.1 + i / 10, failure="shed" if i < 15 else "timeout") for i in range(20)]
    return requests_table(events_table([*good, *bad]))


def test_failures_are_misses():
    table = mixed()
    window = (0.0, 10.0)
    assert metrics.latency(table, window, 95).value == pytest.approx(0.141)
    assert metrics.adjusted_latency(table, window, 80).value == pytest.approx(0.141)
    assert metrics.adjusted_latency(table, window, 81).value == math.inf
    assert metrics.attainment(table, window, SLO(latency_s=1.0)).value == 0.8
    assert metrics.attainment(table, window, SLO(latency_s=0.1)).value == 0.0
    assert metrics.goodput(table, window, SLO(latency_s=1.0, ttft_s=0.2, tpot_s=0.02)).value == pytest.approx(8.0)
    assert metrics.goodput(table, window, SLO(tpot_s=0.005)).value == 0.0
    assert metrics.error_rate(table, window).value == 0.2
    assert {kind: e.value for kind, e in metrics.error_rates(table, window).items()} == {"shed": 0.15, "timeout": 0.05}


def test_whether_a_p95_is_shown_to_be_within_a_limit():
    window = (0.0, 10.0)
    assert metrics.within_limit(mixed(), window, 1.0).verdict == "over"  # a fifth failed
    assert metrics.within_limit(mixed(), window, 1.0).misses == 20
    assert metrics.within_limit(mixed(), window, 1.0, q=50).verdict == "within"
    assert metrics.within_limit(mixed(), (0.0, 3.0), 1.0).verdict == "undecided"


def test_accuracy_is_of_the_answers_that_came():
    assert metrics.accuracy(mixed(), (0.0, 10.0)).value == 0.75
    assert metrics.accuracy(mixed(), (0.0, 10.0)).n == 80
    assert metrics.accuracy(steady(), WINDOW).n == 0


def test_a_metric_by_bucket():
    by = metrics.grouped(lambda part: metrics.accuracy(part, (0.0, 10.0)), mixed()[lambda t: t["failure"] == ""])
    assert {bucket: estimate.value for bucket, estimate in by.items()} == {"long": 0.5, "short": 1.0}


def test_littles_law_holds_where_nothing_crosses_the_window():
    law = metrics.littles_law(steady(lag=0.25), (0.0, 110.0))
    assert law.in_flight == pytest.approx(law.throughput * law.latency_s)
    assert law.difference == pytest.approx(0.0, abs=1e-12)


def test_littles_law_shows_numbers_that_do_not_fit():
    # One request of 10 s that began before a window of 1 s and ends after it: in flight 1, nothing ended.
    table = requests_table(events_table([record(0, 0.0, chunks=[(10.0, 1, "answer")])]))
    law = metrics.littles_law(table, (4.0, 5.0))
    assert (law.in_flight, law.throughput) == (1.0, 0.0)
    assert math.isnan(law.difference)


def test_events_of_a_run_that_did_not_end_are_refused():
    events = events_table([scripted(0, 0.0, 0.1, 0.1, 3)])
    with pytest.raises(ValueError, match="neither ended nor failed"):
        requests_table(events[events["kind"] != "done"])


def test_no_requests_at_all():
    table = requests_table(events_table([]))
    for metric in (metrics.latency, metrics.ttft, metrics.tpot, metrics.itl, metrics.accuracy, metrics.error_rate):
        assert math.isnan(metric(table, WINDOW).value)
    assert metrics.throughput(table, WINDOW).value == 0.0
    assert (
        math.isnan(metrics.token_throughput(table, WINDOW).value) or metrics.token_throughput(table, WINDOW).value == 0
    )


def test_the_interval_of_a_throughput_reflects_its_unevenness():
    even = requests_table(events_table(record(i, i * 0.1, chunks=[(i * 0.1 + 0.05, 1, "answer")]) for i in range(200)))
    lumpy = requests_table(
        events_table(record(i, 0.0, chunks=[(5.0 * (1 + i // 50) - 0.01, 1, "answer")]) for i in range(200))
    )
    tight, wide = metrics.throughput(even, (0.0, 20.0)), metrics.throughput(lumpy, (0.0, 20.0))
    assert tight.value == wide.value == pytest.approx(10.0)
    assert tight.high - tight.low < 0.5 < wide.high - wide.low
    assert np.isfinite([tight.low, wide.high]).all()
