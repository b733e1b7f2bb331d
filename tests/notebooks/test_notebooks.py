"""The notebooks of this repository: clean in git, and whole when executed in profile quick."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import nbformat
import pytest

from labkit.experiments.store import default_store
from labkit.report.environment import environment
from labkit.report.execute import check, claims_of
from labkit.report.profiles import load_profile
from labkit.report.shelf import Execution, Shelf

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


def executed_before(path: Path, earlier: Shelf) -> bool:
    """Whether ``earlier`` holds a whole execution of this very code, as `make lab` leaves before the tests.

    Never where something is not as committed: of a new file git says only that it is there, so two states of it pass
    for one.
    """
    execution, here = earlier.execution(path.stem), environment()
    then = {} if execution is None else execution.environment
    command = ["git", "status", "--porcelain", "--", "labkit", "notebooks", "data"]
    changed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if execution is None or execution.status != "succeeded" or changed.returncode or changed.stdout:
        return False
    return all(then.get(name) == here[name] for name in ("code", "versions"))


@pytest.mark.parametrize(
    "other", [{"code": {"commit": "0" * 40, "changes": None}}, {"versions": {"python": "2.7"}}, {}], ids=str
)
def test_what_other_code_or_versions_executed_is_not_taken_over(other, tmp_path: Path) -> None:
    shelf, path = Shelf.of(tmp_path, "quick"), NOTEBOOKS[0]
    assert not executed_before(path, shelf)
    shelf.folder.mkdir(parents=True)
    shelf.notebook(path.stem).write_text(path.read_text())
    status = Execution(path.stem, "quick", "succeeded" if other else "failed", "", 1.0, 1.0,
                       environment=environment() | other)  # fmt: skip
    shelf._status(path.stem).write_text(json.dumps(asdict(status)))
    assert shelf.execution(path.stem) is not None and not executed_before(path, shelf)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[Path, Shelf]]:
    """What `labkit run` said, and where the execution of each notebook is: one that was made before, or its own."""
    out = tmp_path_factory.mktemp("executed")
    earlier = Shelf.of(default_store().root, "quick")
    missing = [path for path in NOTEBOOKS if not executed_before(path, earlier)]
    shelves = {path: Shelf.of(out, "quick") if path in missing else earlier for path in NOTEBOOKS}
    if not missing:
        return "", shelves
    command = [sys.executable, "-m", "labkit.cli", "run", "--profile", "quick", "--out", str(out)]
    limit_s = sum(load_profile("quick").limit_s(path.stem) for path in missing) + 60
    # As a user runs them: the tests' one thread would slow the servers that are measured.
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "TRITON_INTERPRET")
    }
    names = [path.stem for path in missing]
    done = subprocess.run([*command, *names], cwd=ROOT, capture_output=True, text=True, timeout=limit_s, env=inherited)
    return done.stdout + done.stderr, shelves


@each
@pytest.mark.notebooks
@pytest.mark.timeout(1500)
def test_it_succeeds_with_a_verdict_for_every_claim(path: Path, executed: tuple[str, dict[Path, Shelf]]) -> None:
    said, shelves = executed
    shelf = shelves[path]
    execution = shelf.execution(path.stem)
    assert execution is not None and execution.status == "succeeded", said
    assert {verdict.claim for verdict in shelf.verdicts(path.stem)} == set(execution.claims)
    assert execution.left_behind == ()
    # A page that is sent around should stay small: a figure keeps data, not its own copy of plotly.
    assert len(json.dumps(nbformat.read(shelf.notebook(path.stem), as_version=4))) < 2_000_000
