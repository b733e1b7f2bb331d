"""What a notebook was executed on, as the status of its execution and its first cell state it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from labkit.experiments import provenance

NOTEBOOK_PACKAGES = ("plotly", "papermill", "ipykernel")


def environment() -> dict[str, Any]:
    """``machine``, ``versions`` and ``code``, as in the manifest of a run, and the packages of notebooks besides."""
    versions = {name: number for name, number in provenance.versions().items() if number is not None}
    for package in NOTEBOOK_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"machine": provenance.machine(), "versions": versions, "code": provenance.code_version()}


def machine_line(machine: Mapping[str, Any]) -> str:
    """One line for a caption or the head of a table, from ``environment()["machine"]`` or a run's manifest."""
    gpus = machine.get("gpus") or []
    device = ", ".join(str(gpu["name"]) for gpu in gpus) if gpus else "no GPU"
    memory = float(machine.get("ram_bytes") or 0) / 2**30
    return f"{machine.get('cores', '?')} cores of {machine.get('cpu', '?')}, {memory:.0f} GiB, {device}"


def machine_caption() -> str:
    """The machine that this process runs on."""
    return machine_line(provenance.machine())


def code_line(code: Mapping[str, Any]) -> str:
    """The commit and whether the checkout differed from it."""
    commit = code.get("commit")
    if not commit:
        return "not a git checkout"
    return str(commit)[:12] + (" with uncommitted changes" if code.get("changes") else "")
