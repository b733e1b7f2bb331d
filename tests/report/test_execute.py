from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest

from labkit import cli
from labkit.errors import UserError
from labkit.experiments.claims import VERDICTS_VARIABLE
from labkit.report import execute, site
from labkit.report.profiles import Profile
from labkit.report.progress import Progress
from labkit.report.shelf import Shelf

PROFILE = Profile("quick", "for tests", 60.0, {})
VERDICT = (
    "from labkit.experiments.claims import Verdict, record\n"
    "record(Verdict('C34', 'partly', 'smaller'))\n"
    "import os; open('cwd.txt', 'w').write(os.getcwd())\n"
    "print(profile, interactive, number)"
)


def labkit(*words: str, cwd: Path, **surroundings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "labkit.cli", *words]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=120, env={**os.environ, **surroundings}
    )


def source_of(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, as_version=4).cells]


def gone(pid: int, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.notebooks
def test_one_fails_the_others_still_run(write: Any, tmp_path: Path) -> None:
    write("a_good", VERDICT)
    write("b_raises", "from labkit.experiments.claims import Verdict, record\nrecord(Verdict('C35', 'partly', 'x'))",
          'raise ValueError("boom `at` once")', "print('never')")  # fmt: skip
    write("c_untagged", "1", tag=False)
    write("d_good", "assert not interactive")
    done = labkit("run", "--folder", "nb", "-p", "number=[1, 2]", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    shelf = Shelf.of(tmp_path / "runs", "quick")
    found = {name: shelf.execution(name) for name in shelf.names()}
    assert {name: one.status for name, one in found.items() if one} == {
        "a_good": "succeeded", "b_raises": "failed", "c_untagged": "failed", "d_good": "succeeded",
    }  # fmt: skip

    good = found["a_good"]
    assert good is not None and good.reason is None and good.claims == ("C34", "C35")
    assert good.parameters == {"profile": "quick", "interactive": False, "number": [1, 2]}
    assert good.environment["versions"]["papermill"] and good.environment["machine"]["cores"] >= 1
    assert len(good.cell_s) == 3 and sum(good.cell_s) < good.duration_s
    assert [verdict.claim for verdict in shelf.verdicts("a_good")] == ["C34"]
    executed = nbformat.read(shelf.notebook("a_good"), as_version=4)
    assert executed.cells[-1].outputs[0].text == "quick False [1, 2]\n"
    assert (tmp_path / "nb" / "cwd.txt").read_text() == str(tmp_path / "nb")
    assert str(tmp_path) not in str(executed.metadata)

    bad = found["b_raises"]
    assert bad is not None and bad.reason == "ValueError: boom `at` once"
    assert shelf.verdicts("b_raises") == []  # reached before the failure, so they do not count
    sources = source_of(shelf.notebook("b_raises"))
    assert "This execution failed" in sources[0] and f"(#{execute.FAILED_ANCHOR})" in sources[0]
    marker = next(index for index, source in enumerate(sources) if f'id="{execute.FAILED_ANCHOR}"' in source)
    assert sources[marker + 1].startswith("raise ValueError")
    assert "papermill" not in "".join(sources)
    untagged = found["c_untagged"]
    assert untagged is not None and "no cell has the tag 'parameters'" in str(untagged.reason)
    assert done.stdout.count("succeeded") == 4  # as they end, and in the table
    assert "ValueError: boom" in done.stdout


@pytest.mark.notebooks
def test_the_watchdog_ends_a_hung_notebook_with_all_it_started(write: Any, tmp_path: Path) -> None:
    hangs = (
        "import subprocess, os, time\n"
        "child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "open('pids.tmp', 'w').write(f'{os.getpid()} {child.pid}'); os.rename('pids.tmp', 'pids')\n"
        "time.sleep(600)"
    )
    path, said = write("hangs", hangs, "print('never')"), io.StringIO()
    began = time.monotonic()
    (execution,) = execute.run_notebooks([path], PROFILE, tmp_path / "runs", timeout_s=15, progress=Progress(said))
    assert 15 <= time.monotonic() - began < 25
    assert execution.status == "timed out" and "15 s" in str(execution.reason) and "--timeout" in str(execution.reason)
    kernel, child = map(int, (tmp_path / "nb" / "pids").read_text().split())
    assert gone(kernel) and gone(child)
    sources = source_of(Shelf.of(tmp_path / "runs", "quick").notebook("hangs"))
    assert "out of time" in sources[0] and sources.index(hangs) > 2


@pytest.mark.notebooks
def test_a_kernel_that_dies_is_told_from_a_cell_that_raises(write: Any, tmp_path: Path) -> None:
    path = write("dies", "import os; os.kill(os.getpid(), 9)")
    left = write("leaves", "import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True)")
    died, leaves = execute.run_notebooks([path, left], PROFILE, tmp_path / "runs", progress=Progress(io.StringIO()))
    assert died.status == "died" and "DeadKernelError" in str(died.reason)
    assert leaves.status == "succeeded" and leaves.left_behind == ("sleep",)


@pytest.mark.notebooks
def test_killed_in_the_middle_it_says_so_and_starts_again(write: Any, tmp_path: Path) -> None:
    twice = (
        "import os, pathlib, time\n"
        "again = pathlib.Path('began').exists()\n"
        "if not again:\n"
        "    pathlib.Path('began.tmp').write_text(str(os.getpid())); os.rename('began.tmp', 'began')\n"
        "    time.sleep(600)"
    )
    write("long", twice)
    command = [sys.executable, "-m", "labkit.cli", "run", "--folder", "nb"]
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    began, shelf = tmp_path / "nb" / "began", Shelf.of(tmp_path / "runs", "quick")
    deadline = time.monotonic() + 60
    while not began.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(UserError, match="another `labkit run`"):
        execute.run_notebooks([tmp_path / "nb" / "long.ipynb"], PROFILE, tmp_path / "runs")
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert gone(int(began.read_text()))  # the kernel does not outlive the command
    assert shelf.names() == [] and shelf.execution("long") is None and list(shelf.cut_off()) == ["long"]
    assert "cut off" in site.build(tmp_path / "runs", tmp_path / "site").read_text()
    assert not (tmp_path / "site" / "quick").exists()

    again = labkit("run", "--folder", "nb", cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "long was cut off" in again.stdout and "executed again" in again.stdout
    execution = shelf.execution("long")
    assert execution is not None and execution.status == "succeeded" and shelf.cut_off() == {}
    assert sorted(path.name for path in shelf.folder.iterdir()) == [".lock", "long.ipynb", "long.status.json"]


def test_unknown_parameters_and_files_that_are_no_notebooks_are_named(write: Any, tmp_path: Path) -> None:
    good = write("good")
    broken = tmp_path / "nb" / "broken.ipynb"
    broken.write_text('{"cells": [')
    assert execute.check(good, {"profile": "quick", "interactive": False}) is None
    assert "no parameter nmber; its parameters cell sets interactive, number, profile" in str(
        execute.check(good, {"nmber": 1})
    )
    assert "no valid notebook" in str(execute.check(broken, {}))
    shown = Progress(io.StringIO())
    ended = execute.run_notebooks([good, broken], PROFILE, tmp_path / "runs", {"nmber": 1}, progress=shown)
    assert [one.status for one in ended] == ["failed", "failed"]
    assert "This execution failed" in source_of(Shelf.of(tmp_path / "runs", "quick").notebook("broken"))[0]


def test_notebooks_are_found_by_path_and_by_name(write: Any, tmp_path: Path) -> None:
    second, first = write("01_b"), write("00_a")
    folder = tmp_path / "nb"
    assert execute.find_notebooks([], folder) == [first, second]
    assert execute.find_notebooks([Path("01_b")], folder) == [second]
    assert execute.find_notebooks([second], Path("elsewhere")) == [second]
    with pytest.raises(UserError, match="no notebook nope; .* holds 00_a, 01_b"):
        execute.find_notebooks([Path("nope")], folder)
    with pytest.raises(UserError, match="holds no notebooks"):
        execute.find_notebooks([], tmp_path / "empty")
    with pytest.raises(UserError, match="two notebooks are called 00_a"):
        execute.find_notebooks([first, Path("00_a")], folder)


@pytest.mark.parametrize(
    ("head", "claims"),
    [
        ("Claims: C01, C34", ("C01", "C34")),
        ("**Claims:** C06 and C06", ("C06",)),
        ("> Claim C39.", ("C39",)),
        ("This is claimed of C12", ()),
    ],
)
def test_claims_of_a_notebook(write: Any, head: str, claims: tuple[str, ...]) -> None:
    assert execute.claims_of(nbformat.read(write("x", head=head), as_version=4)) == claims


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "--profile", "huge"), "choose one of quick, cpu, h200"),
        (("run", "-p", "oops"), "name=value"),
        (("run",), "holds no notebooks"),
        (("run", "00_x"), "no notebook 00_x"),
        (("report",), "run `labkit run` first"),
    ],
)
def test_wrong_use_is_one_line(
    words: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["labkit", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().err
    assert ended.value.code == 1 and said in told and len(told.splitlines()) == 1


def test_the_environment_variable_of_verdicts_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    # Were it set around the tests, the verdicts they record would land in somebody's report.
    assert VERDICTS_VARIABLE not in os.environ
