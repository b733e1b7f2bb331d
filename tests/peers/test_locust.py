"""Locust, sending our workload through labkit/traffic/locustfile.py, reads the golden server's clock as scripted."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from labkit.traffic.golden import Golden, Script
from labkit.traffic.workload import Workload

pytestmark = [pytest.mark.peers, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [Script(ttft_s=0.2, itl_s=0.02, tokens=21, reasoning=5)] * 4
SHORT = Workload.article(mix={"short": 1.0}, seed=3)


@pytest.fixture
def command(peer) -> Callable[..., list[str | Path]]:
    def words(url: str, *more: str | Path) -> list[str | Path]:
        return [peer("locust") / "locust", "-f", ROOT / "labkit/traffic/locustfile.py", "--host", url, *more]

    return words


ENVIRONMENT = {"PYTHONPATH": str(ROOT), "LABKIT_WORKLOAD": SHORT.to_json(), "LABKIT_MODEL": "golden"}


def run(command: list[str | Path], code: int) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | ENVIRONMENT, cwd=ROOT
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-3000:]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def table(path: Path, key: str) -> dict[str, dict[str, str]]:
    with open(path) as lines:
        return {row[key]: row for row in csv.DictReader(lines)}


def shown(url: str) -> str:
    """The page at ``url``, as soon as it is served."""
    deadline = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.read().decode()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@pytest.mark.clock
def test_times_are_those_of_the_script_and_truncated_streams_are_failures(command, tmp_path):
    with Golden([*SCRIPTS, Script(ttft_s=0.2, itl_s=0.02, tokens=21, fault="truncate")]) as golden:
        run(command(golden.url, "--headless", "-u", "8", "-r", "8", "-t", "6s", "--csv", tmp_path / "out"), 1)
        asked = sorted(int(one.request_id) for one in golden.answered)
    assert asked == list(range(len(asked))) and len(asked) > 50
    stats, failed = table(tmp_path / "out_stats.csv", "Name"), table(tmp_path / "out_failures.csv", "Error")
    # Locust keeps two digits of its percentiles.
    assert float(stats["TTFT short"]["50%"]) == pytest.approx(200, abs=10)
    assert float(stats["ITL short"]["50%"]) == pytest.approx(20, abs=2)
    assert float(stats["chat short"]["50%"]) == pytest.approx(600, abs=20)
    [(error, row)] = failed.items()
    assert "Truncated" in error and int(row["Occurrences"]) == pytest.approx(len(asked) / 5, abs=10)


def test_processes_ask_nothing_twice(command):
    port = free_port()
    meet = ["--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--master-port", port]
    with Golden(SCRIPTS) as golden:
        run(command(golden.url, "--headless", "-u", "6", "-r", "6", "-t", "4s", "--processes", "2", *meet), 0)
        asked = [int(one.request_id) for one in golden.answered]
    assert len(asked) == len(set(asked)) > 20 and {number % 1024 for number in asked} == {0, 1}


def test_its_web_page_shows_the_user(command):
    port = free_port()
    with Golden(SCRIPTS) as golden:
        page = subprocess.Popen(
            command(golden.url, "--web-port", port, "--autostart", "-u", "4", "-r", "4"),
            stderr=subprocess.DEVNULL, env=os.environ | ENVIRONMENT, cwd=ROOT,
        )  # fmt: skip
        try:
            assert "LedgerUser" in shown(f"http://127.0.0.1:{port}")
        finally:
            page.terminate()
            try:
                page.wait(20)
            finally:
                page.kill()
