"""What a run needs to say about where it came from: code, versions, machine."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

import labkit
from labkit.probes.host import usable_cores

PACKAGES = ("torch", "transformers", "triton", "numpy", "pandas", "granian", "starlette")


def code_version() -> dict[str, Any]:
    """``commit`` of the checkout that labkit runs from (None outside one), and ``changes``: a digest of what is
    uncommitted."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "changes": None}
    changes = (_git("diff", "HEAD", "--", "labkit") or "") + (_git("status", "--porcelain", "--", "labkit") or "")
    return {"commit": commit, "changes": hashlib.sha256(changes.encode()).hexdigest()[:12] if changes else None}


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "labkit": labkit.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


@cache
def machine() -> dict[str, Any]:
    """CPU model, usable cores, RAM, operating system, and each GPU's name, memory and driver (empty without one)."""
    return {
        "cpu": _cpu_model(),
        "cores": len(usable_cores()),
        "ram_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "gpus": _gpus(),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    import pynvml

    try:
        pynvml.nvmlInit()
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [
            {
                "name": str(pynvml.nvmlDeviceGetName(h)),
                "memory_bytes": pynvml.nvmlDeviceGetMemoryInfo(h).total,
                "driver": driver,
            }
            for h in handles
        ]
    except pynvml.NVMLError:
        return []


def _git(*arguments: str) -> str | None:
    root = Path(labkit.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
