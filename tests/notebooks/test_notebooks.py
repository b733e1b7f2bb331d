"""The notebooks of this repository: clean in git, and whole when executed in profile quick."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from labkit.experiments.provenance import code_version, versions
from labkit.experiments.store import RunStore, default_store
from labkit.report.execute import check, claims_of
from labkit.report.profiles import load_profile
from labkit.report.shelf import Shelf

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

if not NOTEBOOKS:
    pytest.skip("there are no notebooks yet", allow_module_level=True)

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each
def test_the_source_is_stripped(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert "papermill" not in notebook.metadata and "widgets" not in notebook.metadata
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, "run: pre-commit run nbstripout --all-files"
        assert "papermill" not in cell.metadata


@each
def test_it_can_be_executed_headless_in_every_profile(path: Path) -> None:
    assert check(path, {"profile": "quick", "interactive": False}) is None
    for name in ("quick", "cpu", "h200"):
        assert load_profile(name).sizes(path.stem)


@each
def test_it_is_told_in_order(path: Path) -> None:
    """Question, prediction, experiment, figure, verdict, takeaway; and no function of more than a few lines."""
    notebook = nbformat.read(path, as_version=4)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown").lower()
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert prose.startswith("# ") and "predict" in prose
    assert claims_of(notebook), 'name the claims on a line "Claims: C01, …"'
    assert "environment_table(" in code[0] + code[1] and any("takeaway(" in cell for cell in code)
    assert max(len(cell.splitlines()) for cell in code) <= 40


def take_over(runs: RunStore, out: Path) -> None:
    """Copies what this code has measured already with these versions, as `make lab` makes it do before the tests.

    Nothing where the code is not as committed: of a new file git says only that it is there, so two states of it pass
    for one.
    """
    code = code_version()
    if code["commit"] is None or code["changes"] is not None:
        return
    for run in runs.list():
        if "key" in run.manifest and (run.manifest["code"], run.manifest["versions"]) == (code, versions()):
            shutil.copytree(run.path, out / run.name)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    out = tmp_path_factory.mktemp("executed")
    take_over(default_store(), out)
    command = [sys.executable, "-m", "labkit.cli", "run", "--profile", "quick", "--out", str(out)]
    limit_s = sum(load_profile("quick").limit_s(path.stem) for path in NOTEBOOKS) + 60
    # As a user runs them: the tests' one thread would slow the servers that are measured.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "TRITON_INTERPRET")
    }
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s, env=environment)
    return done, out


@each
@pytest.mark.notebooks
@pytest.mark.timeout(1500)
def test_it_succeeds_with_a_verdict_for_every_claim(
    path: Path, executed: tuple[subprocess.CompletedProcess[str], Path]
) -> None:
    done, out = executed
    shelf = Shelf.of(out, "quick")
    execution = shelf.execution(path.stem)
    assert execution is not None and execution.status == "succeeded", done.stdout + done.stderr
    assert {verdict.claim for verdict in shelf.verdicts(path.stem)} == set(execution.claims)
    assert execution.left_behind == ()
    # A page that is sent around should stay small: a figure keeps data, not its own copy of plotly.
    assert len(json.dumps(nbformat.read(shelf.notebook(path.stem), as_version=4))) < 2_000_000
