from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from labkit.errors import UserError
from labkit.experiments.store import UNFINISHED, RunStore
from labkit.traffic.events import events_table
from labkit.traffic.golden import Golden, Script

MANIFEST = {"window": [0.0, 1.0], "valid": True, "reasons": []}


def events():
    return events_table([{
        "index": 0, "bucket": "short", "family": "net", "scheduled": 0.0, "sent": 0.1, "first_byte": 0.2,
        "chunks": [(0.3, 1, "answer")], "end": 0.4, "failure": "", "message": "", "finish_reason": "stop",
        "prompt_tokens": 5, "completion_tokens": 1, "reasoning": "why", "text": "x", "correct": True,
    }])  # fmt: skip


def make(store, name="run"):
    with store.create(name) as draft:
        samples = pd.DataFrame({"t_s": [0.5], "probe": ["host"], "name": ["cpu"], "value": [12.5]})
        return draft.finish(MANIFEST, events(), samples)


def test_a_run_comes_back_as_it_went(tmp_path):
    store = RunStore(tmp_path / "runs")
    made = make(store)
    opened = store.open(made.name)
    assert opened.manifest == made.manifest and opened.window == (0.0, 1.0) and opened.valid
    pd.testing.assert_frame_equal(opened.events, events())
    assert opened.samples.to_dict("records") == [{"t_s": 0.5, "probe": "host", "name": "cpu", "value": 12.5}]
    assert opened.requests.loc[0, "text"] == "<think>why</think>x"
    assert [run.name for run in store.list()] == [made.name]
    assert store.open(made.path).name == made.name


def test_runs_come_oldest_first_and_never_share_a_name(tmp_path):
    store = RunStore(tmp_path)
    names = [make(store).name for _ in range(5)]
    assert [run.name for run in store.list()] == names and len(set(names)) == 5


def test_an_exception_leaves_nothing(tmp_path):
    store = RunStore(tmp_path)
    with pytest.raises(KeyboardInterrupt), store.create("run"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    store = RunStore(tmp_path)
    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(UserError, match="disk is full"):
        make(store)
    assert list(tmp_path.iterdir()) == [] and not store.list()


@pytest.mark.parametrize("file", ["manifest.json", "events.parquet", "samples.parquet"])
@pytest.mark.parametrize("damage", ["gone", "cut", "empty"])
def test_a_run_with_a_damaged_file_is_not_read(tmp_path, file, damage):
    store = RunStore(tmp_path)
    run, path = make(store), make(store).path / file
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20] if damage == "cut" else b"")
    with pytest.raises(UserError, match="missing or broken"):
        store.open(path.parent.name)
    assert [one.name for one in store.list()] == [run.name]
    assert len(store.broken()) == 1 and path.parent.name in store.broken()[0]


def test_another_schema_and_missing_columns_are_refused(tmp_path):
    store = RunStore(tmp_path)
    run = make(store)
    (run.path / "manifest.json").write_text(json.dumps({**run.manifest, "schema": 99}))
    with pytest.raises(UserError, match="schema 99"):
        store.open(run.name)
    other = make(store)
    other.events.drop(columns="kind").to_parquet(other.path / "events.parquet")
    with pytest.raises(UserError, match="lacks the columns kind"):
        store.open(other.name)


@pytest.mark.parametrize("name", ["", "a/b", "../x", "x" * 99, f"a{UNFINISHED}1", "-x", "a b"])
def test_a_bad_name_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="a run's name"), RunStore(tmp_path).create(name):
        pass


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no run can be kept"), RunStore(tmp_path / "file").create("run"):
        pass


def test_a_missing_or_unfinished_run_is_not_opened(tmp_path):
    store = RunStore(tmp_path)
    with pytest.raises(UserError, match="there is no run"):
        store.open("nothing")
    (tmp_path / f"x{UNFINISHED}999999999").mkdir()
    with pytest.raises(UserError, match="unfinished"):
        store.open(f"x{UNFINISHED}999999999")
    assert [rest.ended for rest in store.unfinished()] == [0]
    (tmp_path / f"y{UNFINISHED}{os.getpid()}").mkdir()  # this process lives: its draft is no remains
    assert len(store.unfinished()) == 1
    assert not store.list() and not store.broken()


def load_command(url, runs, *more):
    return [sys.executable, "-m", "labkit.cli", "load", url, "--runs", str(runs), "--no-calibrate", *more]


def test_kill_9_in_mid_load_leaves_no_run_and_the_next_start_says_so(tmp_path):
    with Golden([Script(ttft_s=0.02, itl_s=0.005, tokens=5)]) as golden:
        command = load_command(golden.url, tmp_path, "--users", "3", "--duration", "60")
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and _ended(tmp_path) <= 20:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        store = RunStore(tmp_path)
        assert not store.list() and not store.broken()
        [rest] = store.unfinished()
        assert rest.ended > 20
        before = len(golden.answered)
        time.sleep(0.5)
        assert len(golden.answered) <= before + 3  # the client processes ended with their parent

        again = subprocess.run(load_command(golden.url, tmp_path, "--requests", "5"), capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert "an earlier run did not end" in again.stderr and str(rest.path) in again.stderr
        assert "kept as" in again.stdout
        [run] = store.list()
        assert len(run.requests) == 5


def test_a_disk_that_fills_up_in_mid_load_is_one_clear_line(tmp_path):
    """A limit on the size of files stands in for the disk."""
    with Golden([Script(tokens=50)]) as golden:
        command = load_command(golden.url, tmp_path, "--requests", "60")
        limit = (3000, 3000)
        done = subprocess.run(
            command, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "a client process died: OSError: [Errno 27] File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_keeps_nothing_and_says_so(tmp_path):
    with Golden([Script(ttft_s=0.02, tokens=2)]) as golden:
        command = load_command(golden.url, tmp_path, "--users", "2", "--duration", "60")
        # A shell starts its background jobs deaf to Ctrl-C, and what this test starts would inherit that.
        hearing = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hearing)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and _ended(tmp_path) < 3:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and "interrupted; nothing of this run was kept" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--users", "0"], "users must be"), (["--users", "2", "--rate", "3"], "one of --users"),
        (["--mix", "50/50"], "mix must be"),
        (["--arrivals", "poisson"], "with --rate"), (["--rate", "1", "--arrivals", "x"], "arrivals must be"),
        (["--trace", "/nowhere.jsonl"], "cannot be read"),
        (["--requests", "3", "--duration", "3"], "either requests or duration"),
        (["--name", "a/b"], "a run's name"), (["--processes", "0"], "processes must be"), ([], "no server listens"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(tmp_path, more, words):
    model = [] if not more else ["--model", "any"]
    from typer.testing import CliRunner

    from labkit.cli import app

    result = CliRunner().invoke(app, load_command("http://127.0.0.1:9", tmp_path, *more, *model)[3:])
    assert isinstance(result.exception, UserError), result
    assert words in str(result.exception)
    assert "\n" not in str(result.exception) and list(tmp_path.iterdir()) == []


def _ended(root):
    return sum(spool.read_bytes().count(b"\n") for spool in root.glob("*/spool-*.jsonl"))
