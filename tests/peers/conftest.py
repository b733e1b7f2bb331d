"""What the comparisons with programs of others share: their environments, and a server of ours to point them at."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
READY_WITHIN_S = 180


@pytest.fixture(scope="session")
def peer() -> Callable[[str], Path]:
    """Name of a peer -> the ``bin`` folder of its environment; the test is skipped where there is none."""

    def find(name: str) -> Path:
        folder = ROOT / ".venv-peers" / name / "bin"
        if not any(folder.parent.glob(".installed-*")):
            pytest.skip(f"{folder.parent} is not installed; `make test-peers` installs it")
        return folder

    return find


@pytest.fixture(scope="session")
def started() -> Callable[..., AbstractContextManager[str]]:
    """``with started(command) as url``: a server that prints ``ready on http://…``, ended by an interrupt."""
    return _started


@pytest.fixture(scope="session")
def serve() -> Callable[..., AbstractContextManager[str]]:
    """``with serve(model, "--knob", "value") as url``: ``labkit serve`` in a process of its own, on a free port."""
    labkit = Path(sys.executable).parent / "labkit"
    return lambda model, *options: _started([labkit, "serve", str(model), "--port", "0", *options])


@pytest.fixture(scope="session")
def output_of() -> Callable[..., str]:
    """What a program prints; when it fails, its errors become the failure's text."""

    def run(command: list[str | Path], timeout_s: float, **environment: str) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, env={**os.environ, **environment}, cwd=ROOT
        )
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    return run


@contextmanager
def _started(command: list[str | Path]) -> Iterator[str]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        yield _address(process)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"{command} did not end within 30 s of an interrupt") from None


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    overdue = threading.Timer(READY_WITHIN_S, process.kill)
    overdue.start()
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"ready on (http://[\w.:]+)", line):
                return found[1]
    finally:
        overdue.cancel()
    raise AssertionError(f"the server ended, or was not ready within {READY_WITHIN_S} s; it said: {''.join(said)}")
