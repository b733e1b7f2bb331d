"""Small notebooks made on the fly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

PARAMETERS = 'profile = "quick"\ninteractive = True\nnumber = 3'
Writer = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """Writes nb/NAME.ipynb: a heading with claims, a parameters cell, and the code cells given."""

    def write(
        name: str, *code: str, tag: bool = True, head: str = "Claims: C34, C35", cells: tuple[dict, ...] = ()
    ) -> Path:
        notebook = new_notebook(
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        )
        parameters = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"] if tag else []})
        notebook.cells = [new_markdown_cell(f"# {name}\n\n{head}"), parameters, *map(new_code_cell, code), *cells]
        path = tmp_path / "nb" / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        nbformat.write(notebook, path)
        return path

    return write
