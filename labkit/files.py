"""Files that are either whole or not there: write beside, fsync, rename."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing_atomic(path: Path | str) -> Iterator[Path]:
    """Yields a path beside ``path`` to write to; on success it is flushed to disk and takes ``path``'s place at once.

    On an exception the beginnings are removed and ``path`` stays as it was. Raises OSError (disk full, no permission).
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield beside
        with open(beside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    _sync_directory(target.parent)


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Writes ``data`` (str as UTF-8) to ``path``, whole or not at all."""
    with writing_atomic(path) as beside:
        beside.write_bytes(data.encode() if isinstance(data, str) else data)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
