"""The rules for the claims about the first deployment: each outcome from runs made by hand."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from labkit.experiments import rules
from labkit.experiments.store import Run
from labkit.traffic.events import events_table

GPU = {"machine": {"gpus": [{"name": "a GPU"}]}}


def record(index, sent, end, prompt=100):
    return {
        "index": index, "bucket": "short", "family": "net", "scheduled": sent, "sent": sent, "first_byte": end,
        "chunks": [(end, 10, "answer")], "end": end, "failure": "", "message": "", "finish_reason": "stop",
        "prompt_tokens": prompt, "completion_tokens": 10, "reasoning": "", "text": "x", "correct": True,
    }  # fmt: skip


def made_run(records, window, users=1, samples=(), **manifest):
    """A run that was never on disk."""
    facts = {"window": window, "workload": {"users": users}, "machine": {"gpus": []}, **manifest}
    run = Run(Path("made-by-hand"), facts)
    run.__dict__["events"] = events_table(records)
    run.__dict__["samples"] = pd.DataFrame(list(samples), columns=["t_s", "probe", "name", "value"])
    return run


def traffic(latency_s, count=200, users=8, window=None, samples=(), **manifest):
    records = [record(i, float(i), float(i) + latency_s) for i in range(count)]
    return made_run(records, window or (0.0, count + latency_s), users, samples, **manifest)


def readings(probe, name, values):
    return [(float(t), probe, name, float(value)) for t, value in enumerate(values)]


@pytest.mark.parametrize(
    ("latency_s", "users", "seconds", "machine", "outcome"),
    [
        (2.0, 100, 300, GPU, "refuted"),  # fewer users than claimed, and already too slow
        (2.0, 8, 300, {}, "not testable here"),  # no GPU
        (0.5, 300, 300, GPU, "not testable here"),  # not four hours
        (0.5, 100, 15_000, GPU, "not testable here"),  # not 300 users
        (0.5, 300, 15_000, GPU, "confirmed"),
    ],
)
def test_the_service_level(latency_s, users, seconds, machine, outcome):
    verdict = rules.judge_service_level([traffic(latency_s, users=users, window=(0.0, float(seconds)), **machine)])
    assert verdict.outcome == outcome
    assert "200 of 200" in verdict.reason if latency_s > 1 else "0 of 200" in verdict.reason
    if outcome == "not testable here":
        assert "It would take" in verdict.reason


def test_the_service_level_is_judged_where_the_most_users_were():
    fast, slow = traffic(0.5, users=1, **GPU), traffic(2.0, users=8, **GPU)
    assert rules.judge_service_level([slow, fast]).outcome == "refuted"


def test_few_requests_do_not_decide_and_an_invalid_run_gives_no_verdict():
    few = rules.judge_service_level([traffic(0.5, count=20, users=300, window=(0.0, 15_000.0), **GPU)])
    assert few.outcome == "not testable here" and "90 requests would" in few.reason
    broken = rules.judge_service_level([traffic(2.0, valid=False, reasons=["the client was slow"], **GPU)])
    assert (broken.outcome, broken.reason) == ("no verdict", "The client was slow.")


def test_the_collapse_is_partly_seen_without_a_gpu():
    samples = readings("engine", "waiting", [6] * 50) + readings("host", "cpu", [99.5] * 50)
    verdict = rules.judge_collapse([traffic(2.0, samples=samples)])
    assert verdict.outcome == "partly"
    assert "most of the time): yes" in verdict.reason and "98 %: yes" in verdict.reason
    assert "memory (needs a GPU): not observable here" in verdict.reason and "goes down: no" in verdict.reason
    assert "minute 27" in verdict.reason
    assert [item.value for item in verdict.evidence] == pytest.approx([6.0, 99.5])


def test_a_server_that_died_and_one_that_idles():
    samples = readings("engine", "waiting", [0] * 50) + readings("host", "cpu", [30] * 50)
    died = rules.judge_collapse([traffic(2.0, samples=samples, server={"died": "killed by SIGKILL"})])
    assert "the service goes down: yes" in died.reason and died.outcome == "partly"
    idle = rules.judge_collapse([traffic(2.0, samples=samples, window=(0.0, 3600.0))])
    assert idle.outcome == "refuted"


@pytest.mark.parametrize(("shares", "word"), [((12, 6, 2), "yes"), ((2, 2, 16), "no")])
def test_the_mix_is_counted_by_length(shares, word):
    lengths = [100] * shares[0] + [1000] * shares[1] + [3000] * shares[2]
    records = [record(i, float(i), i + 0.5, prompt=length) for i, length in enumerate(lengths * 5)]
    verdict = rules.judge_mix([made_run(records, (0.0, 101.0))])
    assert f"Short prompts are 60 % of what is sent here: {word}" in verdict.reason
    assert verdict.outcome == ("partly" if word == "yes" else "refuted")


def test_the_sawtooth_needs_a_gpu_and_swings():
    absent = {"probes": {"probes": {"gpu": {"description": "absent: no driver"}}}}
    without = rules.judge_sawtooth([traffic(2.0, **absent)])
    assert without.outcome == "not testable here" and "absent: no driver" in without.reason
    saw = rules.judge_sawtooth([traffic(2.0, samples=readings("gpu", "utilisation", [100, 0] * 20), **GPU)])
    flat = rules.judge_sawtooth([traffic(2.0, samples=readings("gpu", "utilisation", [60] * 40), **GPU)])
    assert (saw.outcome, flat.outcome) == ("confirmed", "refuted")


@pytest.mark.parametrize(
    ("values", "count"),
    [([0, 100, 0], 1), ([100, 50, 100, 0, 0, 5], 1), ([50, 60], 0), ([95, 5, 95, 5, 95], 2), ([], 0)],
)
def test_swings_are_counted(values, count):
    assert rules.swings(values) == count


def test_pressure_on_the_host():
    def run(queue, swapped, space=2**30):
        samples = readings("host", "runnable", [queue] * 50) + readings("host", "swap_in_bytes", [0] * 49 + [swapped])
        return traffic(2.0, samples=samples + readings("host", "swap_total_bytes", [space] * 50))

    assert rules.judge_pressure([run(9, 4096)]).outcome == "confirmed"
    assert rules.judge_pressure([run(9, 0)]).outcome == "partly"
    assert rules.judge_pressure([run(2, 0)]).outcome == "refuted"
    no_space = rules.judge_pressure([run(9, 0, space=0)])
    assert no_space.outcome == "partly" and "no swap space): not observable here" in no_space.reason
    assert rules.judge_pressure([traffic(2.0)]).outcome == "not testable here"


def batch_run(size, seconds, samples=(), **manifest):
    records = [record(size * k + i, seconds * k, seconds * (k + 1)) for k in range(5) for i in range(size)]
    return made_run(records, (0.0, 5 * seconds), size, samples, **manifest)


def test_a_batch_of_32():
    memory = readings("gpu", "memory_used_bytes", [40e9] * 5) + readings("gpu", "memory_total_bytes", [96e9] * 5)
    assert rules.judge_batch([batch_run(32, 2.1, memory, **GPU)]).outcome == "confirmed"
    assert rules.judge_batch([batch_run(32, 0.4, memory, **GPU)]).outcome == "partly"
    assert rules.judge_batch([batch_run(8, 2.1, memory, **GPU)]).outcome == "not testable here"
    without = rules.judge_batch([batch_run(8, 5.0)])
    assert without.outcome == "not testable here" and without.evidence[0].value == pytest.approx(5.0)


def test_a_slow_answer_counts_as_an_error_of_a_client_that_gives_up():
    found = rules.slow_as_failed([traffic(6.0), traffic(1.0)])
    assert (found.value, found.n) == (0.5, 400) and found.low < 0.5 < found.high
