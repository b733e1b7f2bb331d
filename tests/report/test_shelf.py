from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from labkit.errors import UserError
from labkit.report.shelf import Execution, Shelf

GOOD = Execution("a", "quick", "succeeded", "2026-01-02T03:04:05+00:00", 12.0, 60.0, cell_s=(1.0, 2.0), claims=("C01",))


def test_a_whole_execution_comes_back(tmp_path: Path) -> None:
    shelf = Shelf.of(tmp_path, "quick")
    shelf.begin("a", GOOD.started)
    shelf.finish(GOOD, "{}", b"[]")
    assert shelf.names() == ["a"] and shelf.execution("a") == GOOD and shelf.verdicts("a") == []


@pytest.mark.parametrize("stage", range(3))
def test_a_death_between_the_files_never_shows_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    shelf = Shelf.of(tmp_path, "quick")
    shelf.begin("a", GOOD.started)
    shelf.finish(GOOD, "old", b"[]")
    shelf.begin("a", "later")
    from labkit.report import shelf as module

    written = []

    def dies(path: Path, data: bytes | str) -> None:
        if len(written) == stage:
            raise KeyboardInterrupt
        written.append(path)
        path.write_bytes(data.encode() if isinstance(data, str) else data)

    monkeypatch.setattr(module, "write_atomic", dies)
    with pytest.raises(KeyboardInterrupt):
        shelf.finish(replace(GOOD, started="later"), "new", b"[]")
    assert shelf.execution("a") is None and shelf.names() == [] and shelf.cut_off() == {"a": "later"}


def test_an_older_execution_stays_while_a_newer_one_is_cut_off(tmp_path: Path) -> None:
    shelf = Shelf.of(tmp_path, "quick")
    shelf.begin("a", GOOD.started)
    shelf.finish(GOOD, "{}", None)
    shelf.begin("a", "later")
    assert shelf.execution("a") == GOOD and shelf.cut_off() == {"a": "later"}
    shelf.abandon("a")
    assert shelf.execution("a") == GOOD and shelf.cut_off() == {}


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    shelf = Shelf.of(tmp_path, "quick")
    with shelf.lock():
        assert shelf.busy()
        with pytest.raises(UserError, match="another `labkit run`"), shelf.lock():
            pass
    assert not shelf.busy()


def test_a_broken_status_is_named(tmp_path: Path) -> None:
    shelf = Shelf.of(tmp_path, "quick")
    shelf.begin("a", GOOD.started)
    shelf.finish(GOOD, "{}", None)
    (shelf.folder / "a.status.json").write_text('{"notebook": "a"}')
    with pytest.raises(UserError, match="execute a again"):
        shelf.execution("a")
