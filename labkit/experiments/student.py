"""A student against its teacher: how much of the accuracy is kept, how much faster it is (claim C41)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from labkit.bench.cli import shape_directory
from labkit.deployment import Deployment
from labkit.experiments.claims import Evidence, Outcome, Verdict, claim, not_testable
from labkit.experiments.contests import gain
from labkit.experiments.intervals import RESAMPLES, Estimate
from labkit.experiments.weights import ORIGINAL, original

ROOT = Path(__file__).resolve().parent.parent.parent
TEACHER, STUDENT = "teacher", "student"
KEPT = 0.9
BATCH = 32
"""The claim is judged at this batch size: a service under load, which is where speed is needed."""


def find_student(directory: str, root: Path = ROOT) -> Path | None:
    """The student's directory, given from the repository's root or absolute; None where there is no model."""
    path = root / directory
    return path if (path / "config.json").is_file() else None


def of_shapes(shapes: Sequence[str], device: str) -> dict[str, Deployment]:
    """Teacher and student of two shapes of data/shapes with random weights: for their speed alone.

    Raises UserError for a shape that is none.
    """
    return {
        name: original(shape_directory(shape), device, random_weights=True)
        for name, shape in zip((TEACHER, STUDENT), shapes, strict=True)
    }


def with_teacher(teacher: pd.DataFrame, student: pd.DataFrame) -> pd.DataFrame:
    """The student's answers and those of the model with its original weights, which is the teacher, in one table.
    Both are tables of ``weights.ask``."""
    taught_by = teacher[teacher["deployment"] == ORIGINAL].assign(deployment=TEACHER)
    return pd.concat([taught_by, student], ignore_index=True)


def accuracy_kept(answers: pd.DataFrame, student: str = STUDENT, teacher: str = TEACHER, seed: int = 0) -> Estimate:
    """The student's right answers / the teacher's, on the same problems.

    The interval is that of a paired bootstrap: problems are drawn again, each with both its answers. NaN where the
    teacher was never right.
    """
    right = answers.pivot(index=["bucket", "index"], columns="deployment", values="right")[[student, teacher]]
    both = right.dropna().to_numpy(dtype=float)
    if len(both) == 0 or not both[:, 1].any():
        return Estimate(np.nan, np.nan, np.nan, len(both), "share")
    rng = np.random.default_rng(seed)
    sums = np.array([both[rng.integers(0, len(both), len(both))].sum(axis=0) for _ in range(RESAMPLES)])
    sums = sums[sums[:, 1] > 0]
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return Estimate(float(both[:, 0].sum() / both[:, 1].sum()), float(low), float(high), len(both), "share")


def judge_student(
    kept: Estimate, speed: pd.DataFrame, large_speed: pd.DataFrame | None = None, batch: int = BATCH
) -> Verdict:
    """C41. confirmed: at least 90 % is kept, at 4 times the speed or more; partly: one of the two; refuted: neither;
    no verdict where an interval holds its limit.

    ``large_speed``, of models that answer nothing (see ``of_shapes``), is named besides and decides nothing.
    """
    least = claim("C41").value or 0.0
    faster = gain(speed, TEACHER, STUDENT, batch)
    held = {
        f"it keeps {100 * KEPT:g} % of the accuracy": _at_least(kept, KEPT),
        f"it is {least:g} times as fast at a batch of {batch}": _at_least(faster, least),
    }
    evidence = [Evidence.of("accuracy kept", kept), Evidence.of(f"times faster, batch of {batch}", faster)]
    evidence += [
        Evidence.of(f"times faster, batch of {x}", gain(speed, TEACHER, STUDENT, int(x)))
        for x in sorted(speed["x"].unique())
        if x != batch
    ]
    if large_speed is not None:
        beside = gain(large_speed, TEACHER, STUDENT, batch)
        evidence.append(Evidence.of(f"times faster with random weights of published sizes, batch of {batch}", beside))
    words = {True: "yes", False: "no", None: "the interval holds the limit"}
    said = "; ".join(f"{fact}: {words[each]}" for fact, each in held.items())
    outcome: Outcome = (
        "no verdict"
        if None in held.values()
        else "confirmed" if all(held.values()) else "partly" if any(held.values()) else "refuted"
    )  # fmt: skip
    return Verdict("C41", outcome, f"{said[:1].upper()}{said[1:]}.", tuple(evidence))


def no_student(directory: str) -> Verdict:
    """C41 where there is no student."""
    return not_testable(
        "C41",
        f"There is no student in {directory}",
        f"`labkit distill data/models/ledger-r1 --out {directory}`, which takes a GPU",
    )


def _at_least(found: Estimate, limit: float) -> bool | None:
    """None where the interval holds the limit, or there is none."""
    if found.low >= limit:
        return True
    return False if found.high < limit else None
