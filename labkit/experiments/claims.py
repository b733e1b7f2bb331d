"""The article's claims, and the rules that turn measurements into verdicts. No verdict is typed by hand."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from labkit.experiments.intervals import Estimate, digits
from labkit.files import write_atomic

Outcome = Literal["confirmed", "partly", "refuted", "not testable here", "no verdict"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

CLAIMS_FILE = Path(__file__).resolve().parent.parent.parent / "data" / "claims.json"
VERDICTS_VARIABLE = "LABKIT_VERDICTS"
"""Names the file that verdicts are recorded in while `labkit run` executes a notebook."""
NO_GAIN = 1.05
"""A ratio that is surely below this is no gain that anybody would notice."""
TIMEOUT_S = 5.0
USERS = 300


@dataclass(frozen=True)
class Claim:
    """A row of the article: ``before`` and ``after`` where it states both, ``value`` where it states one number."""

    id: str
    section: str
    text: str
    before: float | None = None
    after: float | None = None
    value: float | None = None
    unit: str | None = None
    better: Literal["lower", "higher"] | None = None
    stated: float | None = None
    """The improvement in percent that the article prints beside before and after."""

    @property
    def gain(self) -> float | None:
        """How many times better the article says it got (above 1 is better); None where it states no ratio."""
        if self.before is not None and self.after is not None:
            return self.before / self.after if self.better == "lower" else self.after / self.before
        return self.value if self.unit == "×" else None


@dataclass(frozen=True)
class Evidence:
    """One number a verdict rests on, with its interval."""

    label: str
    value: float
    low: float
    high: float
    n: int
    unit: str
    confidence: float = 0.95

    @classmethod
    def of(cls, label: str, estimate: Estimate) -> Evidence:
        """A share (0 to 1) becomes per cent, the rest stays as it is."""
        unit, scale = ("%", 100.0) if estimate.unit == "share" else (estimate.unit, 1.0)
        return cls(
            label,
            estimate.value * scale,
            estimate.low * scale,
            estimate.high * scale,
            estimate.n,
            unit,
            estimate.confidence,
        )

    def __str__(self) -> str:
        level = f"{self.confidence * 100:.0f} %"
        return f"{digits(self.value)}{_unit(self.unit)} ({level} interval {digits(self.low)} to {digits(self.high)})"


@dataclass(frozen=True)
class Verdict:
    """What became of a claim. ``no verdict``: the run was invalid or the evidence too thin to tell."""

    claim: str
    outcome: Outcome
    reason: str
    evidence: tuple[Evidence, ...] = ()

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise ValueError(f"outcome must be one of {', '.join(OUTCOMES)}; got {self.outcome!r}")


def load_claims(path: Path = CLAIMS_FILE) -> dict[str, Claim]:
    """All claims by id, in order. Raises ValueError for an id that comes twice."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    claims = {row["id"]: Claim(**row) for row in rows}
    if len(claims) != len(rows):
        raise ValueError(f"{path} names a claim twice")
    return claims


def claim(claim_id: str) -> Claim:
    """Raises ValueError for an id that does not exist."""
    claims = load_claims()
    if claim_id not in claims:
        raise ValueError(f"no claim {claim_id!r}; they run from {next(iter(claims))} to {next(reversed(claims))}")
    return claims[claim_id]


def judge_ratio(
    claim_id: str, measured: Estimate, claimed: float | None = None, invalid: str | None = None, label: str = "gain"
) -> Verdict:
    """A measured gain (times better, above 1 is better) against the claimed one.

    ``claimed`` None takes the article's own; where it states none, any gain will do. With the interval [low, high]:
    confirmed  low > 1 and high >= claimed;       partly  low > 1 and high < claimed;
    refuted    high <= 1.05 and low <= 1;         no verdict  otherwise.
    ``invalid`` says why the run does not count, and then there is no verdict.
    """
    size = claimed if claimed is not None else claim(claim_id).gain
    evidence = (Evidence.of(label, measured),)
    thin = invalid or _thin(measured)
    if thin:
        return Verdict(claim_id, "no verdict", thin, evidence)
    found = str(evidence[0])
    if measured.low > 1:
        if size is None:
            return Verdict(claim_id, "confirmed", f"A gain of {found}; the article gives no size.", evidence)
        if measured.high >= size:
            return Verdict(claim_id, "confirmed", f"A gain of {found}, against {size:g}× claimed.", evidence)
        return Verdict(claim_id, "partly", f"A gain of {found}, short of the {size:g}× claimed.", evidence)
    if measured.high <= NO_GAIN:
        against = f", against {size:g}× claimed" if size is not None else ""
        return Verdict(claim_id, "refuted", f"No gain: {found}{against}.", evidence)
    return Verdict(claim_id, "no verdict", f"The interval of {found} holds both a gain and none.", evidence)


