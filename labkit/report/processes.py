"""Ending everything an execution started, whatever process group or session it moved to."""

from __future__ import annotations

import os
import time

import psutil

TOKEN_VARIABLE = "LABKIT_EXECUTION"
"""Every process of an execution inherits this variable, by which it is found again."""


def belonging(token: str, root: int | None = None) -> list[psutil.Process]:
    """The living processes that carry ``token`` in their environment or descend from process ``root``; not this one."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(TOKEN_VARIABLE) == token:
                found[process.pid] = process
        except (psutil.Error, OSError):
            continue
    if root is not None:
        try:
            head = psutil.Process(root)
            family = [*head.children(recursive=True)] + ([head] if root != os.getpid() else [])
            found.update({process.pid: process for process in family})
        except psutil.Error:
            pass
    return [process for process in found.values() if _lives(process)]


def end(token: str, root: int | None = None, patience_s: float = 5.0) -> list[str]:
    """Kills them all, those they start meanwhile included; returns the names of what was killed."""
    names: list[str] = []
    deadline = time.monotonic() + patience_s
    while found := belonging(token, root):
        for process in found:
            try:
                name = process.name()
                process.kill()
                names.append(name)
            except psutil.Error:
                continue
        psutil.wait_procs(found, timeout=0.2)
        if time.monotonic() > deadline:
            break
    return names


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
