"""Tables and sentences of runs made by hand, and the figure of the README."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pandas as pd
import pytest
import torch

from labkit.errors import UserError
from labkit.experiments.claims import Verdict, record
from labkit.experiments.compare import compare
from labkit.experiments.ladder import choose, ladder
from labkit.experiments.store import Run, RunStore
from labkit.probes.profiler import operators
from labkit.report import first_result, results
from labkit.traffic.events import events_table

ENDS = ("as first deployed", "own engine")


def request(index, sent, end, text="42", failure=""):
    return {
        "index": index, "bucket": "short", "family": "net", "scheduled": sent, "sent": sent, "first_byte": end,
        "chunks": [] if failure else [(sent + (end - sent) / 2, 5, "answer"), (end, 5, "answer")], "end": end,
        "failure": failure, "message": "", "finish_reason": "stop", "prompt_tokens": 100, "completion_tokens": 10,
        "reasoning": "", "text": text, "correct": text == "42",
    }  # fmt: skip


def test_the_dearest_operators_of_a_call_are_shown():
    found = operators(lambda: torch.softmax(torch.ones(256, 256) @ torch.ones(256, 256), -1))
    table = results.operators_table(found, most=20)
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["mm"][:2] == ("linear layers", "1") and rows["_softmax"][:2] == ("softmax", "1")
    assert all(row[4].endswith("\u00a0%") for row in table.rows)
    assert [row[0] for row in results.operators_table(found, most=2).rows] == found["op"].tolist()[:2]


def made_run(service_s, rung="as first deployed", users=4, repeat=0, gpus=(), texts=None, failure="", count=40):
    """``users`` at once, each answered after ``service_s`` seconds, ``count`` requests in all. Never on disk."""
    starts = [service_s * (i // users) for i in range(count)]
    records = [
        request(i, at, at + service_s, (texts or {}).get(i, "42"), failure if i == 0 else "")
        for i, at in enumerate(starts)
    ]
    window = (0.0, service_s * count / users)
    run = Run(Path(f"{rung}-{repeat}".replace(" ", "-")), {
        "walk": "one", "rung": rung, "repeat": repeat, "window": window,
        "workload": {"users": users, "requests": count, "seed": 0},
        "started_at": f"2026-01-0{1 + repeat}T00:00:00+00:00", "reasons": [], "code": {"commit": "c0ffee"},
        "machine": {"cpu": "a CPU", "cores": 2, "ram_bytes": 2**33, "gpus": list(gpus)},
    })  # fmt: skip
    run.__dict__["events"] = events_table(records)
    run.__dict__["samples"] = pd.DataFrame(
        [(t, probe, name, value) for t in (0.5, 1.0, 1.5) for probe, name, value in
         (("engine", "waiting", 1.0), ("engine", "running", 3.0), ("host", "cpu", 95.0),
          ("host", "tree_rss_bytes", 2.0**31))],
        columns=["t_s", "probe", "name", "value"],
    )  # fmt: skip
    return run


def walked(slow=8.0, fast=1.0, **more):
    return [made_run(slow, ENDS[0], repeat=r) for r in range(3)] + [
        made_run(fast, ENDS[1], repeat=r, **more) for r in range(3)
    ]


def test_users_are_told_apart_and_their_requests_counted():
    table = results.users_table([made_run(2.0, users=1, count=10), made_run(8.0, users=4)])
    assert [row[0] for row in table.rows] == ["1\u00a0user", "4\u00a0users"]
    assert [row[1] for row in table.rows] == ["10", "40"]
    assert [row[3].splitlines()[0] for row in table.rows] == ["2.00\u00a0s", "8.00\u00a0s"]
    assert "2 cores of a CPU, 8 GiB, no GPU; 2026-01-01" in table.caption


def test_failures_are_shown_by_kind_beside_what_the_articles_limits_make_of_them():
    table = results.failures_table([made_run(2.0, failure="timeout")])
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["timeout"].startswith("2.50") and row["failed"].startswith("2.50")
    assert row["over 5 s or failed"].startswith("2.50") and row["over 800 ms or failed"].startswith("100")
    assert row["enough requests to judge the P95?"] == "yes, P95 is above"
    few = results.failures_table([made_run(0.5, count=20)])
    assert few.rows[0][-1] == "no (90 needed)"


def test_what_else_ran_on_the_machine_is_said():
    calm, busy = made_run(2.0), made_run(2.0)
    assert results.disturbance([calm]) == ""
    for run, percent in ((calm, 180.0), (busy, 100.0)):
        server = pd.DataFrame({"t_s": [1.0], "probe": "host", "name": "tree_cpu", "value": percent})
        run.__dict__["samples"] = pd.concat([run.samples, server])
    # Two cores at 95 % are 1.9; the server had 1.8 of them, then 1.0.
    assert "at most 0.1 cores" in results.disturbance([calm])
    assert "at most 0.9 cores" in results.users_table([calm, busy]).caption


def test_padding_and_time_of_a_batch():
    padding = results.padding_table([made_run(2.0)])
    assert padding.rows[0][1:4] == ("10", "4.00", "4.00") and padding.rows[0][-1] == "0\u00a0%"
    parts = results.time_parts([made_run(2.0)])
    assert parts["seconds"].sum() == pytest.approx(2.0)


def test_bytes_are_drawn_in_gib_and_a_gpu_only_where_there_is_one():
    samples, rows = results.pressure(made_run(2.0))
    assert samples[samples["name"] == "tree_rss_gib"]["value"].tolist() == [2.0] * 3
    assert "gpu" not in {probe for probe, _, _ in rows} and ("host", "cpu", "CPU (%)") in rows


def test_the_ladders_steps_and_its_headline():
    runs = walked()
    steps = results.steps_table(runs)
    assert steps.rows[1][1].splitlines()[0] == "8.00×" and steps.rows[1][1].endswith("at 90 %")
    assert steps.rows[1][3] == "all 120"
    whole = compare(runs[:3], runs[3:], results.throughput_of)
    head = results.headline(whole, runs)
    assert head.columns[1:3] == ENDS and "believed" not in head.caption
    assert "4 users, 40 requests a run, 3 runs a rung" in head.caption
    text = results.results_takeaway(whole, runs)
    assert "**8.00 times**" in text and "the same answers" in text and "*own engine*" in text


def test_different_answers_are_said_everywhere_and_cost_the_verdict():
    runs = walked(texts={3: "41"})
    whole = compare(runs[:3], runs[3:], results.throughput_of)
    assert results.alike(whole) == "3 of 120 differ"
    assert "Not to be believed: 3 of 120 differ" in results.headline(whole, runs).caption
    verdicts = results.judge_changes(results.article_changes(runs), runs)
    assert {v.claim: v.outcome for v in verdicts}["C35"] == "no verdict"


@pytest.mark.parametrize(("gpus", "users", "outcome"), [((), 4, "partly"), (({"name": "H200"},), 300, "confirmed")])
def test_a_gain_is_confirmed_only_where_the_article_had_it(gpus, users, outcome):
    runs = [
        made_run(seconds, rung, users, repeat, gpus, count=max(80, 2 * users))
        for rung, seconds in zip(ENDS, (8.0, 1.0), strict=True)
        for repeat in range(2)
    ]
    verdicts = {v.claim: v for v in results.judge_changes(results.article_changes(runs), runs)}
    assert list(verdicts) == ["C34", "C35", "C36", "C37", "C38"]
    assert verdicts["C34"].outcome == outcome
    assert [item.label for item in verdicts["C34"].evidence] == ["before", "after", "gain"]
    assert verdicts["C34"].evidence[-1].confidence == pytest.approx(2 / 3)
    assert ("without a GPU" in verdicts["C34"].reason) == (not gpus)
    assert verdicts["C37"].outcome == "not testable here"


def test_nothing_to_improve_is_no_gain():
    verdicts = results.judge_changes(results.article_changes(walked(2.0, 1.0)), walked(2.0, 1.0))
    errors = next(v for v in verdicts if v.claim == "C36")
    assert errors.outcome == "not testable here" and "nothing to improve" in errors.reason


def test_the_figure_of_gains_leaves_out_what_was_not_measured():
    frame = results.gains_frame(results.article_changes(walked()))
    assert "mean GPU utilisation" not in set(frame["metric"])
    assert frame.set_index("metric")["value"]["P95 latency"] == pytest.approx(8.0)
    assert not any(math.isnan(value) for value in frame["claimed"])


def test_every_claim_is_listed_with_the_verdicts_there_are(tmp_path, monkeypatch):
    path = tmp_path / "verdicts.json"
    record(Verdict("C34", "partly", "because"), path)
    monkeypatch.setenv("LABKIT_VERDICTS", str(path))
    found = results.verdicts_so_far("quick", tmp_path)
    table = results.claims_table(found)
    assert len(table.rows) == 43
    assert {row[2].replace("\u00a0", " ") for row in table.rows} == {"partly", "no verdict yet"}


def test_the_knobs_of_chosen_rungs_are_told():
    table = results.rungs_table(choose(ladder("some/model"), list(ENDS)))
    assert table.rows[0][1] == "the start"
    assert table.rows[1][1] == "engine: transformers → labkit, attention: eager → sdpa"


def test_what_one_user_predicts_and_what_many_got():
    text = results.baseline_takeaway(
        [made_run(2.0, users=1, count=10), made_run(8.0)],
        pd.DataFrame({"group": ["softmax"], "calls": [1], "self_s": [1.0], "share": [1.0]}),
    )
    assert "From 1 to 4 users the P95 latency went from 2.00\u00a0s to 8.00\u00a0s" in text and "*softmax*" in text


def test_the_readmes_figure_is_whole_and_names_machine_day_and_interval():
    svg = first_result.first_result_svg(walked())
    root = ElementTree.fromstring(svg)
    text = " ".join(root.itertext())
    for part in ("as first deployed", "own engine", "8.00×", "interval 8.00 to 8.00 at 90 %", "2 cores of a CPU",
                 "2026-01-01 to 2026-01-03", "all 120"):  # fmt: skip
        assert part in text
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "") and "prefers-color-scheme" in svg


def test_without_a_walk_there_is_no_figure(tmp_path):
    with pytest.raises(UserError, match="holds no walk of the ladder"):
        first_result.write_first_result(RunStore(tmp_path), tmp_path / "figure.svg")


def test_the_newest_walk_is_drawn(monkeypatch, tmp_path):
    old, new = walked(), walked()
    for run in new:
        run.manifest["walk"] = "another"
        run.manifest["started_at"] = "2027" + run.manifest["started_at"][4:]
    monkeypatch.setattr(RunStore, "list", lambda self: [*new[:2], *old, *new[2:]])
    found = first_result.newest_walk(RunStore(tmp_path))
    assert len(found) == 6 and all(run.manifest["walk"] == "another" for run in found)
    assert [run.manifest["rung"] for run in found] == [ENDS[0]] * 3 + [ENDS[1]] * 3
