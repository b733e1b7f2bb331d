"""What a notebook shows besides figures and tables: verdicts, takeaways, and the environment in its first cell."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import mistune

from labkit.experiments.claims import Evidence, Verdict, claim, record
from labkit.report.environment import code_line, environment, machine_line
from labkit.report.tables import Table, parts, quantity

COLOURS = {
    "confirmed": "#0f7b4f",
    "partly": "#a15c00",
    "refuted": "#b3261e",
    "not testable here": "#5b6470",
    "no verdict": "#5b6470",
}


class Shown:
    """Something with an HTML and a text form; a notebook shows the one, a terminal the other."""

    def __init__(self, page: str, text: str) -> None:
        self._page, self._text = page, text

    def _repr_html_(self) -> str:
        return self._page

    def __repr__(self) -> str:
        return self._text


def show_verdict(verdict: Verdict) -> Shown:
    """Records the verdict for the report (see ``claims.record``) and returns it to be shown by the cell."""
    record(verdict)
    stated = claim(verdict.claim)
    numbers = "".join(f"<li>{html.escape(_evidence(item))}</li>" for item in verdict.evidence)
    style = f"border-left:4px solid {COLOURS[verdict.outcome]};padding:.4em 1em;margin:.8em 0"
    page = (
        f'<div class="labkit-verdict" style="{style}">'
        f"<div>{badge(verdict.outcome)} <strong>{verdict.claim}</strong> {html.escape(stated.text)}</div>"
        f"<div>{html.escape(verdict.reason)}</div>{f'<ul>{numbers}</ul>' if numbers else ''}</div>"
    )
    lines = [f"{verdict.claim} {verdict.outcome}: {stated.text}", f"  {verdict.reason}"]
    return Shown(page, "\n".join(lines + [f"  - {_evidence(item)}" for item in verdict.evidence]))


def show_verdicts(verdicts: Sequence[Verdict]) -> Shown:
    """Several verdicts below each other, each recorded."""
    shown = [show_verdict(verdict) for verdict in verdicts]
    return Shown("".join(one._repr_html_() for one in shown), "\n".join(map(repr, shown)))


def takeaway(text: str) -> Shown:
    """The boxed conclusion of an experiment; ``text`` is Markdown."""
    style = "border:1px solid #2f6db5;border-left-width:6px;border-radius:4px;padding:.2em 1em;margin:1em 0"
    page = f'<div class="labkit-takeaway" style="{style}"><strong>Takeaway</strong>{mistune.html(text)}</div>'
    return Shown(page, f"Takeaway: {text}")


def environment_table(profile: str, **more: Any) -> Table:
    """For the first cell: machine, versions, commit, profile, and what else the notebook wants to name."""
    found = environment()
    shown = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    rows = [
        ("profile", profile),
        ("machine", machine_line(found["machine"])),
        ("system", str(found["machine"]["system"])),
        ("versions", shown),
        ("commit", code_line(found["code"])),
        *((name, str(value)) for name, value in more.items()),
    ]
    return Table(("", "what this was measured with"), tuple(rows), numbers=False)


def badge(outcome: str) -> str:
    """A coloured word."""
    style = f"background:{COLOURS[outcome]};color:#fff;border-radius:3px;padding:.1em .5em;font-size:.85em"
    return f'<span class="labkit-badge" style="{style}">{html.escape(outcome)}</span>'


def _evidence(item: Evidence) -> str:
    if item.low == item.high == item.value:
        return f"{item.label}: {quantity(item.value, item.unit)}"
    value, ends = parts(item.value, item.low, item.high, item.unit)
    return f"{item.label}: {value} ({item.confidence * 100:.0f} % interval {ends}, n = {item.n})"
