"""Load generators against a server whose log says what really happened."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from labkit.errors import UserError
from labkit.experiments import generator_tools, generators
from labkit.experiments.generator_tools import ARTICLE, JMETER, LABKIT, LOCUST, Told, threads_client
from labkit.experiments.generator_truth import FAILURES, WHOLE, Truth, faulty_scripts, golden_process, truth_of
from labkit.experiments.generators import Frozen, Measured, Measurement
from labkit.experiments.intervals import percentile
from labkit.traffic.golden_play import Script
from labkit.traffic.workload import Workload

MIX = (("short", 0.6), ("medium", 0.3), ("long", 0.1))


def test_ours_counts_all_as_the_log_does_and_the_articles_client_as_its_code_says() -> None:
    """Forty requests are two rounds of the script: of every fault there are two, and 26 whole answers."""
    found = generators.measure_generators((LABKIT, ARTICLE), users=40, requests=40, timeout_s=1.0)
    ours, article = found.rows
    assert ours.told and ours.truth and article.told and article.truth
    for row in (ours, article):
        assert row.truth and row.truth.outcomes == {
            WHOLE: 26, "truncated": 4, "5xx": 2, "stream_error": 2, "timeout": 6,
        }  # fmt: skip
        assert row.cpu_s > 0 and row.told and row.told.mix == {"short": 24, "medium": 12, "long": 4}
    assert ours.told.success == 26 and ours.told.failures == {
        kind: ours.truth.outcomes[kind] for kind in FAILURES
    }  # fmt: skip
    assert ours.told.latency(95).value == pytest.approx(ours.truth.latency(95).value, abs=0.2)
    assert ours.told.ttft_p50_s == pytest.approx(0.22, abs=0.15) and ours.told.itl_p50_s == pytest.approx(
        0.02, abs=4e-3
    )
    # It takes for a success what ended without its end, held an error, or came slowly token by token. Of the timeouts
    # it knows those where not a byte came; one in the middle of an answer ends the thread, as a broken connection does.
    told = article.told
    assert (told.success, dict(told.failures)) == (26 + 6, {"5xx": 2, "timeout": 2})
    assert article.truth.requests - told.requests == 4
    assert "2 × ChunkedEncodingError" in told.remark and "2 × ConnectionError" in told.remark
    assert len(told.latencies) == 34 and max(told.latencies) == pytest.approx(1.5, abs=0.3)


@pytest.mark.clock
def test_a_freeze_shows_to_an_open_loop_and_not_to_users_who_wait() -> None:
    frozen = generators.measure_freeze(rate=20, seconds=1.6, freeze_s=0.5, users=4, answer_s=0.04)
    wanted = percentile(frozen.expected, 95).value
    assert 0.44 <= wanted <= 0.54  # one every 50 ms, and the second longest of 31
    assert percentile(frozen.scheduled, 95).value == pytest.approx(wanted, abs=0.25)
    assert percentile(frozen.closed, 95).value < 0.5 * wanted < max(frozen.closed)


def test_a_freeze_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="below half"):
        generators.measure_freeze(seconds=2, freeze_s=1)


def test_latencies_through_a_freeze_by_arithmetic() -> None:
    """Frozen from 1 to 2 s: before it, overtaken by it, at its start, within, after."""
    found = generators.expected_latencies([0.5, 0.95, 1.0, 1.7, 2.0], 1.0, 1.0, 0.1)
    assert found == pytest.approx([0.1, 1.05, 1.1, 0.4, 0.1])


def test_truth_is_read_from_the_log() -> None:
    scripts = [Script(ttft_s=0.1, itl_s=0.1, tokens=2), Script(fault="5xx"), Script(ttft_s=9)]
    rows = [
        {"request_id": "", "received": 5.0, "ended": 5.25, "sends": [[5.1, 5.11], [5.2, 5.25]]},
        {"request_id": "", "received": 5.1, "ended": None, "sends": []},
        {"request_id": "", "received": 5.2, "ended": None, "sends": []},
        {"request_id": "4", "received": 5.3, "ended": None, "sends": []},
    ]
    truth = truth_of(rows, scripts, timeout_s=5.0)
    assert truth.outcomes == {WHOLE: 1, "5xx": 2, "timeout": 1, "truncated": 0, "stream_error": 0}
    assert truth.parts == {"whole": 1, "HTTP 500": 2, "slow: headers only": 1}
    assert truth.latencies == pytest.approx([0.25]) and truth.span_s == pytest.approx(0.25)
    assert truth.ttft_p50_s == pytest.approx(0.11) and truth.itl_p50_s == pytest.approx(0.14)
    assert truth.late_p95_s == pytest.approx(0.05)


def test_a_timeout_that_whole_answers_do_not_keep_is_refused() -> None:
    with pytest.raises(ValueError, match="timeout_s"):
        faulty_scripts(0.5)


def test_what_is_not_installed_or_fails_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "locust"
    broken.write_text("#!/bin/sh\necho no room on this machine\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(generator_tools, "ROOT", tmp_path)
    monkeypatch.setattr(generator_tools.sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="jmeter is not installed; `make peer-jmeter` installs it"):
        generator_tools.find_program("jmeter")
    with pytest.raises(UserError, match="locust failed with exit code 3; .*no room on this machine"):
        generator_tools.locust_generator("http://127.0.0.1:1", Workload.article(), 1.0, tmp_path)


def test_a_generator_that_cannot_run_leaves_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Path:
        raise UserError(f"{name} is not here")

    monkeypatch.setattr(generator_tools, "find_program", absent)
    found = generators.measure_under_load((LOCUST,), users=1, requests=1, script=Script())
    assert found.rows == (Measured(LOCUST, None, None, pytest.approx(math.nan, nan_ok=True), "locust is not here"),)
    assert found.of(LOCUST) is None
    with pytest.raises(ValueError, match="no such generator: wrk"):
        generators.measure_generators(("wrk",))


def test_no_process_is_left_when_the_run_is_broken_off() -> None:
    pids = []
    with pytest.raises(KeyboardInterrupt), golden_process([Script(ttft_s=60)]) as server:
        pids.append(server.pid)
        with threads_client(server.url, Workload.article(users=2, requests=2), 1.0):
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
            pids += [int(pid) for pid in children.read_text().split()] if children.exists() else []
            raise KeyboardInterrupt
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def told(success: int, latency_s: float = 1.0, **failures: int) -> Told:
    return Told(success, failures, (latency_s,) * success, mix={"short": 60, "medium": 30, "long": 10})


def truth(latency_s: float = 1.0, span_s: float = 1.0, **failures: int) -> Truth:
    outcomes = {WHOLE: 60, **dict.fromkeys(FAILURES, 0), **failures}
    return Truth(outcomes, {}, (latency_s,) * 60, 0.1, 0.02, span_s, 0.0)


def measurement(*rows: Measured) -> Measurement:
    return Measurement(rows, 60, 5.0, MIX)


ALL = {"truncated": 10, "5xx": 10, "stream_error": 10, "timeout": 10}
STILL = Frozen(1.0, 0.1, 20.0, 4, (1.0,) * 20, (1.0,) * 20, (1.0,) * 20, (1.0,) * 20)


def test_a_client_that_gets_everything_right_confirms_the_claim() -> None:
    faults = measurement(Measured(ARTICLE, told(60, **ALL), truth(**ALL), 1.0))
    load = measurement(Measured(ARTICLE, told(60, 1.05), truth(), 1.0))
    assert generators.judge_client(faults, load, STILL).outcome == "confirmed"


@pytest.mark.parametrize(
    ("faults", "load", "frozen", "wrong"),
    [
        (told(70, **{**ALL, "truncated": 0}), (told(60), truth()), STILL, "truncated streams are noticed: no"),
        (told(50, **ALL), (told(60), truth()), STILL, "successes are the whole answers: no"),
        (told(60, **{**ALL, "timeout": 3}), (told(60), truth()), STILL, "counted as timeouts: no"),
        (told(60, **ALL), (told(60, 1.2), truth()), STILL, "P95 are within 10% of the server's: no"),
        (told(60, **ALL), (told(60), truth(span_s=1.3)), STILL, "longer than the server): no"),
        (told(60, **ALL), (told(60), truth()), Frozen(1.0, 0.1, 20.0, 4, (1.0,) * 20, (), (), (0.1,) * 200),
         "shows in its P95: no"),
    ],
)  # fmt: skip
def test_each_fault_of_a_client_costs_it(faults: Told, load: tuple[Told, Truth], frozen: Frozen, wrong: str) -> None:
    verdict = generators.judge_client(
        measurement(Measured(ARTICLE, faults, truth(**ALL), 1.0)), measurement(Measured(ARTICLE, *load, 1.0)), frozen
    )
    assert verdict.claim == "C04" and verdict.outcome == "partly" and wrong in verdict.reason


def test_tools_that_did_not_run_decide_nothing() -> None:
    right = Measured(LOCUST, told(60), truth(), 1.0)
    absent = Measured(JMETER, absent="no Java")
    neither = measurement(absent)
    none = generators.judge_tools(neither, neither)
    assert none.outcome == "not testable here" and "Neither JMeter nor Locust ran" in none.reason
    one = measurement(right, absent)
    half = generators.judge_tools(one, one)
    assert half.outcome == "partly" and "JMeter asks in the article's mix: not observable here" in half.reason
    assert all("`make peer-jmeter peer-locust`" in each.reason and "`make test-peers`" in each.reason
               for each in (none, half))  # fmt: skip
    both = measurement(right, Measured(JMETER, told(60), truth(), 1.0))
    assert generators.judge_tools(both, both).outcome == "confirmed"
    other = Told(60, {}, (1.0,) * 60, mix={"short": 100})
    wrong = measurement(*(Measured(tool, other, truth(latency_s=2.0, timeout=40), 1.0) for tool in (LOCUST, JMETER)))
    assert generators.judge_tools(wrong, wrong).outcome == "refuted"
