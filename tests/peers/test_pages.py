"""The commands of docs/network.md that are programs of others, as they stand there, with fewer questions."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from labkit.experiments.metrics import requests_table
from labkit.traffic.golden import Golden, Script
from labkit.traffic.jmeter import read_jtl, write_plan
from labkit.traffic.target import Target
from labkit.traffic.workload import Workload

pytestmark = [pytest.mark.peers, pytest.mark.timeout(300)]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "network.md"
SCRIPTS = [Script(ttft_s=0.05, itl_s=0.01, tokens=5)]


@pytest.fixture
def run(peer, output_of) -> Callable[..., str]:
    """``run(program, {"as shown": "as run"})``: what the command prints."""

    def send(program: str, given: dict[str, str]) -> str:
        [command] = re.findall(rf"^{program} .*$", PAGE.read_text().replace("\\\n", ""), re.M)
        for shown, meant in given.items():
            assert shown in command
            command = command.replace(shown, meant)
        words = shlex.split(command)
        return output_of([peer(program) / program, *words[1:]], 120, HF_HUB_OFFLINE="1")

    return send


def test_locust(run, tmp_path):
    with Golden(SCRIPTS) as golden:
        run("locust", {"http://127.0.0.1:8000": golden.url, "-t 30s": f"-t 3s --csv {tmp_path}/out"})
        assert len(golden.answered) > 20
    assert "TTFT" in (tmp_path / "out_stats.csv").read_text()


def test_jmeter(run, tmp_path):
    if shutil.which("java") is None:
        pytest.skip("JMeter needs Java; install default-jre-headless")
    with Golden(SCRIPTS) as golden:
        workload = Workload.article(users=8, requests=40)
        write_plan(tmp_path / "plan.jmx", workload, Target.parse(golden.url), "golden")
        run("jmeter", {"plan.jmx": f"{tmp_path}/plan.jmx -j {tmp_path}/log", "plan.jtl": f"{tmp_path}/plan.jtl"})
    table = requests_table(read_jtl(tmp_path / "plan.jtl"))
    assert len(table) == 40 and not table["failure"].any()


def test_guidellm(run, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(40)))
    with Golden(SCRIPTS) as golden:
        given = {"http://127.0.0.1:8000": golden.url, "prompts.jsonl": f"{tmp_path}/prompts.jsonl", "rate=2": "rate=20"}
        run("guidellm", given | {"count=40": f"count=40 --output kind=json,path={tmp_path}/report.json"})
    [benchmark] = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    assert not benchmark["requests"]["errored"] and len(benchmark["requests"]["successful"]) >= 39
