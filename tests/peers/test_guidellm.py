"""guidellm and our own load generator, sent the same prompts at the same constant rate, tell the same times."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from labkit.experiments.metrics import latency, requests_table, ttft
from labkit.traffic.events import events_table
from labkit.traffic.generate import send_load
from labkit.traffic.golden import Golden, Script
from labkit.traffic.workload import Workload
from labkit.training.ledger import make_problem

pytestmark = [pytest.mark.peers, pytest.mark.clock, pytest.mark.timeout(900)]

SHIPPED = Path(__file__).resolve().parents[2] / "data" / "models" / "ledger-r1"
MAX_TOKENS = 400


def prompts(count: int) -> list[str]:
    """Ledger questions in the article's mix: six short ones to three of medium length and a long one."""
    buckets = ["short", "short", "medium", "short", "long", "medium", "short", "short", "medium", "short"]
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


Measured = tuple[pd.DataFrame, tuple[float, float]]
"""The table of requests and the measured window."""


def ours(url: str, asked: list[str], rate: float, folder: Path) -> Measured:
    trace = folder / "trace.jsonl"
    rows = [{"t": number / rate, "prompt": prompt} for number, prompt in enumerate(asked)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    load = send_load(url, Workload(arrivals="trace", trace=str(trace), max_tokens=MAX_TOKENS), processes=1)
    table = requests_table(load.events)
    assert len(table) == len(asked) and (table["failure"] == "").all()
    return table, load.window


def counted(benchmark: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Prompt -> what guidellm noted of the request."""
    return {
        json.loads(each["request_args"])["body"]["messages"][0]["content"][0]["text"]: each
        for each in benchmark["requests"]["successful"]
    }


def theirs_in_ms(benchmark: dict[str, Any]) -> pd.Series:
    """The percentiles that guidellm itself reports."""
    metrics, found = benchmark["metrics"], {}
    for q in (50, 95):
        found[f"TTFT P{q}"] = metrics["time_to_first_token_ms"]["successful"]["percentiles"][f"p{q}"]
        found[f"E2E P{q}"] = metrics["request_latency"]["successful"]["percentiles"][f"p{q}"] * 1000
    return pd.Series(found)


def ours_in_ms(benchmark: dict[str, Any], asked: list[str], measured: Measured) -> pd.Series:
    """The same of ours, over the prompts that guidellm counted."""
    told, (table, window) = counted(benchmark), measured
    table = table.loc[[number for number, prompt in enumerate(asked) if prompt in told]]
    found = {}
    for q in (50, 95):
        found[f"TTFT P{q}"] = ttft(table, window, q, "sent").value * 1000
        found[f"E2E P{q}"] = latency(table, window, q, "sent").value * 1000
    return pd.Series(found)


def agree(left: pd.Series, right: pd.Series) -> bool:
    """Within 5 % or 5 ms, whichever is more."""
    return bool(((left - right).abs() <= (0.05 * left).clip(lower=5.0)).all())


def test_both_read_the_golden_servers_clock_alike(guidellm, tmp_path):
    """Times are scripted, so that whatever the two tell differently is the clients' own doing."""
    scripts = [Script(ttft_s=0.04 + 0.01 * i, itl_s=0.004, tokens=20 + i, reasoning=8) for i in range(20)]
    asked = [f"question {number}" for number in range(100)]
    with Golden(scripts) as golden:
        benchmark = guidellm(golden.url, asked, rate=10)
    with Golden(scripts) as golden:
        measured = ours(golden.url, asked, 10, tmp_path)
    theirs, mine = theirs_in_ms(benchmark), ours_in_ms(benchmark, asked, measured)
    table = pd.DataFrame({"guidellm": theirs, "ours": mine})
    print(table.round(1).to_string())
    assert agree(theirs, mine), f"\n{table}"
    first = sorted(script.ttft_s for script in scripts)
    for q, expected in ((50, first[9]), (95, first[18])):
        assert ttft(*measured, q, "sent").value == pytest.approx(expected, abs=0.012)


def test_both_tell_the_same_of_the_shipped_model(guidellm, serve, tap, tmp_path):
    """The article's mix. A real service never takes as long a second time, so both time the same answers: guidellm at
    its end of the wire, and our client's reader and metrics on the bytes as they pass by."""
    asked = prompts(40)
    with serve(SHIPPED) as url:
        ours(url, asked[:4], 0.5, tmp_path)
        between = tap(url)
        benchmark = guidellm(between.url, asked, rate=0.5)
    table = requests_table(events_table(between.records))
    assert (table["failure"] == "").all()
    told = sorted(benchmark["requests"]["successful"], key=lambda each: each["request_start_time"])
    table = table.sort_values("sent").iloc[: len(told)]
    window = (float(table["sent"].min()), float(table["end"].max()))
    found = {f"TTFT P{q}": ttft(table, window, q, "sent").value * 1000 for q in (50, 95)}
    found |= {f"E2E P{q}": latency(table, window, q, "sent").value * 1000 for q in (50, 95)}
    theirs = theirs_in_ms(benchmark)
    mine = pd.Series(found)[theirs.index]
    both = pd.DataFrame({"guidellm": theirs, "ours": mine})
    print(both.round(1).to_string())
    assert agree(theirs, mine), f"\n{both}"
    for (_, mine), theirs in zip(table.iterrows(), told, strict=True):
        assert mine["tokens"] == theirs["output_metrics"]["text_tokens"]
        assert mine["prompt_tokens"] == theirs["input_metrics"]["text_tokens"]
