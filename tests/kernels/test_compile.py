"""The tuned kernels as sm_90 code: no more registers spilled than stated, HGMMA where matrices are multiplied. No GPU
is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = """
import triton
import triton.language as tl

from labkit.kernels.compile_check import CompileCase


@triton.jit
def double(x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def softmax(x, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    row = tl.load(x + at)
    e = tl.exp(row - tl.max(row, 0))
    tl.store(x + at, e / tl.sum(e, 0))


small = CompileCase("small", double, {"x": "*fp32", "n": "i32"}, {"BLOCK": 1024})
large = CompileCase("large", softmax, {"x": "*fp32"}, {"BLOCK": 16384}, num_warps=1)
matrix = CompileCase("matrix", double, {"x": "*fp32", "n": "i32:16"}, {"BLOCK": 1024}, hgmma=True)
wrong = CompileCase("wrong", double, {"x": "*fp32"}, {"BLOCK": 1024})
"""


def check(*modules: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The check in a process of its own: Triton decides at import whether kernels are interpreted or compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "labkit.kernels.compile_check", *modules]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)


def test_tuned_kernels_keep_to_their_registers_and_use_the_tensor_cores() -> None:
    result = check()
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "decode" in result.stdout and "prefill" in result.stdout


def test_what_is_wrong_with_a_kernel_is_told(tmp_path: Path) -> None:
    (tmp_path / "cases.py").write_text(KERNELS + "COMPILE_CASES = [small, large, matrix]")
    result = check("cases", path=tmp_path)
    assert result.returncode == 1, result.stderr
    _, small, large, matrix = result.stdout.splitlines()
    assert small.split()[0] == "small" and len(small.split()) == 6, "nothing is wrong with it"
    assert large.startswith("large") and "spills" in large
    assert matrix.startswith("matrix") and matrix.endswith("has no HGMMA")


def test_a_case_that_does_not_fit_its_kernel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(KERNELS + "COMPILE_CASES = [wrong]")
    result = check("wrong", path=tmp_path)
    assert result.returncode != 0 and "wrong: the case and the kernel differ in ['n']" in result.stderr
