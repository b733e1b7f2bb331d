"""What quantize_with_gptqmodel refuses; tests/peers/test_gptq.py runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from labkit.bench.gptqmodel import quantize_with_gptqmodel
from labkit.errors import UserError


def test_without_its_environment_it_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run: make peer-gptqmodel"):
        quantize_with_gptqmodel(tmp_path, [[1, 2, 3]], tmp_path / "out", environment=tmp_path / "none")
    assert not (tmp_path / "out").exists()


def test_a_model_is_not_written_over_another(tmp_path: Path) -> None:
    (tmp_path / ".installed-1").touch()
    with pytest.raises(UserError, match="exists already"):
        quantize_with_gptqmodel(tmp_path, [[1, 2, 3]], tmp_path, environment=tmp_path)


def test_what_the_other_program_said_is_told_and_nothing_left(tmp_path: Path) -> None:
    """Here a Python that ends with an error, as gptqmodel does with a model that it cannot read."""
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    (environment / ".installed-1").touch()
    (environment / "bin" / "python").write_text("#!/bin/sh\necho no such model >&2\nexit 3\n")
    (environment / "bin" / "python").chmod(0o755)
    with pytest.raises(UserError, match="no such model"):
        quantize_with_gptqmodel(tmp_path, [[1, 2, 3]], tmp_path / "made" / "out", environment=environment)
    assert list((tmp_path / "made").iterdir()) == []
