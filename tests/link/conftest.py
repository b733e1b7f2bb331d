"""Links for the tests; skipped, with the reason, where this machine refuses network namespaces."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from labkit.link import Link


@pytest.fixture
def open_link():
    return _open_link


@pytest.fixture
def python_in():
    return _python_in


@contextmanager
def _open_link(**wanted: Any) -> Iterator[Link]:
    with Link(**wanted) as link:
        if link.mode == "delay only":
            pytest.skip("; ".join(link.notes))
        yield link


def _python_in(link: Link, host: str, code: str, *arguments: object, wait: bool = True) -> Any:
    """Runs ``code`` in a host: what it printed, or the process after its first line when it is not waited for."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = link.popen(host, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if not wait:
        process.stdout.readline()
        return process
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    return output
