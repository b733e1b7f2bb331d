from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from labkit.traffic.calibrate import (
    Calibration,
    audit_arrivals,
    calibrate,
    client_reasons,
    gap_statistics,
    script_like,
)
from labkit.traffic.events import events_table
from labkit.traffic.generate import Load
from labkit.traffic.golden import Script
from labkit.traffic.workload import Workload

GOOD = Calibration(40, 0.5, 0.001, 0.005, 0.01, 0.001, 0)


def events(n=50, late=0.0, latency=1.0):
    return events_table(
        {
            "index": i, "bucket": "short", "family": "", "scheduled": i / 10, "sent": i / 10 + late, "first_byte": None,
            "chunks": [(i / 10 + late + 0.25 + k * 0.05, 1, "answer") for k in range(11)], "end": i / 10 + latency,
            "failure": "", "message": "", "finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 11,
            "reasoning": "", "text": "", "correct": None,
        }
        for i in range(n)
    )  # fmt: skip


def load(late=0.0, lags=(0.001,), cpu=(0.1,)):
    return Load("m", events(late=late), (0.0, 5.0), 0.0, 0.0, lags, cpu)


OPEN = Workload.article(arrivals="constant", rate=10.0, requests=50)


def test_a_client_out_of_the_way_gives_no_reason():
    assert client_reasons(load(), OPEN, GOOD) == []


@pytest.mark.parametrize(
    ("seen", "calibration", "words"),
    [
        (load(lags=(0.2,) * 50), GOOD, "event loop"),
        (load(late=0.2), GOOD, "sent 200 ms late"),
        (load(cpu=(0.1, 0.95)), GOOD, "95% of a core"),
        (load(), dataclasses.replace(GOOD, added_share=0.2), "adds 20%"),
        (load(), dataclasses.replace(GOOD, failures=2), "2 of 40"),
        # A server that was late is named, and not the client that waited for it.
        (load(), dataclasses.replace(GOOD, added_share=0.2, server_late_p95_s=0.08), "itself 80 ms behind its script"),
    ],
)
def test_a_client_in_the_way_is_named(seen, calibration, words):
    [reason] = client_reasons(seen, OPEN, calibration)
    assert words in reason


def test_a_script_takes_after_the_answers_seen():
    script = script_like(events())
    assert (script.ttft_s, script.itl_s, script.tokens) == (pytest.approx(0.25), pytest.approx(0.05), 11)
    assert script_like(events(0)) == Script(ttft_s=0.1, itl_s=0.01, tokens=20)


@pytest.mark.clock
def test_calibration_finds_a_healthy_client_healthy():
    found = calibrate(Workload.article(users=6, requests=10), Script(ttft_s=0.1, itl_s=0.02, tokens=10))
    assert found.requests >= 20 and found.failures == 0
    assert found.scripted_s == pytest.approx(0.28)
    assert 0 <= found.added_p50_s < 0.03
    assert found.added_share == pytest.approx(found.added_p95_s / 0.28, rel=0.1)


@pytest.mark.clock
@pytest.mark.parametrize("transport", ["http/2 tls", "http/3", "grpc"])
def test_a_client_is_calibrated_over_the_transport_it_used(transport, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))  # where the server keeps its certificate
    found = calibrate(Workload.article(users=6, requests=10), Script(0.1, 0.02, tokens=10), None, transport)
    assert found.requests >= 20 and found.failures == 0 and 0 <= found.added_p50_s < 0.05


def test_gap_statistics_tell_arrivals_apart():
    rng = np.random.default_rng(0)
    poisson = np.cumsum(rng.exponential(size=5000))
    assert gap_statistics(poisson)["cv"] == pytest.approx(1, rel=0.06)
    assert gap_statistics(poisson)["dispersion"] == pytest.approx(1, rel=0.15)
    constant = np.arange(5000.0)
    assert gap_statistics(constant)["cv"] == 0 and gap_statistics(constant)["dispersion"] < 0.02
    # Ten workers that share one seed: each arrival comes ten times.
    shared = np.sort(np.repeat(np.cumsum(rng.exponential(size=500)), 10))
    assert gap_statistics(shared)["dispersion"] > 5
    assert gap_statistics(np.array([1.0])) == {"cv": None, "dispersion": None}


def test_requests_that_were_never_sent_are_counted():
    audit = audit_arrivals(events(30), OPEN)
    assert (audit["intended"], audit["sent"], audit["dropped"]) == (50, 30, 20)
