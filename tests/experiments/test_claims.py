from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from labkit.experiments import claims
from labkit.experiments.claims import Evidence, Verdict
from labkit.experiments.intervals import Estimate


def gain(low: float, high: float, n: int = 100) -> Estimate:
    return Estimate((low + high) / 2, low, high, n, "×")


def test_every_claim_is_there_once_and_in_order() -> None:
    known = claims.load_claims()
    assert list(known) == [f"C{number:02d}" for number in range(1, 44)]
    assert all(claim.text.endswith(".") and claim.section[0] in "12345" for claim in known.values())


@pytest.mark.parametrize(
    ("name", "times"),
    [("C34", 2173 / 742), ("C35", 583 / 127), ("C36", 8.3 / 0.2), ("C37", 92 / 78), ("C38", 512 / 187), ("C28", 3.2)],
)
def test_the_gain_the_article_claims(name: str, times: float) -> None:
    assert claims.claim(name).gain == pytest.approx(times)


def test_a_claim_that_states_no_ratio_has_no_gain() -> None:
    assert claims.claim("C16").gain is None and claims.claim("C01").gain is None


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (3.0, 3.5, "confirmed"),  # holds the 3.2 claimed
        (4.0, 5.0, "confirmed"),  # exceeds it
        (1.2, 2.0, "partly"),  # the direction holds, smaller
        (0.5, 0.9, "refuted"),  # a loss
        (0.98, 1.04, "refuted"),  # surely no gain worth the name
        (0.8, 2.0, "no verdict"),  # cannot tell
        (0.8, 4.0, "no verdict"),
    ],
)
def test_a_ratio_is_judged_by_its_interval(low: float, high: float, outcome: str) -> None:
    verdict = claims.judge_ratio("C28", gain(low, high))
    assert verdict.outcome == outcome
    assert verdict.evidence == (Evidence("gain", (low + high) / 2, low, high, 100, "×"),)


def test_a_claim_without_a_size_needs_only_a_gain() -> None:
    assert claims.judge_ratio("C16", gain(1.01, 1.3)).outcome == "confirmed"
    assert claims.judge_ratio("C16", gain(0.9, 1.02)).outcome == "refuted"


@pytest.mark.parametrize("thin", [Estimate(math.nan, math.nan, math.nan, 0, "×"), Estimate(4.0, 4.0, 4.0, 1, "×")])
def test_thin_evidence_gives_no_verdict(thin: Estimate) -> None:
    assert claims.judge_ratio("C28", thin).outcome == "no verdict"


def test_an_invalid_run_gives_no_verdict_and_says_why() -> None:
    verdict = claims.judge_ratio("C28", gain(3, 4), invalid="The client was the bottleneck.")
    assert (verdict.outcome, verdict.reason) == ("no verdict", "The client was the bottleneck.")


def test_a_ratio_has_the_widest_interval_that_both_permit() -> None:
    ratio = claims.ratio_of(Estimate(10.0, 9.0, 11.0, 500, "s"), Estimate(2.0, 1.8, 2.2, 400, "s"))
    assert (ratio.value, ratio.low, ratio.high, ratio.n) == pytest.approx((5.0, 9 / 2.2, 11 / 1.8, 400))


def test_no_failures_afterwards_is_an_unbounded_gain() -> None:
    before, after = Estimate(0.1, 0.08, 0.12, 1000, "share"), Estimate(0.0, 0.0, 0.002, 1000, "share")
    ratio = claims.ratio_of(before, after)
    assert (ratio.low, ratio.high) == (pytest.approx(40.0), math.inf)
    assert claims.judge_ratio("C36", ratio).outcome == "confirmed"


def test_no_failures_before_and_after_is_no_verdict() -> None:
    none = Estimate(0.0, 0.0, 0.002, 1000, "share")
    assert claims.judge_ratio("C36", claims.ratio_of(none, none)).outcome == "no verdict"


@pytest.mark.parametrize(
    ("low", "high", "outcome"), [(0.5, 0.7, "confirmed"), (0.9, 1.2, "refuted"), (0.7, 0.9, "no verdict")]
)
def test_a_limit_in_the_articles_unit(low: float, high: float, outcome: str) -> None:
    verdict = claims.judge_limit("C01", Estimate((low + high) / 2, low, high, 100, "s"))
    assert verdict.outcome == outcome and "800" in verdict.reason and verdict.evidence[0].unit == "ms"


