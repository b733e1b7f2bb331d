"""Our quantizer beside gptqmodel, given the same model and text: how long each takes, and what its result loses."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from labkit.bench.engine import OURS
from labkit.bench.gptqmodel import quantize_with_gptqmodel
from labkit.bench.rows import Book, Row
from labkit.errors import UserError
from labkit.evaluation.evaluate import Wishes, evaluate
from labkit.models.loading import load_tokenizer, resolve_model
from labkit.quantizer.calibration import from_ledger, is_ledger
from labkit.quantizer.quantize import Options, quantize

BITS, GROUP = 4, 128
SEQUENCES = 12
"""Calibration sequences, four of every length: two CPU cores take a minute for the shipped model then."""
PROBLEMS = 50
BUCKET = "short"
PEER = "gptqmodel"


def measure_quantization(
    model: str,
    device: torch.device,
    book: Book,
    say: Callable[[str], None],
    with_peer: bool = True,
    problems: int | None = None,
    sequences: int = SEQUENCES,
) -> None:
    """Adds a row for our quantizer, one for gptqmodel (on the CPU always), one for the model as it is.

    Each was calibrated with the same ledger problems, and is asked the same others. Raises UserError for a model that
    is no ledger model.
    """
    tokenizer = load_tokenizer(model)
    if not is_ledger(tokenizer):
        raise UserError(f"quantization compares what ledger models answer, and {model} is none")
    workload = f"quantization: {BITS} bits, groups of {GROUP}"
    wishes = Wishes(problems or PROBLEMS, (BUCKET,), reference=model)
    with tempfile.TemporaryDirectory(prefix="labkit-quantization-") as folder:
        say(f"{workload}, {OURS}")
        out = Path(folder) / "ours"
        # float32 here and there, so that they differ in the method alone
        asked = Options(model, out, BITS, GROUP, sequences=sequences, device=str(device))
        seconds = quantize(asked, lambda line: None).seconds
        account = _evaluated(out, wishes, device)
        book.add(Row(workload, OURS, {"s": seconds, **_figures(account)}))
        if with_peer:
            given = [each.tolist() for each in from_ledger(tokenizer, sequences)]
            book.add(_peer_row(workload, model, given, Path(folder), wishes, device, say))
    right = account["reference"]["buckets"][BUCKET]["share"]
    book.add(Row(workload, "not quantised", {"right, %": 100 * right, "loss": _scores(account)["reference_loss"]}))


def _peer_row(
    workload: str,
    model: str,
    sequences: list[list[int]],
    folder: Path,
    wishes: Wishes,
    device: torch.device,
    say: Callable[[str], None],
) -> Row:
    say(f"{workload}, {PEER}")
    try:
        seconds = quantize_with_gptqmodel(resolve_model(model), sequences, folder / "theirs", BITS, GROUP)
    except UserError as error:
        return Row(workload, PEER, note=str(error).splitlines()[0])
    note = "" if device.type == "cpu" else "quantised on the CPU"
    return Row(workload, PEER, {"s": seconds, **_figures(_evaluated(folder / "theirs", wishes, device))}, note)


def _evaluated(model: Path, wishes: Wishes, device: torch.device) -> dict[str, Any]:
    return evaluate(str(model), wishes, str(device), torch.float32, say=lambda line: None)


def _figures(account: dict[str, Any]) -> dict[str, float]:
    scores = _scores(account)
    return {
        "right, %": 100 * account["buckets"][BUCKET]["share"],
        "loss": scores["loss"],
        "same first choice, %": 100 * scores["agreement"],
        "KL, nats": scores["divergence"],
    }


def _scores(account: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = account["completions"][BUCKET]
    return found
