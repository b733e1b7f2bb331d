from __future__ import annotations

import json
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from labkit.errors import UserError
from labkit.experiments.metrics import requests_table
from labkit.traffic.answer import FAILURES
from labkit.traffic.calibrate import audit_arrivals
from labkit.traffic.generate import Progress, processes_needed, run_load, send_load
from labkit.traffic.golden import FAULTS, Golden, Script
from labkit.traffic.target import Target
from labkit.traffic.worker import WARMUP_INDEX, Order
from labkit.traffic.workload import Workload
from labkit.training.ledger import make_problem

SHORT = {"short": 1.0}


@pytest.mark.parametrize("processes", [1, 2])
def test_counts_are_exact_and_times_lie_just_after_the_servers(processes):
    scripts = [
        Script(ttft_s=0.05, itl_s=0.01, tokens=8, reasoning=3),
        Script(fault="429"),
        Script(fault="truncate", tokens=6),
    ]
    with Golden(scripts) as golden:
        load = send_load(golden.url, Workload.article(users=4, requests=30), processes=processes)
        answered = {int(one.request_id): one for one in golden.answered}
    table = requests_table(load.events)
    assert table.index.tolist() == list(range(30)) == sorted(answered)
    for index, row in table.iterrows():
        assert row["failure"] == ("", "shed", "truncated")[index % 3]
    done = table[table["failure"] == ""]
    assert (done["tokens"] == 8).all() and (done["finish"] == "stop").all()
    late = []
    for index, row in done.iterrows():
        own = np.array([sent for _, sent in answered[index].sends]) - load.zero
        late += (row["chunk_t"] - own).tolist()
        assert row["scheduled"] <= row["sent"] <= answered[index].received - load.zero
    assert min(late) > -1e-6 and np.median(late) < 0.01
    assert load.window == (0.0, table["end"].max())
    assert len(load.cpu_shares) == processes and load.model == "golden"


@pytest.mark.parametrize("transport", ["http/2", "grpc"])
def test_processes_share_connections_and_the_schedule_over_every_transport(transport):
    scripts = [Script(ttft_s=0.03, itl_s=0.01, tokens=5 + i, word=f"w{i}-") for i in range(20)]
    workload = Workload.article(users=6, requests=20, mix=SHORT)
    with Golden(scripts, transport=transport) as golden:
        load = send_load(golden.url, workload, "golden", connections=3, processes=2)
        assert golden.connections == 3
        assert sorted(int(one.request_id) for one in golden.answered) == list(range(20))
        with pytest.raises(UserError, match="2 client processes cannot share 1 connections"):
            send_load(golden.url, workload, processes=2)
    table = requests_table(load.events)
    assert (load.transport, load.connections, len(load.cpu_shares)) == (transport, 3, 2)
    assert (table["failure"] == "").all()
    assert table["text"].tolist() == [script.text(0, script.tokens - 1) for script in scripts]


@pytest.mark.clock
def test_prompts_follow_from_the_seed_and_answers_are_checked(tmp_path):
    """The trace asks two questions; the golden server answers both with ' t0'."""
    rows = [
        {"t": 0.0, "prompt": "a", "answer": "t0"},
        {"t": 0.1, "prompt": "b", "answer": "t1"},
        {"t": 0.2, "prompt": "c"},
    ]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with Golden([Script(tokens=1)]) as golden:
        events = run_load(golden.url, Workload(arrivals="trace", trace=str(tmp_path / "trace.jsonl")), "golden")
    done = events[events["kind"] == "done"].set_index("request")
    assert done["correct"].tolist()[:2] == [True, False] and done["correct"].isna().tolist() == [False, False, True]
    sent = events[events["kind"] == "sent"]["t_s"].to_numpy()
    assert sent == pytest.approx([0.0, 0.1, 0.2], abs=0.03)


