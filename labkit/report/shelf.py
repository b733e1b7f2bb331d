"""Where executions are kept: runs/notebooks/PROFILE/NAME.ipynb, .verdicts.json and .status.json, all or none of them.

An execution under way has a marker (.NAME.running.json) until its files are whole. A marker without a process behind it
is an execution that was cut off; its remains are named and never read as a result.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from labkit.errors import UserError
from labkit.experiments.claims import Verdict, read_verdicts
from labkit.files import write_atomic
from labkit.probes.others import disturbance

Status = Literal["succeeded", "failed", "timed out", "died"]


@dataclass(frozen=True)
class Execution:
    """How one notebook was executed, once. ``reason`` and ``failed_cell`` (a cell id) are None when it succeeded."""

    notebook: str
    profile: str
    status: Status
    started: str
    """UTC, ISO 8601."""
    duration_s: float
    timeout_s: float
    reason: str | None = None
    failed_cell: str | None = None
    cell_s: tuple[float, ...] = ()
    """Seconds of each code cell that ended, in order."""
    parameters: dict[str, Any] = field(default_factory=dict)
    claims: tuple[str, ...] = ()
    """Ids of the claims that the notebook says it puts to the test."""
    left_behind: tuple[str, ...] = ()
    """Names of the processes that were still running when the notebook was through, and were ended."""
    environment: dict[str, Any] = field(default_factory=dict)
    """``labkit.report.environment.environment()``."""
    other_cores: float = 0.0
    """How many cores other programs kept busy meanwhile, on average."""

    @property
    def disturbance(self) -> str | None:
        """What to say of other programs where they took much; None where they did not, and where it is not known:
        processes that had to be ended were not waited for, so that their time counts as that of others."""
        if self.status != "succeeded" or self.left_behind:
            return None
        return disturbance(self.other_cores, self.environment.get("machine", {}).get("cores") or 1)


@dataclass(frozen=True)
class Shelf:
    """The executions of one profile."""

    folder: Path

    @classmethod
    def of(cls, root: Path, profile: str) -> Shelf:
        return cls(root / "notebooks" / profile)

    @property
    def root(self) -> Path:
        """Where runs are kept."""
        return self.folder.parent.parent

    def notebook(self, name: str) -> Path:
        return self.folder / f"{name}.ipynb"

    def partial(self, name: str) -> Path:
        return self.folder / f".{name}.partial.ipynb"

    def partial_verdicts(self, name: str) -> Path:
        return self.folder / f".{name}.partial.verdicts.json"

    def _marker(self, name: str) -> Path:
        return self.folder / f".{name}.running.json"

    def _status(self, name: str) -> Path:
        return self.folder / f"{name}.status.json"

    def _verdicts(self, name: str) -> Path:
        return self.folder / f"{name}.verdicts.json"

    def names(self) -> list[str]:
        """Notebooks with a whole execution, in order."""
        return sorted(path.name.removesuffix(".status.json") for path in self.folder.glob("*.status.json"))

    def execution(self, name: str) -> Execution | None:
        """None when there is no whole execution. Raises UserError for a status that is broken."""
        path = self._status(name)
        if not path.exists() or not self.notebook(name).exists():
            return None
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
            tuples = {key: tuple(row[key]) for key in ("cell_s", "claims", "left_behind")}
            return Execution(**{**row, **tuples})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is broken ({error}); execute {name} again with `labkit run`") from error

    def verdicts(self, name: str) -> list[Verdict]:
        return read_verdicts(self._verdicts(name))

    def cut_off(self) -> dict[str, str]:
        """Executions that were cut off: name -> when they had started. Only right while nobody fills this shelf."""
        found = {}
        for path in sorted(self.folder.glob(".*.running.json")):
            try:
                started = str(json.loads(path.read_text(encoding="utf-8"))["started"])
            except (OSError, ValueError, KeyError, TypeError):
                started = "an unknown time"
            found[path.name.removesuffix(".running.json")[1:]] = started
        return found

    def begin(self, name: str, started: str) -> None:
        """Removes the remains of an execution that was cut off and marks the new one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.abandon(name)
        write_atomic(self._marker(name), json.dumps({"started": started, "pid": os.getpid()}))

    def abandon(self, name: str) -> None:
        """Forgets an execution that did not come to its end; an older whole one stays."""
        for path in (self.partial(name), self.partial_verdicts(name), self._marker(name)):
            path.unlink(missing_ok=True)

    def finish(self, execution: Execution, notebook: str, verdicts: bytes | None) -> None:
        """Puts the files in place: the old status goes first and the new one comes last, so that they never mix."""
        name = execution.notebook
        self._status(name).unlink(missing_ok=True)
        write_atomic(self.notebook(name), notebook)
        if verdicts is None:
            self._verdicts(name).unlink(missing_ok=True)
        else:
            write_atomic(self._verdicts(name), verdicts)
        write_atomic(self._status(name), json.dumps(asdict(execution), indent=1) + "\n")
        self.abandon(name)

    def busy(self) -> bool:
        """Whether some process is filling this shelf now."""
        try:
            with self.lock():
                return False
        except UserError:
            return True

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held while filling the shelf; freed by the system when the holder dies. Raises UserError when it is taken."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "a") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another `labkit run` is filling {self.folder}; wait for it to end, or choose another --out"
                ) from None
            yield
