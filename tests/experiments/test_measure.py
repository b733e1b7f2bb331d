from __future__ import annotations

import json
import os
import sys
import time

import psutil
import pytest

from labkit.deployment import Deployment
from labkit.errors import UserError
from labkit.experiments import metrics
from labkit.experiments.compare import same_work
from labkit.experiments.ladder import ladder, walk
from labkit.experiments.measure import exit_text, measure, running_server
from labkit.experiments.store import RunStore
from labkit.traffic.workload import Workload

SERVER = """
import os, subprocess, sys, time
from labkit.traffic.golden import Golden, Script
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("labkit: loading", flush=True)
with Golden([Script(ttft_s=0.02, itl_s=0.005, tokens=6)]) as golden:
    print(f"labkit: ready on {golden.url}", flush=True)
    lives = float(sys.argv[1])
    time.sleep(lives)
    print("RuntimeError: out of memory", flush=True)
    os.kill(os.getpid(), 9)
"""
SHORT = Workload.article(users=3, requests=12, mix={"short": 1.0})


def server(lives_s=600.0):
    return [sys.executable, "-c", SERVER, str(lives_s)]


def test_a_run_holds_load_samples_and_manifest(tmp_path):
    store, said = RunStore(tmp_path), []
    run = measure(
        Deployment(), SHORT, store, hz=20, command=server(), say=said.append, notes={"rung": "first", "key": "k"}
    )
    assert store.open(run.name).manifest == run.manifest
    assert len(run.requests) == 12 and metrics.error_rate(run.requests, run.window).value == 0
    manifest = run.manifest
    assert Deployment(**manifest["deployment"]) == Deployment()
    assert (manifest["rung"], manifest["key"], manifest["seed"], manifest["model"]) == ("first", "k", 0, "golden")
    assert manifest["server"]["died"] == "" and manifest["machine"]["cores"] >= 1 and manifest["versions"]["torch"]
    assert set(manifest["code"]) == {"commit", "changes"} and manifest["started_at"].endswith("+00:00")
    assert any("ready on" in line for line in said)
    # The probes' times are on the clock of the events: readings before the start, during the run, none long after.
    host = run.samples[run.samples["probe"] == "host"]["t_s"]
    assert host.min() < run.window[1] and ((host > 0) & (host < run.window[1])).any()
    assert host.max() < run.window[1] + 5
    assert (run.path / "server.log").read_text().count("ready on") == 1


def test_no_process_is_left_behind(tmp_path):
    with running_server(Deployment(), tmp_path / "log", command=server()) as running:
        tree = psutil.Process(running.process.pid).children(recursive=True)
        assert len(tree) == 1
    assert running.process.returncode == -15
    deadline = time.monotonic() + 5
    while any(child.is_running() and child.status() != "zombie" for child in tree) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(child.is_running() and child.status() != "zombie" for child in tree)


def test_a_server_that_dies_in_mid_run_is_a_result(tmp_path):
    workload = SHORT.but(requests=None, duration_s=60)
    run = measure(Deployment(), workload, RunStore(tmp_path), command=server(lives_s=1.5))
    assert run.manifest["server"]["died"] == "killed by SIGKILL (out of memory?)"
    assert "RuntimeError: out of memory" in run.manifest["server"]["last_lines"]
    assert "died" in run.manifest["cut"] and run.window[1] < 15
    kinds = metrics.error_rates(run.requests, run.window)
    assert "refused" in kinds and set(kinds) <= {"refused", "truncated", "connect"}
    assert metrics.throughput(run.requests, run.window).value > 1


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import sys; print('labkit: no such model'); sys.exit(3)", r"exit code 3\): labkit: no such model"),
        ("import os; os.kill(os.getpid(), 9)", r"SIGKILL .*it said nothing"),
        ("import time; print('loading', flush=True); time.sleep(60)", "not ready in time; its last words: loading"),
    ],
)
def test_a_server_that_never_gets_ready_is_said(tmp_path, program, words):
    with pytest.raises(UserError, match=words):
        measure(Deployment(), SHORT, RunStore(tmp_path), command=[sys.executable, "-c", program], ready_timeout_s=1.5)
    assert os.listdir(tmp_path) == []


def test_exit_codes_read_as_words():
    assert (exit_text(1), exit_text(-15)) == ("exit code 1", "killed by SIGTERM")


@pytest.mark.slow
def test_both_ends_of_the_ladder_serve_the_same_answers(tmp_path, tiny_model):
    """The real server with both engines: whole answers, equal token for token, and the engine's counters sampled."""
    rows = [{"t": 0.05 * k, "prompt": f"What is the fee of trade {k}?", "max_tokens": 6 + k} for k in range(8)]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, rows)))
    workload = Workload(arrivals="trace", trace=str(tmp_path / "trace.jsonl"))
    rungs = ladder(str(tiny_model))
    first, best = walk([rungs[0], rungs[-1]], workload, RunStore(tmp_path / "runs"), repeats=1, hz=20)
    assert (
        metrics.error_rate(first.requests, first.window).value
        == metrics.error_rate(best.requests, best.window).value
        == 0
    )
    work = same_work(first, best)
    assert work.same and work.common == 8, work
    counters = best.samples[(best.samples["probe"] == "engine") & (best.samples["name"] == "generated_tokens")]
    assert counters["value"].max() > 0
