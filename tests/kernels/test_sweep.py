"""The script that looks for the fastest cut of the 4-bit kernel: what it would try, and what it says without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from labkit.kernels.w4a16_few import tuning

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "sweep_w4a16.py"
SPEC = spec_from_file_location("sweep_w4a16", SCRIPT)
assert SPEC is not None and SPEC.loader is not None
sweep = module_from_spec(SPEC)
SPEC.loader.exec_module(sweep)


@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize("matrix", sweep.MATRICES.split(","))
def test_the_cut_in_use_comes_first_and_none_twice(rows: int, matrix: str) -> None:
    product = sweep.product_of(rows, matrix)
    tried = list(sweep.cuts(product))
    outputs = product.outputs // 2 if product.silu else product.outputs
    assert tried[0] == tuning(rows, outputs, product.inputs, product.silu)
    assert len(set(tried)) == len(tried) > 10
    # a gate needs a tile of its up beside each of its own
    assert not product.silu or all(cut.tiles % 2 == 0 for cut in tried)


def test_without_a_gpu_it_says_that_it_needs_one() -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=hidden, capture_output=True, text=True)
    assert done.returncode == 1 and "needs a CUDA device" in done.stderr


@pytest.mark.parametrize(
    "given", [["--matrices", "8192"], ["--matrices", "100x256"], ["--rows", "17"], ["--rows", "x"]]
)
def test_what_is_no_matrix_is_told_how_one_is_written(given, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep", *given])
    with pytest.raises(SystemExit) as stopped:
        sweep.main()
    assert stopped.value.code == 2 and "like 8192x8192" in capsys.readouterr().err