def ratio_of(numerator: Estimate, denominator: Estimate) -> Estimate:
    """numerator / denominator with the widest interval that their intervals permit (both at least 0)."""
    # A side that too few requests leave open comes as -inf; what is measured here is never negative.
    return Estimate(
        _divide(numerator.value, denominator.value),
        _divide(max(0.0, numerator.low), denominator.high),
        _divide(numerator.high, max(0.0, denominator.low)),
        min(numerator.n, denominator.n),
        "×",
    )


def judge_limit(
    claim_id: str,
    measured: Estimate,
    limit: float | None = None,
    side: Literal["below", "above"] = "below",
    invalid: str | None = None,
    label: str = "measured",
) -> Verdict:
    """Whether a number stays below (or above) a limit, by default the value that the article states.

    confirmed: the whole interval is on the claimed side; refuted: none of it is; no verdict: it holds the limit.
    """
    bound = limit if limit is not None else claim(claim_id).value
    if bound is None:
        raise ValueError(f"{claim_id} states no value; pass a limit")
    shown = _in_unit_of(claim(claim_id), Evidence.of(label, measured))
    thin = invalid or _thin(measured)
    if thin:
        return Verdict(claim_id, "no verdict", thin, (shown,))
    found = f"{shown}, against a limit of {bound:g}{_unit(shown.unit)}"
    if shown.low <= bound <= shown.high:
        return Verdict(claim_id, "no verdict", f"{found}: the interval holds the limit.", (shown,))
    holds = shown.high < bound if side == "below" else shown.low > bound
    return Verdict(claim_id, "confirmed" if holds else "refuted", f"{found}.", (shown,))


def judge_level(
    claim_id: str,
    measured: Estimate,
    claimed: float | None = None,
    tolerance: float = 0.1,
    invalid: str | None = None,
    label: str = "measured",
) -> Verdict:
    """Whether a number is what the article says it is: confirmed when the interval meets claimed ± tolerance."""
    level = claimed if claimed is not None else claim(claim_id).value
    if level is None:
        raise ValueError(f"{claim_id} states no value; pass the claimed one")
    shown = _in_unit_of(claim(claim_id), Evidence.of(label, measured))
    thin = invalid or _thin(measured)
    if thin:
        return Verdict(claim_id, "no verdict", thin, (shown,))
    meets = shown.low <= level * (1 + tolerance) and shown.high >= level * (1 - tolerance)
    reason = f"{shown}, against {level:g}{_unit(shown.unit)} claimed (± {100 * tolerance:g} % counts as met)."
    return Verdict(claim_id, "confirmed" if meets else "refuted", reason, (shown,))


def judge_facts(
    claim_id: str, facts: Mapping[str, bool | None], evidence: Iterable[Evidence] = (), invalid: str | None = None
) -> Verdict:
    """A claim made of statements, each computed to hold, not to hold, or (None) not to be observable here.

    confirmed: all hold; refuted: none of those observed holds; partly: anything between, or all hold that could be
    observed; not testable here: nothing could be observed.
    """
    if not facts:
        raise ValueError("a verdict needs at least one fact")
    said = [
        f"{name}: {'not observable here' if held is None else 'yes' if held else 'no'}" for name, held in facts.items()
    ]
    reason = _sentence("; ".join(said))
    observed = [held for held in facts.values() if held is not None]
    if invalid:
        return Verdict(claim_id, "no verdict", invalid, tuple(evidence))
    if not observed:
        outcome: Outcome = "not testable here"
    elif all(observed):
        outcome = "confirmed" if len(observed) == len(facts) else "partly"
    else:
        outcome = "partly" if any(observed) else "refuted"
    return Verdict(claim_id, outcome, reason, tuple(evidence))


def not_testable(claim_id: str, lacks: str, needs: str) -> Verdict:
    """``lacks``: what is missing here (such as the description of an absent probe); ``needs``: what it would take."""
    claim(claim_id)
    return Verdict(claim_id, "not testable here", f"{lacks.rstrip('.')}. It would take {needs.rstrip('.')}.")


