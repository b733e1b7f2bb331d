"""The site as a reader sees it: opened from the disk in a headless Chromium, which must ask nobody for anything."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from labkit.experiments import claims
from labkit.experiments.intervals import Estimate
from labkit.report import figures, site
from labkit.report.display import show_verdict, takeaway
from labkit.report.shelf import Execution, Shelf
from labkit.report.tables import Change, change_table

pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("LABKIT_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site of two notebooks, the second of which failed."""
    root = tmp_path_factory.mktemp("report")
    shelf = Shelf.of(root / "runs", "quick")
    latency = pd.DataFrame(
        {"users": [1, 16] * 2, "deployment": ["as first deployed"] * 2 + ["continuous"] * 2,
         "value": [0.2, 3.4, 0.05, 0.8],
         "low": [0.18, 3.0, 0.04, 0.7], "high": [0.23, 4.0, 0.06, 0.95]}
    )  # fmt: skip
    figure = figures.latency_by_users(latency, limit_s=0.8, title="Latency grows with the users").to_plotly_json()
    before, after = Estimate(3.4, 3.0, 4.0, 96, "s"), Estimate(0.8, 0.7, 0.95, 96, "s")
    verdict = claims.judge_ratio("C34", claims.ratio_of(before, after))
    table = change_table([Change("P95 latency", before, after, "C34")], "2 cores")
    wide = pd.DataFrame([range(60)] * 2)
    cells = [
        new_markdown_cell("# The first\n\nSee [the second](01_b.ipynb) and [a third](02_c.ipynb).\n\n> A prediction."),
        new_code_cell("profile = 'quick'", metadata={"tags": ["parameters"]}),
        new_markdown_cell("## Experiment"),
        new_code_cell("figure", outputs=[_shown({"application/vnd.plotly.v1+json": _plain(figure)})]),
        new_code_cell(
            "table", outputs=[_shown({"text/html": table._repr_html_()}), _shown({"text/html": wide.to_html()})]
        ),
        new_markdown_cell("## Result\n\n### Verdict\n\nHere."),
        new_code_cell("v", outputs=[_shown({"text/html": show_verdict(verdict)._repr_html_()})]),
        new_code_cell("t", outputs=[_shown({"text/html": takeaway("It **pays**.")._repr_html_()})]),
    ]
    for name, status, chosen in (("00_a", "succeeded", cells), ("01_b", "failed", [new_markdown_cell("# The second")])):
        execution = Execution(name, "quick", status, "2026-01-02T03:04:05+00:00", 12.0, 60.0)  # type: ignore[arg-type]
        shelf.begin(name, execution.started)
        claims.record(verdict, shelf.partial_verdicts(name))
        verdicts = shelf.partial_verdicts(name).read_bytes() if status == "succeeded" else None
        shelf.finish(execution, nbformat.writes(new_notebook(cells=chosen)), verdicts)
    return site.build(root / "runs", root / "site")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here; install one or name it in LABKIT_CHROMIUM")
    playwright = pytest.importorskip("playwright.sync_api", reason="the playwright package is not installed")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        browser.new_page()  # a Chromium without any page may end
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Opens a page and keeps watch: a request to any network, an error in the console or a dead link fails the test."""
    contexts, asked, complaints = [], [], []

    def open_page(path: Path, width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.set_default_timeout(15_000)
        page.goto(path.as_uri(), wait_until="load")
        if page.locator(".figure").count():
            page.wait_for_selector(".figure svg.main-svg")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [url for url in asked if not url.startswith(("file://", "data:"))] == [] and asked
    assert complaints == []


def test_the_figure_is_drawn_and_the_links_lead_on(opened: Any, built: Path) -> None:
    page = opened(built)
    assert page.locator("tr[id^=C]").count() == 43
    page.click("text=00_a >> nth=0")
    assert page.title() == "The first"
    page.wait_for_selector(".figure svg.main-svg")
    assert page.locator("svg text", has_text="as first deployed").count() == 1
    assert page.locator("svg text", has_text="limit 800").count() == 1
    page.click("nav.contents >> text=Result")
    assert page.url.endswith("#Result")
    page.click("text=the second")
    assert page.title() == "The second"
    page.click("a.home")
    assert page.title() == "What the lab found"


def test_no_link_of_the_site_is_dead(opened: Any, built: Path) -> None:
    for path in sorted(built.parent.rglob("*.html")):
        page = opened(path)
        for target in page.eval_on_selector_all("a[href]", "links => links.map(link => link.href)"):
            file, _, anchor = target.removeprefix("file://").partition("#")
            assert Path(file).is_file(), f"{path.name}: {target}"
            if anchor and Path(file) == path:
                assert page.evaluate("id => document.getElementById(decodeURIComponent(id)) !== null", anchor), target


def test_code_is_folded_until_asked_for(opened: Any, built: Path) -> None:
    page = opened(built.parent / "quick" / "00_a.html")
    assert page.locator("details.source").count() == 5 and page.locator("details.source[open]").count() == 0
    page.check("#all-code")
    assert page.locator("details.source[open]").count() == 5


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(opened: Any, built: Path, width: int) -> None:
    for path in (built, built.parent / "quick" / "00_a.html"):
        page = opened(path, width=width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_dark_screens_get_light_words(opened: Any, built: Path) -> None:
    page = opened(built.parent / "quick" / "00_a.html", scheme="dark")
    page.wait_for_selector(".figure svg.main-svg")
    grey = (
        "element => getComputedStyle(element).%s.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + +part, 0) / 3"
    )
    assert page.eval_on_selector(".figure .gtitle", grey % "fill") > 180
    assert page.eval_on_selector("body", grey % "backgroundColor") < 60


def _shown(data: dict[str, Any]) -> Any:
    return new_output("display_data", data=data)


def _plain(figure: Any) -> Any:
    import json

    from plotly.utils import PlotlyJSONEncoder

    return json.loads(json.dumps(figure, cls=PlotlyJSONEncoder))
