"""gptqmodel as the peer of our quantizer, on a CPU.

It pins versions of its own, so it runs in an environment of its own, which ``make peer-gptqmodel`` installs. There this
module is the program, and imports nothing that it does not bring.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from labkit.errors import UserError

_ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = _ROOT / ".venv-peers" / "gptqmodel"


def quantize_with_gptqmodel(
    model: Path,
    sequences: Iterable[Sequence[int]],
    out: Path,
    bits: int = 4,
    group_size: int = 128,
    environment: Path | None = None,
) -> float:
    """Has gptqmodel quantise ``model`` as it does by default, calibrated with ``sequences`` of tokens.

    Leaves a checkpoint in GPTQ format v1 at ``out``, whole or not at all; returns the seconds that gptqmodel took,
    without those until it was loaded. Raises UserError where it is not installed, fails, or ``out`` exists.
    """
    environment = environment or ENVIRONMENT
    python = environment / "bin" / "python"
    if not any(environment.glob(".installed-*")):
        raise UserError(f"gptqmodel is not installed in {environment}; run: make peer-gptqmodel")
    if out.exists():
        raise UserError(f"{out} exists already; give another directory, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
        made = Path(beside).resolve() / "model"
        job = {
            "model": str(model.resolve()),
            "sequences": [[int(token) for token in sequence] for sequence in sequences],
            "out": str(made),
            "bits": bits,
            "group_size": group_size,
        }
        told = Path(beside) / "job.json"
        told.write_text(json.dumps(job))
        settings = {"PYTHONPATH": str(_ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [python, "-m", "labkit.bench.gptqmodel", told.resolve()],
            cwd=beside,
            env={"GPTQMODEL_CPU_WORKERS": str(min(4, os.cpu_count() or 1)), **os.environ, **settings},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise UserError(f"gptqmodel could not quantise {model}:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
        os.replace(made, out)
        return float(json.loads((Path(beside) / "done.json").read_text())["seconds"])


def main(told: Path) -> None:
    """In gptqmodel's environment: the job that is written at ``told``; says in done.json beside it what it took."""
    job = json.loads(told.read_text())
    gptqmodel: Any = importlib.import_module("gptqmodel")
    torch: Any = importlib.import_module("torch")
    began = time.monotonic()
    # The packing of its own choice compiles a C++ extension first, which takes longer than it saves.
    how = {"pack_impl": "original", "offload_to_disk": False}
    config = gptqmodel.QuantizeConfig(bits=job["bits"], group_size=job["group_size"], **how)
    # It would pick bfloat16, in which the matrix products of most CPUs are several times slower.
    model = gptqmodel.GPTQModel.load(job["model"], config, device="cpu", dtype=torch.float32)
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["sequences"]], batch_size=1)
    model.save(job["out"])
    (told.parent / "done.json").write_text(json.dumps({"seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
