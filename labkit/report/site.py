"""`labkit report`: the executed notebooks as an offline site, with an index of notebooks, claims and verdicts."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import nbformat
import plotly.offline

from labkit import __version__
from labkit.errors import UserError
from labkit.experiments.claims import OUTCOMES, Verdict, load_claims
from labkit.files import write_atomic
from labkit.report.environment import code_line, machine_line
from labkit.report.pages import ASSETS, TEMPLATES, Body, code_css, render
from labkit.report.profiles import load_profile
from labkit.report.progress import clock
from labkit.report.shelf import Execution, Shelf

MARK = ".labkit-site"


@dataclass(frozen=True)
class _Page:
    execution: Execution
    body: Body
    verdicts: tuple[Verdict, ...]

    @property
    def path(self) -> str:
        return f"{self.execution.profile}/{self.execution.notebook}.html"


def build(runs: Path, site: Path) -> Path:
    """Builds ``site`` anew from what `labkit run` left in ``runs`` and returns its index page.

    The old site stays until the new one is whole. Raises UserError when nothing has been executed, and when ``site``
    is a directory that is not ours.
    """
    shelves = [Shelf(folder) for folder in sorted((runs / "notebooks").glob("*")) if folder.is_dir()]
    filled = [shelf for shelf in shelves if shelf.names() or shelf.cut_off()]
    if not filled:
        raise UserError(f"no notebook has been executed into {runs}; run `labkit run` first")
    if site.exists() and not (site / MARK).exists() and any(site.iterdir()):
        raise UserError(f"{site} holds something that is no site of labkit; choose another directory with --site")
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    beside = site.with_name(f".{site.name}.{os.getpid()}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        _assets(beside)
        pages: dict[str, list[_Page]] = {}
        for shelf in filled:
            pages[shelf.folder.name] = _pages(shelf)
            for page in pages[shelf.folder.name]:
                write_atomic(beside / page.path, _page_html(environment, page, shelf))
        write_atomic(beside / "index.html", _index_html(environment, filled, pages))
        write_atomic(beside / MARK, __version__)
        _replace(beside, site)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return site / "index.html"


def _pages(shelf: Shelf) -> list[_Page]:
    names, pages = shelf.names(), []
    for name in names:
        execution = shelf.execution(name)
        if execution is None:
            continue
        notebook = nbformat.read(shelf.notebook(name), as_version=4)
        pages.append(_Page(execution, render(notebook, names), tuple(shelf.verdicts(name))))
    return pages


def _page_html(environment: jinja2.Environment, page: _Page, shelf: Shelf) -> str:
    execution, found = page.execution, page.execution.environment
    facts = [
        f"profile {execution.profile}",
        f"{execution.status}, took {clock(execution.duration_s)}",
        _when(execution.started),
    ]
    return environment.get_template("page.html.j2").render(
        title=page.body.title or execution.notebook,
        root="../",
        figures=page.body.figures,
        folded=True,
        body=page.body.html,
        contents=page.body.contents,
        facts=facts + ([machine_line(found["machine"])] if found else []),
        warnings=_warnings(shelf, execution),
        footer=_footer([execution]),
    )


def _index_html(environment: jinja2.Environment, shelves: Sequence[Shelf], pages: dict[str, list[_Page]]) -> str:
    every = [page for of_profile in pages.values() for page in of_profile]
    judged: dict[str, list[dict[str, Any]]] = {}
    for page in every:
        for verdict in page.verdicts:
            where = f"{page.execution.notebook}, {page.execution.profile}"
            row = {"outcome": verdict.outcome, "reason": verdict.reason, "where": where, "page": page.path}
            judged.setdefault(verdict.claim, []).append(row)
    claims = [{"id": name, "text": one.text, "verdicts": judged.get(name, [])} for name, one in load_claims().items()]
    counted = Counter(row["outcome"] for rows in judged.values() for row in rows)
    return environment.get_template("index.html.j2").render(
        title="What the lab found", root="", figures=False, folded=False, contents=[], warnings=[], facts=[],
        counts=[(outcome, counted[outcome]) for outcome in OUTCOMES], open=len(claims) - len(judged), claims=claims,
        shelves=[_shelf_facts(shelf, pages[shelf.folder.name]) for shelf in shelves],
        footer=_footer([page.execution for page in every]),
    )  # fmt: skip


def _shelf_facts(shelf: Shelf, pages: Sequence[_Page]) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {}
    for page in pages:
        execution = page.execution
        warnings = _warnings(shelf, execution)
        counted = Counter(verdict.outcome for verdict in page.verdicts)
        rows[execution.notebook] = {
            "name": execution.notebook, "title": page.body.title, "page": page.path, "status": execution.status,
            "reason": " ".join([execution.reason or "", *warnings]).strip(), "took": clock(execution.duration_s),
            "started": _when(execution.started),
            "verdicts": [(outcome, counted[outcome]) for outcome in OUTCOMES if counted[outcome]],
        }  # fmt: skip
    if not shelf.busy():
        for name, started in shelf.cut_off().items():
            if name not in rows:
                reason = "It did not come to its end; nothing of it is shown."
                rows[name] = {
                    "name": name,
                    "status": "cut off",
                    "reason": reason,
                    "started": _when(started),
                    "took": "–",
                }
    return {
        "profile": shelf.folder.name,
        "description": _description(shelf.folder.name),
        "rows": [rows[name] for name in sorted(rows)],
        "environments": _environments([page.execution for page in pages]),
    }


def _environments(executions: Sequence[Execution]) -> list[dict[str, str]]:
    """One entry for each different environment, with the notebooks that were executed in it."""
    entries: dict[str, dict[str, str]] = {}
    for execution in executions:
        found = execution.environment
        if not found:
            continue
        entry = {
            "machine": machine_line(found["machine"]),
            "system": str(found["machine"]["system"]),
            "commit": code_line(found["code"]),
            "versions": ", ".join(f"{name} {number}" for name, number in found["versions"].items()),
        }
        known = entries.setdefault(str(entry), {**entry, "notebooks": ""})
        known["notebooks"] += (", " if known["notebooks"] else "") + execution.notebook
    return list(entries.values())


def _warnings(shelf: Shelf, execution: Execution) -> list[str]:
    found = [execution.disturbance] if execution.disturbance else []
    started = None if shelf.busy() else shelf.cut_off().get(execution.notebook)
    if started:
        found.append(f"A later execution, started {_when(started)}, was cut off; this is the one before it.")
    return found


def _description(profile: str) -> str:
    try:
        return load_profile(profile).description
    except UserError:
        return ""


def _when(started: str) -> str:
    return started.replace("T", " ").replace("+00:00", " UTC")


def _footer(executions: Sequence[Execution]) -> str:
    latest = max((execution.started for execution in executions), default="–")
    return (
        f"labkit {__version__}. Latest execution started {_when(latest)}. This page asks no other machine for anything."
    )


def _assets(site: Path) -> None:
    for asset in sorted(ASSETS.iterdir()):
        write_atomic(site / "assets" / asset.name, asset.read_bytes())
    write_atomic(site / "assets" / "code.css", code_css())
    write_atomic(site / "assets" / "plotly.min.js", plotly.offline.get_plotlyjs())


def _replace(new: Path, site: Path) -> None:
    old = site.with_name(f".{site.name}.{os.getpid()}.old")
    site.parent.mkdir(parents=True, exist_ok=True)
    if site.exists():
        os.replace(site, old)
    os.replace(new, site)
    shutil.rmtree(old, ignore_errors=True)
