"""`labkit run`: executes notebooks, each in a process of its own under a watchdog, and keeps what came of it."""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import nbformat

from labkit.errors import UserError
from labkit.experiments.claims import VERDICTS_VARIABLE, read_verdicts
from labkit.experiments.store import RUNS_VARIABLE
from labkit.probes.others import OtherLoad
from labkit.report import processes
from labkit.report.environment import environment
from labkit.report.profiles import PROFILE_VARIABLE, Profile
from labkit.report.progress import Progress
from labkit.report.shelf import Execution, Shelf, Status

FAILED_ANCHOR = "failed-cell"
BANNER_TAG = "labkit-banner"
TICK_S = 0.25


@dataclass
class _Course:
    """What the worker has said so far."""

    cell: str | None = None
    cell_began: float = 0.0
    cell_s: list[float] = field(default_factory=list)
    raised: str | None = None
    died: str | None = None


def find_notebooks(given: Sequence[Path], folder: Path) -> list[Path]:
    """The notebooks to execute: those given (paths, or names in ``folder``), or all of ``folder`` in order.

    Raises UserError for one that does not exist, for two of one name, and for a folder without any.
    """
    found = []
    for path in given:
        tried = (path, folder / path.name, folder / f"{path.name}.ipynb")
        existing = next((option for option in tried if option.is_file() and option.suffix == ".ipynb"), None)
        if existing is None:
            raise UserError(f"there is no notebook {path}; {folder} holds {_listed(sorted(folder.glob('*.ipynb')))}")
        found.append(existing)
    found = found or sorted(folder.glob("*.ipynb"))
    if not found:
        raise UserError(f"{folder} holds no notebooks; run this in the root of the repository, or name one")
    names = [path.stem for path in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two notebooks are called {', '.join(sorted(twice))}; their results would replace each other")
    return found


def run_notebooks(
    notebooks: Sequence[Path],
    profile: Profile,
    out: Path = Path("runs"),
    parameters: Mapping[str, Any] | None = None,
    timeout_s: float | None = None,
    progress: Progress | None = None,
) -> list[Execution]:
    """Executes them one after the other, whatever becomes of each, and returns how each ended.

    ``timeout_s`` replaces the profile's limits. Raises UserError when another process fills the same directory, and
    KeyboardInterrupt (after ending what runs) on Ctrl-C.
    """
    shelf, shown = Shelf.of(out.absolute(), profile.name), progress or Progress(sys.stdout)
    with shelf.lock():
        for name, started in shelf.cut_off().items():
            fate = "executed again" if name in {path.stem for path in notebooks} else "nothing of it is kept"
            shown.line(f"{name} was cut off (it had started at {started}); {fate}")
            shelf.abandon(name)
        found = environment()
        return [
            _execute(
                path, shelf, profile, dict(parameters or {}), timeout_s or profile.limit_s(path.stem), found, shown
            )
            for path in notebooks
        ]


def check(path: Path, parameters: Mapping[str, Any]) -> str | None:
    """What forbids executing a notebook with these parameters, or None."""
    from papermill import inspect_notebook

    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # whatever is wrong with the file, the others are still executed
        return f"it is no valid notebook: {str(error).splitlines()[0][:200]}"
    if not any("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells):
        return "no cell has the tag 'parameters'; tag the one that sets profile and interactive"
    known = set(inspect_notebook(str(path)))
    if unknown := sorted(set(parameters) - known):
        return (
            f"it has no parameter {', '.join(unknown)}; its parameters cell sets {', '.join(sorted(known)) or 'none'}"
        )
    return None


def claims_of(notebook: nbformat.NotebookNode) -> tuple[str, ...]:
    """The claims a notebook puts to the test: the ids on the line "Claims: C01, …" of a markdown cell."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (line := re.search(r"^\W*Claims?\b\W*(.*)$", cell.source, re.MULTILINE)):
            if ids := re.findall(r"\bC\d\d\b", line.group(1)):
                return tuple(dict.fromkeys(ids))
    return ()


def _execute(
    path: Path,
    shelf: Shelf,
    profile: Profile,
    given: dict[str, Any],
    limit_s: float,
    found: dict[str, Any],
    shown: Progress,
) -> Execution:
    name, began = path.stem, time.perf_counter()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    parameters = {"profile": profile.name, "interactive": False, **given}
    earlier = shelf.execution(name)
    shelf.begin(name, started)
    course, left = _Course(), list[str]()
    status: Status = "failed"
    claims: tuple[str, ...] = ()
    reason, load = check(path, parameters), OtherLoad()
    try:
        if reason is None:
            source = nbformat.read(path, as_version=4)
            claims = claims_of(source)
            shown.begin(
                name, sum(cell.cell_type == "code" for cell in source.cells) + 1, earlier.cell_s if earlier else ()
            )
            status, reason, left = _watch(path, shelf, profile, parameters, limit_s, course, shown)
    except BaseException:
        shelf.abandon(name)
        raise
    execution = Execution(
        name, profile.name, status, started, time.perf_counter() - began, limit_s, reason,
        course.cell if status != "succeeded" else None, tuple(course.cell_s), parameters, claims, tuple(left), found,
        load.cores(),
    )  # fmt: skip
    shelf.finish(execution, _finished(path, shelf.partial(name), execution), _verdicts(shelf, execution))
    shown.end(name, execution.status, execution.duration_s, execution.reason)
    if execution.disturbance:
        shown.line(f"{name}: {execution.disturbance}")
    return execution


def _watch(
    path: Path,
    shelf: Shelf,
    profile: Profile,
    parameters: dict[str, Any],
    limit_s: float,
    course: _Course,
    shown: Progress,
) -> tuple[Status, str | None, list[str]]:
    """Starts the worker and stays with it until it ends or its time is up. Whatever it started is ended with it."""
    name, token = path.stem, uuid.uuid4().hex
    order = {
        "source": str(path.absolute()),
        "output": str(shelf.partial(name)),
        "cwd": str(path.absolute().parent),
        "parameters": parameters,
    }
    surroundings = {
        **os.environ,
        processes.TOKEN_VARIABLE: token,
        VERDICTS_VARIABLE: str(shelf.partial_verdicts(name)),
        PROFILE_VARIABLE: profile.name,
        RUNS_VARIABLE: str(shelf.root),
        # The figure as data: a page draws it with the one shared script.
        "PLOTLY_RENDERER": "plotly_mimetype",
    }
    with tempfile.TemporaryFile("w+") as complaints:
        worker = subprocess.Popen(
            [sys.executable, "-m", "labkit.report.worker", json.dumps(order)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, text=True,
            env=surroundings, start_new_session=True,
        )  # fmt: skip
        try:
            in_time = _follow(worker, time.perf_counter() + limit_s, course, shown)
        finally:
            ended = worker.poll() is not None
            left = processes.end(token, worker.pid)
            code = worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    pipe.close()
        if not in_time:
            return "timed out", f"it did not end within its {limit_s:g} s (--timeout gives more)", left
        if course.raised is not None:
            return "failed", course.raised, left
        if code != 0 or not ended:
            complaints.seek(0)
            last = (complaints.read().strip().splitlines() or ["it said nothing"])[-1]
            return "died", course.died or f"the process executing it ended with {code}: {last}", left
    return "succeeded", None, left


def _follow(worker: subprocess.Popen[str], deadline: float, course: _Course, shown: Progress) -> bool:
    """Reads what the worker says until it ends; False when the deadline comes first."""
    said: queue.Queue[str | None] = queue.Queue()
    assert worker.stdout is not None
    threading.Thread(target=_pump, args=(worker.stdout, said.put), daemon=True).start()
    while True:
        try:
            line = said.get(timeout=TICK_S)
        except queue.Empty:
            line = ""
        if line is None:
            # Its output closed, so it is about to end; a worker that does not is as hung as any other.
            try:
                worker.wait(timeout=max(0.1, deadline - time.perf_counter()))
            except subprocess.TimeoutExpired:
                return False
            return True
        if line:
            _note(line, course)
        shown.tick(course.cell_s)
        if time.perf_counter() > deadline:
            return False


def _note(line: str, course: _Course) -> None:
    try:
        event = json.loads(line)
    except ValueError:
        return
    if not isinstance(event, dict):
        return
    match event.get("event"):
        case "start":
            course.cell, course.cell_began = event["cell"], time.perf_counter()
        case "end":
            course.cell_s.append(time.perf_counter() - course.cell_began)
        case "raised":
            course.raised = event["reason"]
        case "died":
            course.died = event["reason"]


def _pump(stream: IO[str], put: Callable[[str | None], None]) -> None:
    try:
        for line in stream:
            put(line)
    except ValueError:  # closed from the other side
        pass
    put(None)


def _finished(path: Path, partial: Path, execution: Execution) -> str:
    """The executed notebook as text, with a banner where it did not succeed. papermill's own marks are replaced."""
    try:
        notebook = nbformat.read(partial, as_version=4)
    except Exception:  # never begun, or killed while papermill wrote it
        notebook = _source_or_empty(path)
    notebook.cells = [
        cell for cell in notebook.cells if "papermill-error-cell-tag" not in cell.metadata.get("tags", [])
    ]
    for key in ("input_path", "output_path"):
        notebook.metadata.get("papermill", {}).pop(key, None)
    if execution.status != "succeeded":
        position = next((i for i, cell in enumerate(notebook.cells) if cell.get("id") == execution.failed_cell), None)
        if position is not None:
            text = f'<a id="{FAILED_ANCHOR}"></a>\n\n> **The execution stopped in the cell below.**'
            notebook.cells.insert(position, _banner_cell(text))
        notebook.cells.insert(0, _banner_cell(_banner(execution, position is not None)))
    return nbformat.writes(notebook) + "\n"


def _banner(execution: Execution, linked: bool) -> str:
    word = {"failed": "failed", "timed out": "was stopped: out of time", "died": "died"}[execution.status]
    reason = (execution.reason or "").replace("`", "'").replace("\n", " ")
    where = f"[Go to the failing cell](#{FAILED_ANCHOR}). " if linked else ""
    return (
        f"> **This execution {word}** after {execution.duration_s:.0f} s (profile {execution.profile}): `{reason}`\n>\n"
        f"> {where}What comes after it was not executed; no verdict of it counts."
    )


def _banner_cell(text: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_markdown_cell(text, metadata={"tags": [BANNER_TAG]})


def _source_or_empty(path: Path) -> nbformat.NotebookNode:
    try:
        return nbformat.read(path, as_version=4)
    except Exception:  # the banner says what is wrong with it
        return nbformat.v4.new_notebook()


def _verdicts(shelf: Shelf, execution: Execution) -> bytes | None:
    """The verdicts of an execution that succeeded; those of any other do not count."""
    path = shelf.partial_verdicts(execution.notebook)
    if execution.status != "succeeded" or not path.exists():
        return None
    read_verdicts(path)
    return path.read_bytes()


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(path.stem for path in paths) or "none"
