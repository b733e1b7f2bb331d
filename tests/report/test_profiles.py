from __future__ import annotations

from pathlib import Path

import pytest

from labkit.errors import UserError
from labkit.report.profiles import load_profile


@pytest.mark.parametrize("name", ["quick", "cpu", "h200"])
def test_every_profile_states_sizes_and_limits(name: str) -> None:
    profile = load_profile(name)
    for notebook in profile.notebooks:
        assert profile.limit_s(notebook) > 0 and profile.sizes(notebook)
    assert profile.limit_s("99_unknown") == profile.timeout_s


def test_the_environment_names_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LABKIT_PROFILE", raising=False)
    assert load_profile().name == "quick"
    monkeypatch.setenv("LABKIT_PROFILE", "cpu")
    assert load_profile().name == "cpu" and load_profile("h200").name == "h200"


def test_what_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no profile 'huge'; choose one of quick, cpu, h200"):
        load_profile("huge")
    with pytest.raises(UserError, match="no sizes for 99_x"):
        load_profile("quick").sizes("99_x")
    (tmp_path / "p.json").write_text("{")
    with pytest.raises(UserError, match="p.json cannot be read"):
        load_profile("quick", tmp_path / "p.json")
    (tmp_path / "p.json").write_text('{"quick": {}}')
    with pytest.raises(UserError, match="profile quick in p.json is broken"):
        load_profile("quick", tmp_path / "p.json")
