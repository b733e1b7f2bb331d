from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import plotly.graph_objects as go
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from labkit.errors import UserError
from labkit.report import pages, site
from labkit.report.shelf import Execution, Shelf

DONE = Execution("00_a", "quick", "succeeded", "2026-01-02T03:04:05+00:00", 12.0, 60.0)
VERDICTS = b'[{"claim": "C34", "outcome": "partly", "reason": "smaller", "evidence": []}]'


def executed(*cells: Any) -> str:
    return nbformat.writes(new_notebook(cells=list(cells)))


def put(root: Path, execution: Execution, text: str, verdicts: bytes | None = None) -> Shelf:
    shelf = Shelf.of(root, execution.profile)
    shelf.begin(execution.notebook, execution.started)
    shelf.finish(execution, text, verdicts)
    return shelf


def rendered(*cells: Any, names: tuple[str, ...] = ()) -> str:
    return pages.render(new_notebook(cells=list(cells)), names).html


def test_links_between_notebooks_become_links_between_pages() -> None:
    text = rendered(
        new_markdown_cell("[there](01_b.ipynb#x) [nowhere](02_c.ipynb) [out](https://example.org/x.ipynb)"),
        names=("01_b",),
    )
    assert 'href="01_b.html#x"' in text and "02_c.html" not in text and "nowhere" in text
    assert "https://example.org/x.ipynb" in text


def test_a_figure_is_data_that_cannot_end_its_script() -> None:
    figure = go.Figure(go.Scatter(y=[1, 2], name="</script><b>"))
    output = new_output("display_data", data={pages.PLOTLY: figure.to_plotly_json(), "text/html": "<p>not this</p>"})
    text = rendered(new_code_cell("figure", outputs=[output]))
    assert text.count("</script>") == 1 and "\\u003c/script" in text and "not this" not in text


def test_code_is_folded_and_results_are_not() -> None:
    outputs = [new_output("stream", name="stdout", text="seen\n"), new_output("stream", name="stderr", text="aside\n")]
    text = rendered(
        new_code_cell("x = 1", outputs=outputs), new_code_cell("p = 1", metadata={"tags": ["injected-parameters"]})
    )
    assert text.index("<details") < text.index("seen") and not re.search(r"<details[^>]*\bopen", text)
    assert "parameters of this execution" in text and "messages" in text


def test_a_widget_without_a_kernel_is_left_out() -> None:
    widget = new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {"model_id": "x"}})
    both = new_output("display_data", data={**widget.data, "text/html": "<p>instead</p>"})
    text = rendered(new_code_cell("w", outputs=[widget, both]))
    assert "model_id" not in text and "instead" in text


def test_contents_come_from_the_headings() -> None:
    body = pages.render(
        new_notebook(cells=[new_markdown_cell("# Title\n\n## One `x`\n\n### Two\n\n## Three & four")]), ()
    )
    assert body.title == "Title"
    assert [(level, text) for level, _, text in body.contents] == [(2, "One x"), (3, "Two"), (2, "Three & four")]
    assert all(f'id="{anchor}"' in body.html for _, anchor, _ in body.contents)


def test_the_index_lists_notebooks_claims_and_verdicts(tmp_path: Path) -> None:
    put(tmp_path / "runs", DONE, executed(new_markdown_cell("# The first")), VERDICTS)
    put(tmp_path / "runs", replace(DONE, notebook="01_b", status="failed", reason="E: <x>"), executed())
    put(tmp_path / "runs", replace(DONE, profile="h200"), executed())
    index = site.build(tmp_path / "runs", tmp_path / "site").read_text()
    assert "The first" in index and 'href="quick/00_a.html"' in index and 'href="h200/00_a.html"' in index
    assert "E: &lt;x&gt;" in index and index.count('<tr id="C') == 43
    row = index[index.index('<tr id="C34"') : index.index('<tr id="C35"')]
    assert "partly" in row and "smaller" in row and "quick/00_a.html" in row
    assert "42</b>not judged yet" in index
    for page in (tmp_path / "site").rglob("*.html"):
        assert not re.search(r'(src|href)="https?:', page.read_text()), page
    assert "plotly.min.js" not in (tmp_path / "site" / "quick" / "00_a.html").read_text()  # it has no figure


def test_an_execution_that_was_cut_off_is_named_beside_the_one_before(tmp_path: Path) -> None:
    put(tmp_path / "runs", DONE, executed()).begin("00_a", "2026-02-02T00:00:00+00:00")
    index = site.build(tmp_path / "runs", tmp_path / "site").read_text()
    page = (tmp_path / "site" / "quick" / "00_a.html").read_text()
    assert "A later execution, started 2026-02-02 00:00:00 UTC, was cut off" in index and "was cut off" in page


def test_other_programs_that_took_much_are_named_on_both_pages(tmp_path: Path) -> None:
    machine = {"cores": 2, "cpu": "any", "ram_bytes": 1, "system": "any"}
    where = {"machine": machine, "versions": {}, "code": {}}
    busy = replace(DONE, environment=where, other_cores=0.5)
    for execution, named in (
        (busy, True),
        (replace(busy, other_cores=0.1), False),
        (replace(busy, left_behind=("sh",)), False),
        (replace(busy, status="timed out"), False),
    ):
        put(tmp_path / "runs", execution, executed())
        index = site.build(tmp_path / "runs", tmp_path / "site").read_text()
        page = (tmp_path / "site" / "quick" / "00_a.html").read_text()
        assert ("kept 0.5 of 2 cores busy" in index) == ("kept 0.5 of 2 cores busy" in page) == named


def test_a_site_is_replaced_and_anything_else_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no notebook has been executed"):
        site.build(tmp_path / "runs", tmp_path / "site")
    put(tmp_path / "runs", DONE, executed())
    site.build(tmp_path / "runs", tmp_path / "site")
    (tmp_path / "site" / "stale.html").write_text("old")
    site.build(tmp_path / "runs", tmp_path / "site")
    assert not (tmp_path / "site" / "stale.html").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "site"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="no site of labkit"):
        site.build(tmp_path / "runs", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