def judge_table(users: int = USERS, timeout_s: float = TIMEOUT_S) -> Verdict:
    """C39 from the article's own numbers, by Little's law: users in flight = throughput x mean latency.

    A P95 bounds the mean: 95 % of the requests take at most the P95, the others at most the client's timeout. The
    table is consistent when Little's mean stays under that bound in both columns and the printed percentages follow.
    """
    claims = load_claims()
    p95, throughput, errors = claims["C34"], claims["C35"], claims["C36"]
    evidence, lines, consistent = [], [], True
    for column in ("before", "after"):
        rate = cast(float, getattr(throughput, column))
        p95_s = cast(float, getattr(p95, column)) / 1e3
        mean_s, most_s = users / rate, 0.95 * p95_s + 0.05 * timeout_s
        consistent &= mean_s <= most_s
        word = "is possible" if mean_s <= most_s else "is impossible"
        lines.append(
            f"{column}: {users} in flight at {rate:g} req/s is a mean of {mean_s:.2f} s, where a P95 of {p95_s:.2f} s "
            f"and a {timeout_s:g} s timeout permit at most {most_s:.2f} s, so it {word}"
        )
        evidence.append(Evidence(f"{column}: mean latency by Little's law", mean_s, mean_s, mean_s, 1, "s"))
        evidence.append(Evidence(f"{column}: greatest mean the P95 permits", most_s, most_s, most_s, 1, "s"))
    agreeing = [_improvement_agrees(claims[name]) for name in ("C34", "C35", "C36", "C37", "C38")]
    lines.append(f"{sum(agreeing)} of {len(agreeing)} printed improvements follow from their rows")
    served = cast(float, throughput.before) / (1 - cast(float, errors.before) / 100)
    lines.append(
        f"were failures left out of the {throughput.before:g} req/s, that mean would be {users / served:.2f} s, "
        f"the P95 of {cast(float, p95.before) / 1e3:.2f} s all but reached by the average request"
    )
    outcome: Outcome = "confirmed" if consistent and all(agreeing) else "refuted" if not consistent else "partly"
    return Verdict("C39", outcome, _sentence("; ".join(lines)), tuple(evidence))


def record(verdict: Verdict, path: Path | str | None = None) -> Path | None:
    """Adds the verdict to a file of verdicts (replacing an older one of its claim), whole or not at all.

    ``path`` None takes the file that `labkit run` names in the environment; outside of it nothing is written.
    """
    named = path if path is not None else os.environ.get(VERDICTS_VARIABLE)
    if not named:
        return None
    target = Path(named)
    kept = {known.claim: known for known in read_verdicts(target)} | {verdict.claim: verdict}
    rows = [asdict(kept[name]) for name in sorted(kept)]
    write_atomic(target, json.dumps(_finite(rows), indent=1, ensure_ascii=False) + "\n")
    return target


def read_verdicts(path: Path | str) -> list[Verdict]:
    """The verdicts of a file, [] when there is none. Raises ValueError for a file that holds something else."""
    target = Path(path)
    if not target.exists():
        return []
    try:
        rows = json.loads(target.read_text(encoding="utf-8"))
        return [
            Verdict(
                row["claim"],
                row["outcome"],
                row["reason"],
                tuple(Evidence(**_numbers(item)) for item in row["evidence"]),
            )
            for row in rows
        ]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{target.name} is no file of verdicts: {error}") from error


def _thin(measured: Estimate) -> str | None:
    """Why an estimate cannot carry a verdict, or None. An infinite upper end is fine: nothing failed afterwards."""
    if any(math.isnan(number) for number in (measured.value, measured.low, measured.high)) or measured.n < 1:
        return "Nothing was measured."
    if measured.low == measured.high and measured.n < 2:
        return "A single measurement has no interval."
    return None


def _improvement_agrees(row: Claim) -> bool:
    before, after, stated = cast(float, row.before), cast(float, row.after), cast(float, row.stated)
    # The article rounds 359 % to 360 %.
    return abs(abs(after - before) / before * 100 - stated) <= max(0.1, 0.005 * stated)


def _unit(unit: str) -> str:
    return unit if unit in ("", "×") else f" {unit}"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _divide(top: float, bottom: float) -> float:
    return top / bottom if bottom else math.nan if not top else math.inf


def _in_unit_of(stated: Claim, shown: Evidence) -> Evidence:
    """Seconds become milliseconds where the article counts in those. Raises ValueError for any other mismatch."""
    if stated.unit in (None, shown.unit):
        return shown
    if (stated.unit, shown.unit) == ("ms", "s"):
        return Evidence(
            shown.label, shown.value * 1e3, shown.low * 1e3, shown.high * 1e3, shown.n, "ms", shown.confidence
        )
    raise ValueError(f"{stated.id} counts in {stated.unit}, what was measured in {shown.unit or 'nothing'}")


def _finite(value: Any) -> Any:
    """JSON has no infinity; it is written as a string and read back by ``_numbers``."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _numbers(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: float(value) if key in ("value", "low", "high") else value for key, value in item.items()}
