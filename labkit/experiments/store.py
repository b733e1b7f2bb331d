"""Runs on disk. A run is whole or it is named as unfinished; nothing in between is ever read."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from labkit.errors import UserError
from labkit.experiments.metrics import Window, requests_table
from labkit.files import write_atomic, writing_atomic

SCHEMA = 1
UNFINISHED = ".unfinished-"
RUNS_VARIABLE = "LABKIT_RUNS"
RUNS = Path(__file__).resolve().parent.parent.parent / "runs"
FILES = ("manifest.json", "events.parquet", "samples.parquet")
EVENT_COLUMNS = {"request", "kind", "t_s", "tokens", "prompt_tokens", "bucket", "family", "detail", "correct"}
SAMPLE_COLUMNS = {"t_s", "probe", "name", "value"}


@dataclass(frozen=True)
class Run:
    """One deployment under one workload, once: ``manifest.json``, ``events.parquet``, ``samples.parquet``."""

    path: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def window(self) -> Window:
        begin, end = self.manifest["window"]
        return float(begin), float(end)

    @property
    def valid(self) -> bool:
        """False when something (``manifest["reasons"]``) forbids a verdict from this run."""
        return bool(self.manifest.get("valid", True))

    @cached_property
    def events(self) -> pd.DataFrame:
        return _read_table(self.path / "events.parquet")

    @cached_property
    def samples(self) -> pd.DataFrame:
        return _read_table(self.path / "samples.parquet")

    @cached_property
    def requests(self) -> pd.DataFrame:
        """``metrics.requests_table`` of the events."""
        return requests_table(self.events)


@dataclass(frozen=True)
class Unfinished:
    """What is left of a run that was killed. Nothing of it is ever read as a result."""

    path: Path
    ended: int
    """Requests that had ended and were written down before the end."""

    def __str__(self) -> str:
        return (
            f"{self.path} was cut off after {self.ended} ended requests and is not used (to remove: rm -r {self.path})"
        )


def default_store() -> RunStore:
    """The store of this checkout, whatever directory one works in; LABKIT_RUNS names another."""
    return RunStore(os.environ.get(RUNS_VARIABLE) or RUNS)


class RunStore:
    """The directory of runs."""

    def __init__(self, root: Path | str = "runs") -> None:
        self.root = Path(root)

    @contextmanager
    def create(self, name: str) -> Iterator[Draft]:
        """A run to be: yields a draft whose directory is named unfinished until ``draft.finish`` made it whole.

        On an exception (Ctrl-C included) the directory is removed again. Raises UserError where it cannot be made.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name) or UNFINISHED in name:
            raise UserError(f"a run's name is letters, digits, dots, dashes and underscores (at most 80); got {name!r}")
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        full = f"{name}-{stamp}-{secrets.token_hex(2)}"
        path = self.root / f"{full}{UNFINISHED}{os.getpid()}"
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"no run can be kept under {self.root}: {error.strerror or error}") from error
        draft = Draft(path, self.root / full)
        try:
            yield draft
            if not draft.finished:
                raise RuntimeError("the draft was never finished")
        finally:
            if not draft.finished:
                shutil.rmtree(path, ignore_errors=True)

    def open(self, name: str | Path) -> Run:
        """A whole run by name or path. Raises UserError saying what is wrong with it otherwise."""
        path = Path(name) if Path(name).is_absolute() or Path(name).parent != Path(".") else self.root / name
        if UNFINISHED in path.name:
            raise UserError(f"{path} is the rest of an unfinished run; nothing of it is used")
        if not path.is_dir():
            raise UserError(f"there is no run {path}")
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            schema = manifest["schema"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a whole run: its manifest.json is missing or broken") from error
        if schema != SCHEMA:
            raise UserError(f"{path} was written with schema {schema}; this version reads {SCHEMA}")
        for file, columns in (("events.parquet", EVENT_COLUMNS), ("samples.parquet", SAMPLE_COLUMNS)):
            missing = columns - set(_column_names(path / file))
            if missing:
                raise UserError(f"{path}/{file} lacks the columns {', '.join(sorted(missing))}")
        return Run(path, manifest)

    def list(self) -> Sequence[Run]:
        """All whole runs, oldest first; ``unfinished`` and ``broken`` name the rest."""
        return [run for run in map(self._try, self._directories()) if isinstance(run, Run)]

    def broken(self) -> Sequence[str]:
        """Why each directory that is neither a whole run nor a named unfinished one is passed over."""
        return [str(run) for run in map(self._try, self._directories()) if not isinstance(run, Run)]

    def unfinished(self) -> Sequence[Unfinished]:
        """What was cut off (killed, power lost) earlier; runs of processes that still live are left out."""
        found = []
        for path in sorted(self.root.glob(f"*{UNFINISHED}*")):
            pid = path.name.rpartition("-")[2]
            if pid.isdigit() and _alive(int(pid)):
                continue
            ended = sum(spool.read_bytes().count(b"\n") for spool in path.glob("spool-*.jsonl"))
            found.append(Unfinished(path, ended))
        return found

    def _directories(self) -> Sequence[Path]:
        if not self.root.is_dir():
            return []
        paths = [path for path in self.root.iterdir() if path.is_dir() and UNFINISHED not in path.name]
        return sorted(
            paths, key=lambda path: (path / "manifest.json").stat().st_mtime if (path / "manifest.json").exists() else 0
        )

    def _try(self, path: Path) -> Run | UserError:
        try:
            return self.open(path.absolute())
        except UserError as error:
            return error


@dataclass
class Draft:
    """A run being made. ``path`` is its directory for now (spools and logs may go there)."""

    path: Path
    target: Path
    finished: bool = False

    def finish(self, manifest: dict[str, Any], events: pd.DataFrame, samples: pd.DataFrame | None = None) -> Run:
        """Writes the files, then gives the directory its final name. Raises UserError when the disk is full."""
        if samples is None:
            samples = pd.DataFrame({"t_s": [], "probe": [], "name": [], "value": []})
        samples = samples.astype({"t_s": "float64", "probe": "str", "name": "str", "value": "float64"})
        manifest = {"schema": SCHEMA, "name": self.target.name, **manifest}
        try:
            for name, table in (("events.parquet", events), ("samples.parquet", samples)):
                with writing_atomic(self.path / name) as beside:
                    table.to_parquet(beside, index=False, compression="zstd")
            write_atomic(self.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")
            for spool in self.path.glob("spool-*.jsonl"):
                spool.unlink()
            os.replace(self.path, self.target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"the disk is full: the run could not be written under {self.target.parent}; nothing was kept"
                ) from error
            raise UserError(f"the run could not be written to {self.target}: {error.strerror or error}") from error
        self.finished = True
        return Run(self.target, manifest)


def _read_table(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _column_names(path: Path) -> list[str]:
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_schema(path).names)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or broken: {error}") from error


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
