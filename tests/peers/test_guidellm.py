"""guidellm and our own load generator, sent the same prompts at the same constant rate, tell the same times."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from labkit.experiments.metrics import latency, measured, requests_table, ttft
from labkit.traffic.generate import send_load
from labkit.traffic.golden import Golden, Script
from labkit.traffic.workload import Workload
from labkit.training.ledger import make_problem

pytestmark = [pytest.mark.peers, pytest.mark.timeout(900)]

SHIPPED = Path(__file__).resolve().parents[2] / "data" / "models" / "ledger-r1"
MAX_TOKENS = 400


def prompts(count: int) -> list[str]:
    """Ledger questions in the article's mix: six short, three medium and one long of every ten."""
    buckets = ["short"] * 3 + ["medium"] + ["short"] * 2 + ["medium", "long", "short", "medium"]
    return [make_problem(seed=11, index=i, bucket=buckets[i % 10]).prompt for i in range(count)]


@pytest.fixture
def guidellm(peer, output_of, tmp_path) -> Callable[[str, list[str], float], dict[str, Any]]:
    """Runs guidellm against a URL; its report on the one benchmark."""
    binary = peer("guidellm") / "guidellm"

    def run(url: str, asked: list[str], rate: float) -> dict[str, Any]:
        data, report = tmp_path / "mix.jsonl", tmp_path / "report.json"
        data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked))
        command = [binary, "run", "--disable-console"]
        command += ["--backend", f"kind=openai_http,target={url},max_tokens={MAX_TOKENS}"]
        command += ["--data", f"kind=json_file,path={data}", "--profile", f"kind=constant,rate={rate}"]
        command += ["--constraint", f"kind=max_requests,count={len(asked)}"]
        command += ["--output", f"kind=json,path={report}"]
        # Its own processes would compete with the server for two cores.
        output_of(command, timeout_s=600, HF_HUB_OFFLINE="1", GUIDELLM__MAX_WORKER_PROCESSES="1")
        benchmark = json.loads(report.read_text())["benchmarks"][0]
        assert not benchmark["requests"]["errored"] and not benchmark["requests"]["incomplete"]
        # Now and then it leaves the request that ends the run out of its statistics.
        assert len(asked) - 1 <= len(benchmark["requests"]["successful"]) <= len(asked)
        return benchmark

    return run


def ours(url: str, asked: list[str], rate: float, folder: Path) -> tuple[pd.DataFrame, tuple[float, float]]:
    trace = folder / "trace.jsonl"
    rows = [{"t": number / rate, "prompt": prompt} for number, prompt in enumerate(asked)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    load = send_load(url, Workload(arrivals="trace", trace=str(trace), max_tokens=MAX_TOKENS), processes=1)
    table = requests_table(load.events)
    assert len(measured(table, load.window)) == len(asked) and (table["failure"] == "").all()
    return table, load.window


def counted(benchmark: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Prompt -> what guidellm noted of the request."""
    return {
        json.loads(each["request_args"])["body"]["messages"][0]["content"][0]["text"]: each
        for each in benchmark["requests"]["successful"]
    }


def side_by_side(
    benchmark: dict[str, Any], asked: list[str], table: pd.DataFrame, window: tuple[float, float]
) -> pd.DataFrame:
    """guidellm's own percentiles and ours over the same prompts in ms, and how far they may be apart: 5 % or 5 ms."""
    told = counted(benchmark)
    table = table.loc[[number for number, prompt in enumerate(asked) if prompt in told]]
    rows = {}
    for q in (50, 95):
        for name, theirs, scale, mine in (
            ("TTFT", "time_to_first_token_ms", 1, ttft(table, window, q, "sent")),
            ("E2E", "request_latency", 1000, latency(table, window, q, "sent")),
        ):
            value = benchmark["metrics"][theirs]["successful"]["percentiles"][f"p{q}"] * scale
            rows[f"{name} P{q}"] = {"guidellm": value, "ours": mine.value * 1000, "may": max(5.0, 0.05 * value)}
    compared = pd.DataFrame(rows).T
    compared["apart"] = (compared["guidellm"] - compared["ours"]).abs()
    print(compared.round(1).to_string())
    return compared


def test_both_read_the_golden_servers_clock_alike(guidellm, tmp_path):
    """Times are scripted, so that whatever the two tell differently is the clients' own doing."""
    scripts = [Script(ttft_s=0.04 + 0.01 * i, itl_s=0.004, tokens=20 + i, reasoning=8) for i in range(20)]
    asked = [f"question {number}" for number in range(100)]
    with Golden(scripts) as golden:
        benchmark = guidellm(golden.url, asked, rate=10)
    with Golden(scripts) as golden:
        table, window = ours(golden.url, asked, 10, tmp_path)
    compared = side_by_side(benchmark, asked, table, window)
    assert (compared["apart"] <= compared["may"]).all(), f"\n{compared}"
    first = sorted(script.ttft_s for script in scripts)
    for q, expected in ((50, first[9]), (95, first[18])):
        assert ttft(table, window, q, "sent").value == pytest.approx(expected, abs=0.012)


def test_both_tell_the_same_of_the_shipped_model(guidellm, serve, tmp_path):
    rate, asked = 1.0, prompts(60)
    with serve(SHIPPED) as url:
        # Both meet a server that has been used, and neither the one that warms it up.
        ours(url, asked[:5], rate, tmp_path)
        table, window = ours(url, asked, rate, tmp_path)
        benchmark = guidellm(url, asked, rate)
    compared = side_by_side(benchmark, asked, table, window)
    assert (compared["apart"] <= compared["may"]).all(), f"\n{compared}"

    told = counted(benchmark)
    for number, prompt in enumerate(asked):
        if prompt in told:
            mine, theirs = table.loc[number], told[prompt]
            assert mine["tokens"] == theirs["output_metrics"]["text_tokens"]
            assert mine["prompt_tokens"] == theirs["input_metrics"]["text_tokens"]
