from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from labkit.bench.cli import ablation
from labkit.bench.run import check_workloads, where
from labkit.cli import app
from labkit.errors import UserError
from labkit.experiments.store import RunStore


def bench(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["bench", *arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_a_bench_is_printed_and_kept(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("labkit.bench.run.OtherLoad.cores", lambda self: 64.0)
    output = bench(
        "decode", "elementwise", "--model", str(tiny_model), "--device", "cpu", "--repeat", "2", "--peers", "none",
        "--without", "chunked_prefill", "--set", "max_batch=4", "--only", "GELU", "--runs", str(tmp_path),
    )  # fmt: skip
    assert "ceilings: copy" in output and "warm after" in output
    assert "chunked_prefill=False" in output and "elementwise: GELU" in output
    assert "Other programs kept 64.0 of" in output
    assert "SwiGLU" not in output and "eager" not in output
    (run,) = RunStore(tmp_path).list()
    assert str(run.path) in output.replace("\n", "")
    assert run.manifest["other_cores"] == 64.0
    assert run.manifest["deployment"]["max_batch"] == 4 and run.manifest["without"] == [["chunked_prefill", False]]
    assert run.manifest["workload"] == {"bench": ["decode", "elementwise"], "requests": None, "repeat": 2}
    assert len([row for row in run.manifest["rows"] if row["workload"] == "decode"]) == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name a workload; there are throughput, mix"),
        (["speed"], "no workload 'speed'"),
        (["mix", "--random-weights", "gpt-5"], "no shape 'gpt-5' under data/shapes; there are"),
        (["mix", "--random-weights", "x", "--model", "y"], "two models; give one"),
        (["mix", "--peers", "sglang"], "no peer 'sglang'"),
        (["mix", "--without", "max_batch"], "max_batch is not a switch"),
        (["mix", "--without", "warp"], "there is no knob 'warp'"),
        (["mix", "--set", "max_batch=0"], "max_batch must be"),
        (["mix", "--device", "cpu", "--random-weights", "deepseek-r1-distill-qwen-1.5b"], "too many for a CPU"),
    ],
)
def test_what_is_wrong_is_said(arguments, says, tmp_path):
    with pytest.raises(UserError, match=says):
        bench(*arguments, "--runs", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_an_ablation_is_a_switch_turned_off_or_another_value():
    assert ablation("chunked_prefill") == ("chunked_prefill", False)
    assert ablation("max_batch=8") == ("max_batch", 8)


def test_the_machine_and_the_versions_are_named():
    line = where("cpu")
    assert "cores; torch 2." in line and "vllm" in line and "transformers 5." in line


def test_the_page_on_performance_shows_commands_that_exist():
    page = Path(__file__).parents[2] / "docs" / "performance.md"
    shown = re.findall(r"^labkit bench (.*)$", page.read_text(), re.M)
    command = typer.main.get_command(app).commands["bench"]
    for arguments in shown:
        given = command.make_context("bench", shlex.split(arguments)).params
        check_workloads(given["workloads"])
        for knob in given["without"] or []:
            ablation(knob)
    assert len(shown) >= 6
