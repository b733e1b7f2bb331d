"""A student against its teacher: how much of the accuracy is kept, how much faster it is (claim C41)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import pandas as pd

from labkit.bench.cli import shape_directory
from labkit.deployment import Deployment
from labkit.experiments.claims import Evidence, Outcome, Verdict, claim, not_testable
from labkit.experiments.contests import gain
from labkit.experiments.intervals import Estimate, share
from labkit.experiments.weights import ORIGINAL, original, pair

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


def accuracy_kept(answers: pd.DataFrame, student: str = STUDENT, teacher: str = TEACHER) -> Estimate:
    """The student's right answers / the teacher's, on the same problems, with the interval of ``ratio_of_pairs``. NaN
    where the teacher was never right. Raises ValueError if they were asked different problems."""
    found = pair(answers, student, teacher)
    return replace(ratio_of_pairs(found.both, found.model_only, found.reference_only), n=found.asked)


def ratio_of_pairs(both: int, one: int, other: int, confidence: float = 0.95) -> Estimate:
    """(both + one) / (both + other), of pairs in which both, or only the one, or only the other came true.

    The interval is that of Bonett and Price (2006), Wilson's for each of the two shares with z made smaller for what
    they have in common; unlike a bootstrap's it has a width also where no pair differs.
    """
    hits, base, n = both + one, both + other, both + one + other
    if not base:
        return Estimate(math.nan, math.nan, math.nan, n, "share", confidence)
    apart = math.sqrt((one + other + 2) / ((hits + 1) * (base + 1)))
    alone = sum(math.sqrt((1 - (k + 1) / (n + 2)) / (k + 1)) for k in (hits, base))
    normal = NormalDist()
    z = normal.inv_cdf(0.5 + confidence / 2) * apart / alone
    of_one, of_other = (share(k, n, 2 * normal.cdf(z) - 1) for k in (hits, base))
    return Estimate(hits / base, of_one.low / of_other.high, of_one.high / of_other.low, n, "share", confidence)


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
