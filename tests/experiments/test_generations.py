"""Kernels of two generations: what is compared where, how C42 is judged, and that the switch does what it says."""

from __future__ import annotations

import os
import subprocess
import sys

import pandas as pd
import pytest
import torch

from labkit.experiments import generations
from labkit.experiments.contests import run_contests
from labkit.experiments.generations import CUDNN, FLASH, OURS_AMPERE, OURS_HOPPER, generations_contests
from labkit.experiments.generations import judge_generations as judge

CPU = torch.device("cpu")
COLUMNS = ["way", "x", "round", "seconds", "bytes", "note"]


def measured(seconds: dict[str, float | str], lengths: tuple[int, ...] = (1024, 4096)) -> pd.DataFrame:
    """15 equal rounds of every way and length; a way with a string has it for its note."""
    rows = []
    for x in lengths:
        for way, found in seconds.items():
            if isinstance(found, str):
                rows.append((way, x, -1, float("nan"), 0, found))
            else:
                rows += [(way, x, turn, found, 0, "") for turn in range(15)]
    return pd.DataFrame(rows, columns=COLUMNS)


def test_without_a_hopper_gpu_nothing_is_measured_and_the_claim_stays_open() -> None:
    table = run_contests(generations_contests([256, 512], CPU, torch.float32), CPU)
    assert set(table["way"]) == {FLASH, CUDNN, OURS_AMPERE, OURS_HOPPER} and set(table["x"]) == {256, 512}
    verdict = judge(table)
    assert verdict.outcome == "not testable here"
    assert "no GPU" in verdict.reason and "9.x" in verdict.reason


@pytest.mark.parametrize("capability, reason", [((8, 0), "8.0"), ((9, 0), ""), ((10, 0), "10.0")])
def test_another_gpu_is_named(capability: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = generations.why_not(torch.device("cuda"))
    assert reason in found and bool(found) == bool(reason)


@pytest.mark.parametrize(
    "times, outcome",
    [
        ({FLASH: 2.0, CUDNN: 1.0, OURS_AMPERE: 2.5, OURS_HOPPER: 1.5}, "confirmed"),
        ({FLASH: 2.0, CUDNN: 1.0, OURS_AMPERE: 1.0, OURS_HOPPER: 1.5}, "partly"),
        ({FLASH: 1.0, CUDNN: 1.1, OURS_AMPERE: 1.0, OURS_HOPPER: 1.5}, "refuted"),
        ({FLASH: 2.0, CUDNN: 1.0, OURS_AMPERE: "does not build", OURS_HOPPER: 1.5}, "partly"),
        ({FLASH: "x", CUDNN: "x", OURS_AMPERE: "x", OURS_HOPPER: "x"}, "not testable here"),
    ],
)
def test_both_pairs_count(times: dict[str, float | str], outcome: str) -> None:
    verdict = judge(measured(times))
    assert verdict.outcome == outcome
    if times[FLASH] == 2.0:
        assert [item.value for item in verdict.evidence][:2] == [2.0, 2.0], "one for each length"


def test_the_longest_prompt_decides() -> None:
    short = measured({FLASH: 1.0, CUDNN: 2.0, OURS_AMPERE: 1.0, OURS_HOPPER: 2.0}, (512,))
    long = measured({FLASH: 2.0, CUDNN: 1.0, OURS_AMPERE: 2.0, OURS_HOPPER: 1.0}, (8192,))
    verdict = judge(pd.concat([short, long]))
    assert verdict.outcome == "confirmed" and "8192 tokens" in verdict.reason
    assert min(item.value for item in verdict.evidence) == 0.5


def test_our_kernel_built_apart_computes_the_same() -> None:
    tokens = 130
    q, k, v = (torch.randn(1, 1, tokens, 128, generator=torch.Generator().manual_seed(n)) for n in range(3))
    before = os.environ.get("DISABLE_MMA_V3")
    found = generations._without_wgmma()(q, k, v)
    right = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    torch.testing.assert_close(found.double(), right, atol=1e-2, rtol=1e-2)
    assert os.environ.get("DISABLE_MMA_V3") == before


COMPILE = """
from labkit.experiments.generations import _TILE, without_wgmma
from labkit.kernels.attention_prefill import _dense_case
from labkit.kernels.compile_check import build
case = _dense_case(128, True, _TILE)
print(build(case))
with without_wgmma():
    print(build(case))
"""


@pytest.mark.slow
def test_the_two_builds_differ_in_the_instruction_and_neither_spills() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    hopper, ampere = done.stdout.splitlines()
    assert "hgmma=24" in hopper and "hgmma=0" in ampere, done.stderr
    assert "spilled=0" in hopper and "spilled=0" in ampere