@pytest.mark.clock
def test_an_open_loop_keeps_its_schedule_while_the_server_sleeps():
    workload = Workload.article(arrivals="constant", rate=40.0, duration_s=1.0, mix=SHORT)
    with Golden([Script(ttft_s=0.8, tokens=2)]) as golden:
        load = send_load(golden.url, workload)
    table = requests_table(load.events)
    assert len(table) == 39
    assert table["scheduled"].to_numpy() == pytest.approx(np.arange(1, 40) / 40, abs=1e-6)
    assert (table["sent"] - table["scheduled"]).median() < 0.01
    audit = audit_arrivals(load.events, workload)
    assert (audit["intended"], audit["sent"], audit["dropped"]) == (39, 39, 0)
    assert audit["schedule"]["cv"] == pytest.approx(0, abs=1e-6)


def test_warm_up_is_left_out_and_does_not_shift_the_questions():
    with Golden([Script(ttft_s=0.05, tokens=2)]) as golden:
        load = send_load(golden.url, Workload.article(users=2, requests=6, warmup_s=0.5, mix=SHORT))
    table = requests_table(load.events)
    measured = table[table["scheduled"] >= load.window[0]]
    assert load.window[0] == 0.5
    assert measured.index.tolist() == list(range(6))
    warm_up = table[table["scheduled"] < 0.5]
    assert len(warm_up) >= 10 and (warm_up.index >= WARMUP_INDEX).all()
    assert measured.loc[0, "family"] == make_problem(0, 0, "short").family


def test_users_start_along_the_ramp_and_think():
    with Golden([Script(tokens=1)]) as golden:
        load = send_load(golden.url, Workload.article(users=4, duration_s=0.2, ramp_s=0.8, think_s=5.0, mix=SHORT))
    assert requests_table(load.events)["scheduled"].sort_values().to_numpy() == pytest.approx(
        [0, 0.2, 0.4, 0.6], abs=0.05
    )


def test_a_server_that_is_not_there_is_recorded_without_a_storm():
    """Users turned away pause, so that a dead server does not make for millions of events."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        events = run_load(url, Workload.article(users=2, duration_s=1.2, mix=SHORT), "any")
    failed = events[events["kind"] == "failed"]
    assert set(failed["detail"]) == {"refused"} and 4 <= len(failed) <= 6


def test_a_run_can_be_stopped_with_a_reason():
    seen: list[Progress] = []
    with Golden([Script(ttft_s=0.02, tokens=2)]) as golden:
        load = send_load(
            golden.url, Workload.article(users=2, duration_s=60, mix=SHORT),
            progress=seen.append, stop=lambda: "enough" if seen and seen[-1].ended > 20 else "",
        )  # fmt: skip
    assert load.cut == "enough" and load.window[1] < 10
    assert seen[-1].sent >= seen[-1].ended > 20 and seen[-1].left_s < 60
    requests_table(load.events)


def test_every_fault_has_a_kind():
    assert set(FAULTS) - {""} == {
        "reset",
        "4xx",
        "429",
        "503",
        "5xx",
        "truncate",
        "no finish",
        "data error",
        "stall",
        "garbage",
        "goaway",
    }
    assert len(set(FAILURES)) == 9


def test_processes_follow_the_traffic():
    assert processes_needed(Workload.article(users=8)) == 1
    assert processes_needed(Workload.article(users=100_000)) >= 1


def test_a_server_that_is_missing_or_strange_is_said():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match="no server listens"):
            send_load(f"http://127.0.0.1:{unused.getsockname()[1]}", Workload.article())
    with Golden() as golden, pytest.raises(UserError, match="OpenAI-compatible"):
        send_load(golden.url + "/elsewhere", Workload.article())


def test_a_client_process_that_dies_is_said(tmp_path):
    with Golden() as golden, pytest.raises(UserError, match="client process died.*No such file"):
        send_load(golden.url, Workload.article(), spool=tmp_path / "nowhere")


def test_client_processes_end_when_their_parent_is_gone():
    process = subprocess.Popen(
        [sys.executable, "-m", "labkit.traffic.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    order = Order(Target("127.0.0.1", 9), "any", Workload.article(users=1, duration_s=600), 0, 1, "/dev/null")
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(order.to_json() + "\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline()) == {"ready": True}
    process.stdin.write(f"{time.perf_counter()}\n")
    process.stdin.close()
    assert process.wait(timeout=10) == 3
