from __future__ import annotations

import json
import subprocess
import sys

import pytest

from labkit.traffic.ask import get_json
from labkit.traffic.generate import run_load
from labkit.traffic.golden import Golden, Script
from labkit.traffic.target import Target
from labkit.traffic.workload import Workload

FAST = Workload.article(users=2, requests=6, mix={"short": 1.0})


@pytest.mark.clock
def test_sends_keep_to_the_schedule_without_drift():
    with Golden([Script(ttft_s=0.02, itl_s=0.003, tokens=100)]) as golden:
        run_load(golden.url, FAST.but(users=1, requests=1))
        [answered] = golden.answered
    late = [sent - due for due, sent in answered.sends]
    assert [due - answered.received for due, _ in answered.sends] == pytest.approx(
        [0.02 + 0.003 * k for k in range(100)]
    )
    assert min(late) >= -1e-4  # the loop's timers are rounded to its clock's resolution
    # Were lateness added up, a hundred timers of about a millisecond's grain would end some 50 ms late.
    assert sorted(late)[50] < 0.01 and sorted(late[-20:])[10] < 0.02


def test_scripts_go_by_request_number():
    with Golden([Script(tokens=2), Script(tokens=5)]) as golden:
        run_load(golden.url, FAST)
        assert {int(one.request_id): len(one.sends) for one in golden.answered} == {0: 2, 1: 5, 2: 2, 3: 5, 4: 2, 5: 5}


def test_the_other_pages():
    with Golden() as golden:
        target = Target.parse(golden.url)
        assert get_json(target, "/health")[0] == 200
        assert get_json(target, "/v1/models")[1]["data"][0]["id"] == "golden"
        assert get_json(target, "/nothing")[0] == 404


@pytest.mark.parametrize("wrong", [{"fault": "x"}, {"tokens": 0}, {"ttft_s": -1}, {"headers_s": 1.0}, {"reasoning": 8}])
def test_a_wrong_script_is_refused(wrong):
    with pytest.raises(ValueError, match="must be|reasoning"):
        Script(**wrong)


def test_a_process_of_its_own_writes_down_what_it_sent(tmp_path):
    command = [
        sys.executable,
        "-m",
        "labkit.traffic.golden",
        "--script",
        '[{"tokens": 3}]',
        "--log",
        str(tmp_path / "log"),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        run_load(server.stdout.readline().split()[-1], FAST)
        server.stdin.close()
        assert server.wait(timeout=10) == 0
    rows = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert len(rows) == 6 and all(len(row["sends"]) == 3 and row["ended"] >= row["received"] for row in rows)


def test_a_wrong_script_on_the_command_line_is_one_line():
    command = [sys.executable, "-m", "labkit.traffic.golden", "--script", '[{"fault": "x"}]']
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and "fault must be one of" in done.stderr and "Traceback" not in done.stderr
