"""An executed notebook as the body of a page: nbconvert with our own template, and nothing fetched from anywhere."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from markupsafe import Markup
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

TEMPLATES = Path(__file__).resolve().parent / "templates"
ASSETS = Path(__file__).resolve().parent / "assets"
PLOTLY = "application/vnd.plotly.v1+json"
# A figure before its HTML twin, HTML before its text; widgets need a kernel and are left out.
PRIORITY = [
    PLOTLY,
    "text/html",
    "text/markdown",
    "image/svg+xml",
    "image/png",
    "image/jpeg",
    "text/latex",
    "text/plain",
]
LINK = re.compile(r'<a\b([^>]*?)href="([^":#?]+)\.ipynb(#[^"]*)?"([^>]*)>(.*?)</a>', re.DOTALL)
HEADING = re.compile(r'<h([1-3])[^>]*\bid="([^"]+)"[^>]*>(.*?)</h\1>', re.DOTALL)


@dataclass(frozen=True)
class Body:
    """``contents``: (level, anchor, text) of the headings below the first; ``title``: the first heading."""

    html: str
    title: str
    contents: tuple[tuple[int, str, str], ...]
    figures: bool


def render(notebook: nbformat.NotebookNode, pages: Collection[str]) -> Body:
    """``pages``: names of the notebooks that have a page beside this one; links to others become plain text."""
    exporter = HTMLExporter(
        template_name="labkit",
        extra_template_basedirs=[str(TEMPLATES)],
        filters={"script_json": script_json},
        anchor_link_text="¶",
        config=Config({"NbConvertBase": {"display_data_priority": PRIORITY}}),
    )
    text, _ = exporter.from_notebook_node(_displayable(notebook))
    text = LINK.sub(lambda found: _link(found, pages), text)
    headings = [(int(level), anchor, _plain(inner)) for level, anchor, inner in HEADING.findall(text)]
    title = headings[0][2] if headings else ""
    return Body(text, title, tuple(headings[1:] if len(headings) > 3 else ()), 'class="figure"' in text)


def script_json(value: Any) -> Markup:
    """JSON that may stand inside a script element: no "<" can end it early."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def code_css() -> str:
    """Colours of the code, light and dark."""
    light = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    bare = ".highlight, .highlight pre { background: var(--wash) !important; }\n"
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}\n{bare}"


def _displayable(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without outputs that only a live kernel could show, and without what a second, identical update left behind."""
    copy = nbformat.from_dict(notebook)
    for cell in copy.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _shows(output)]
    return copy


def _shows(output: Mapping[str, Any]) -> bool:
    return "data" not in output or any(kind in output["data"] for kind in PRIORITY)


def _link(found: re.Match[str], pages: Collection[str]) -> str:
    before, target, anchor, after, text = found.groups()
    name = target.rpartition("/")[2]
    if name not in pages:
        return f'<span class="missing" title="{html.escape(name)} has not been executed">{text}</span>'
    return f'<a{before}href="{name}.html{anchor or ""}"{after}>{text}</a>'


def _plain(inner: str) -> str:
    without_anchor = re.sub(r'<a class="anchor-link".*?</a>', "", inner, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", "", without_anchor)).strip()