def test_a_limit_from_above() -> None:
    assert claims.judge_limit("C07", Estimate(9, 8, 10, 50, "tasks"), side="above").outcome == "confirmed"


def test_a_share_is_judged_in_per_cent() -> None:
    assert claims.judge_limit("C27", Estimate(0.01, 0.005, 0.015, 1000, "share")).outcome == "confirmed"
    assert claims.judge_limit("C27", Estimate(0.05, 0.04, 0.06, 1000, "share")).outcome == "refuted"


def test_a_unit_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="C01 counts in ms"):
        claims.judge_limit("C01", Estimate(1, 1, 2, 9, "req/s"))


@pytest.mark.parametrize(
    ("low", "high", "outcome"), [(3.5, 3.6, "confirmed"), (30.0, 31.0, "refuted"), (1.0, 3.4, "confirmed")]
)
def test_a_level_may_be_ten_per_cent_off(low: float, high: float, outcome: str) -> None:
    assert claims.judge_level("C13", gain(low, high)).outcome == outcome


@pytest.mark.parametrize(
    ("facts", "outcome"),
    [
        ((True, True), "confirmed"),
        ((True, False), "partly"),
        ((False, False), "refuted"),
        ((True, None), "partly"),
        ((False, None), "refuted"),
        ((None, None), "not testable here"),
    ],
)
def test_facts(facts: tuple[bool | None, bool | None], outcome: str) -> None:
    verdict = claims.judge_facts("C06", {"utilisation falls to zero": facts[0], "utilisation reaches 100 %": facts[1]})
    assert verdict.outcome == outcome
    assert "Utilisation falls to zero" in verdict.reason


def test_not_testable_says_what_is_missing_and_what_it_would_take() -> None:
    verdict = claims.not_testable("C37", "absent: NVML is not there", "a GPU with its driver")
    assert verdict.reason == "absent: NVML is not there. It would take a GPU with its driver."


def test_the_articles_table_against_littles_law() -> None:
    verdict = claims.judge_table()
    numbers = {item.label: item.value for item in verdict.evidence}
    assert numbers["before: mean latency by Little's law"] == pytest.approx(300 / 127)
    # 95 % of the requests at most 2.173 s, the rest at most the 5 s after which the article's client gives up.
    assert numbers["before: greatest mean the P95 permits"] == pytest.approx(0.95 * 2.173 + 0.05 * 5)
    assert verdict.outcome == "refuted"
    assert "5 of 5 printed improvements" in verdict.reason
    # With fewer users in flight the same table would hold together, so it is the data that decides.
    assert claims.judge_table(users=250).outcome == "confirmed"


def test_verdicts_survive_the_file_and_replace_their_own_claim(tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    first = Verdict("C34", "partly", "smaller", (Evidence("gain", 2.0, 1.5, math.inf, 9, "×"),))
    claims.record(first, path)
    claims.record(Verdict("C06", "refuted", "flat"), path)
    assert claims.read_verdicts(path) == [Verdict("C06", "refuted", "flat"), first]
    claims.record(Verdict("C34", "confirmed", "again"), path)
    assert [verdict.outcome for verdict in claims.read_verdicts(path)] == ["refuted", "confirmed"]
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_outside_of_an_execution_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(claims.VERDICTS_VARIABLE, raising=False)
    assert claims.record(Verdict("C06", "refuted", "flat")) is None
    monkeypatch.setenv(claims.VERDICTS_VARIABLE, str(tmp_path / "v.json"))
    assert claims.record(Verdict("C06", "refuted", "flat")) == tmp_path / "v.json"


def test_a_broken_file_of_verdicts_is_named(tmp_path: Path) -> None:
    (tmp_path / "v.json").write_text('[{"claim": "C01"')
    with pytest.raises(ValueError, match="v.json"):
        claims.read_verdicts(tmp_path / "v.json")
    assert claims.read_verdicts(tmp_path / "none.json") == []


def test_wrong_ids_and_outcomes_are_refused() -> None:
    with pytest.raises(ValueError, match="C01 to C43"):
        claims.claim("C99")
    with pytest.raises(ValueError, match="outcome"):
        Verdict("C01", "maybe", "")  # type: ignore[arg-type]
