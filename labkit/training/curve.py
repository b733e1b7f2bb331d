"""The record of a training in the run store: a manifest, a curve that grows line by line, at last a parquet of it."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import IO

import pandas
import torch

from labkit.files import write_atomic, writing_atomic


class CurveRun:
    """``<root>/train-<time>/``: manifest.json says "unfinished" until the training has ended."""

    def __init__(self, root: Path, options: dict[str, object], machine: dict[str, object]) -> None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        path, number = root / f"train-{stamp}", 1
        while path.exists():
            path, number = root / f"train-{stamp}-{number}", number + 1
        path.mkdir(parents=True)
        self.path = path
        self.manifest: dict[str, object] = {
            "kind": "training",
            "state": "unfinished",
            "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "options": options,
            "machine": machine,
        }
        self._write_manifest()
        self._lines: IO[str] = open(path / "curve.jsonl", "a", encoding="utf-8")

    def add(self, row: dict[str, object]) -> None:
        """Appends one line and hands it to the operating system, so that a kill loses none."""
        self._lines.write(json.dumps(row) + "\n")
        self._lines.flush()

    def finish(self, **facts: object) -> None:
        """Writes curve.parquet and the final manifest."""
        self._lines.close()
        rows = read_curve(self.path)
        with writing_atomic(self.path / "curve.parquet") as beside:
            pandas.json_normalize(rows).to_parquet(beside)
        self.manifest |= {"state": "finished", **facts}
        self._write_manifest()

    def _write_manifest(self) -> None:
        write_atomic(self.path / "manifest.json", json.dumps(self.manifest, indent=2) + "\n")


def read_curve(path: Path) -> list[dict[str, object]]:
    """The lines of a run's curve, none if there is none; a last line cut short by a kill is left out."""
    rows: list[dict[str, object]] = []
    if not (path / "curve.jsonl").is_file():
        return rows
    for line in (path / "curve.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def describe_machine(device: str) -> dict[str, object]:
    """Processor, accelerator and versions that bear on speed."""
    facts: dict[str, object] = {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "device": device,
    }
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts
