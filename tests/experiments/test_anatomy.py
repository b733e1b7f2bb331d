"""Taking runs apart, on requests whose every time is set by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from labkit.deployment import Deployment
from labkit.experiments import anatomy, metrics
from labkit.experiments.store import Run
from labkit.traffic.events import events_table
from labkit.traffic.workload import Workload


def record(index, sent, end, prompt=100, tokens=10, bucket="short", failure="", correct=True):
    return {
        "index": index, "bucket": bucket, "family": "net", "scheduled": sent, "sent": sent, "first_byte": end,
        "chunks": [] if failure else [(end, tokens, "answer")], "end": end, "failure": failure, "message": "",
        "finish_reason": "stop", "prompt_tokens": prompt, "completion_tokens": tokens, "reasoning": "", "text": "x",
        "correct": correct,
    }  # fmt: skip


def made_run(records, window, users=1, samples=(), **manifest):
    """A run that was never on disk."""
    run = Run(
        Path("made-by-hand"),
        {
            "window": window,
            "workload": {"users": users},
            "started_at": "2026-01-02",
            "machine": {"gpus": []},
            **manifest,
        },
    )
    run.__dict__["events"] = events_table(records)
    run.__dict__["samples"] = pd.DataFrame(list(samples), columns=["t_s", "probe", "name", "value"])
    return run


def one_user(service_s=2.0, count=5, start=0.0):
    """Questions one after the other, each answered in ``service_s``."""
    at = start + service_s * np.arange(count)
    return made_run([record(i, t, t + service_s) for i, t in enumerate(at)], (start, start + count * service_s))


def test_pooled_runs_follow_each_other():
    table, window = anatomy.pooled([one_user(2.0, 5, start=3.0), one_user(4.0, 5)])
    assert window == (0.0, 30.0) and len(table) == 10
    assert metrics.throughput(table, window).value == pytest.approx(10 / 30)
    assert sorted(table["end"] - table["scheduled"]) == pytest.approx([2.0] * 5 + [4.0] * 5)
    assert table["chunk_t"].iloc[5].tolist() == pytest.approx([14.0])


def test_pooling_leaves_the_runs_alone():
    run = one_user()
    before = run.requests.copy()
    anatomy.pooled([run, run])
    pd.testing.assert_frame_equal(run.requests, before)


def test_runs_whose_answers_came_after_the_window_cannot_be_pooled():
    with pytest.raises(ValueError, match="after its window"):
        anatomy.pooled([made_run([record(0, 0.0, 5.0)], (0.0, 4.0))])
    with pytest.raises(ValueError, match="no run"):
        anatomy.pooled([])


def test_one_user_predicts_the_others_by_littles_law():
    found = anatomy.predicted([one_user(2.0)], [8, 1, 4])
    assert found["users"].tolist() == [1, 4, 8]
    assert found["throughput"].tolist() == pytest.approx([0.5] * 3)
    assert found["latency_s"].tolist() == pytest.approx([2.0, 8.0, 16.0])


def test_a_metric_over_users_pools_repeats():
    runs = [one_user(2.0), made_run([record(0, 0.0, 9.0)], (0.0, 9.0), users=4), one_user(3.0)]
    table = anatomy.by_users(runs, metrics.mean_latency, "mean")
    assert table["users"].tolist() == [1, 4] and table["n"].tolist() == [10, 1]
    assert table["value"].tolist() == pytest.approx([2.5, 9.0]) and set(table["deployment"]) == {"mean"}


def test_waiting_and_work_add_up_to_the_latency():
    """Four users: in any moment two wait, one and a half are in a batch, so half a request is elsewhere."""
    records = [record(i, 4.0 * (i // 4), 4.0 * (i // 4) + 4.0) for i in range(20)]
    samples = [(t, "engine", name, value) for t in range(20) for name, value in (("waiting", 2.0), ("running", 1.5))]
    samples.append((-5.0, "engine", "waiting", 1000.0))  # before the window: not counted
    parts = anatomy.waiting_and_work(made_run(records, (0.0, 20.0), 4, samples))
    # 20 answers in 20 s: one a second, so means in a state are also seconds in it.
    assert parts == pytest.approx({"waiting for a batch": 2.0, "in a batch": 1.5, "everything else": 0.5})


def test_without_an_engine_to_read_nothing_is_said_about_waiting():
    assert all(math.isnan(value) for value in anatomy.waiting_and_work(one_user()).values())


def test_batches_and_their_padding():
    records = [
        record(0, 0.0, 1.0, prompt=100, tokens=10),
        record(1, 0.0, 5.000, prompt=1000, tokens=20),
        record(2, 0.0, 5.001, prompt=200, tokens=50),
        record(3, 0.0, 5.002, prompt=300, tokens=30),
        record(4, 0.0, 6.0, failure="timeout"),
    ]
    table = anatomy.batches(made_run(records, (0.0, 6.0), users=4))
    assert table["requests"].tolist() == [1, 3]
    assert table["asked"].tolist() == [110, 1600]
    assert table["computed"].tolist() == [110, 3 * 1050]


def test_the_first_prompts_are_those_that_the_client_sends(tiny_model):
    prompts = anatomy.first_prompts(Workload.article(mix={"short": 1.0}), str(tiny_model), 3)
    assert len(prompts) == 3 and all(len(prompt) > 20 for prompt in prompts)
    assert prompts == anatomy.first_prompts(Workload.article(mix={"short": 1.0}), str(tiny_model), 3)


@pytest.mark.parametrize("first", [True, False])
def test_a_batch_is_profiled(tiny_model, first):
    make = Deployment.as_first_deployed if first else Deployment
    table = anatomy.profile_batch(make(str(tiny_model), device="cpu"), [[5, 6, 7], [8, 9]], max_tokens=4)
    assert table["share"].sum() == pytest.approx(1)
    assert {"linear layers"} < set(table["group"])
    assert ("softmax" in set(table["group"])) or not first
