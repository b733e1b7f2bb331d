"""Locust, JMeter and guidellm run by labkit/experiments/generators.py: what each says is held against the log."""

from __future__ import annotations

import pytest

from labkit.experiments.generator_tools import GUIDELLM, JMETER, LOCUST, Told
from labkit.experiments.generator_truth import WHOLE, Truth
from labkit.experiments.generators import judge_tools, measure_generators, measure_under_load

pytestmark = [pytest.mark.peers, pytest.mark.timeout(300)]


def ran(tool: str, may_lose: int = 0) -> tuple[Told, Truth]:
    [row] = measure_generators((tool,), users=20, requests=60, timeout_s=2.0).rows
    assert row.told is not None and row.truth is not None, row.absent
    assert row.cpu_s > 0 and 0 <= row.truth.requests - row.told.requests <= may_lose
    return row.told, row.truth


def failures(counted: Told | Truth) -> dict[str, int]:
    found = counted.failures if isinstance(counted, Told) else counted.outcomes
    return {kind: count for kind, count in found.items() if count and kind != WHOLE}


def test_locust_counts_all_but_slow_tokens(peer) -> None:
    """Its timeout is one of a read: an answer that comes token by token never reaches it."""
    peer("locust")
    told, truth = ran(LOCUST)
    slow = truth.parts["slow: token by token"]
    assert told.success == truth.outcomes[WHOLE] + slow
    assert failures(told) == failures(truth) | {"timeout": truth.outcomes["timeout"] - slow}
    assert len(told.latencies) == truth.requests  # its percentiles are of failed requests too
    assert told.itl_p50_s == pytest.approx(0.02, abs=0.002) and told.ttft_p50_s == pytest.approx(0.2, abs=0.05)


def test_jmeter_counts_all_as_the_log_does(peer) -> None:
    peer("jmeter")
    told, truth = ran(JMETER)
    assert truth.requests == 60 and told.success == truth.outcomes[WHOLE] and failures(told) == failures(truth)
    assert told.latency(50).value == pytest.approx(truth.latency(50).value, abs=0.1)
    assert told.mix == {"short": 36, "medium": 18, "long": 6}


def test_guidellm_takes_an_answer_without_its_end_for_a_success(peer) -> None:
    peer("guidellm")
    # Now and then, more often on a busy machine, it leaves the request that ends the run out of its report.
    told, truth = ran(GUIDELLM, may_lose=1)
    unended, slow = truth.parts["no end"], truth.parts["slow: token by token"]
    less = {"truncated": truth.outcomes["truncated"] - unended, "timeout": truth.outcomes["timeout"] - slow}
    expected = failures(truth) | less | {WHOLE: truth.outcomes[WHOLE] + unended + slow}
    found = failures(told) | {WHOLE: told.success}
    assert found.keys() == expected.keys() and all(count <= expected[kind] for kind, count in found.items())
    assert told.itl_p50_s == pytest.approx(0.02, abs=0.002)


def test_locust_and_jmeter_are_judged_by_what_they_did(peer) -> None:
    peer("locust"), peer("jmeter")
    tools = (LOCUST, JMETER)
    faults = measure_generators(tools, users=20, requests=60, timeout_s=2.0)
    verdict = judge_tools(faults, measure_under_load(tools, users=20, requests=60))
    assert verdict.claim == "C05" and "not observable" not in verdict.reason
    for tool in tools:
        assert f"{tool} asks in the article's mix: yes" in verdict.reason
