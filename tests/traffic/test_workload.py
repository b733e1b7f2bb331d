from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest

from labkit.errors import UserError
from labkit.traffic.workload import Workload, schedule


def test_the_article_mix_is_exact_in_every_block_and_shuffled():
    buckets = [arrival.bucket for arrival in islice(schedule(Workload.article()), 200)]
    for begin in range(0, 200, 20):
        block = buckets[begin : begin + 20]
        assert (block.count("short"), block.count("medium"), block.count("long")) == (12, 6, 2)
    assert buckets[:20] != buckets[20:40]


def test_shares_that_do_not_divide_a_block_come_out_over_many():
    third = Workload.article(mix={"short": 1 / 3, "medium": 1 / 3, "long": 1 / 3})
    buckets = [arrival.bucket for arrival in islice(schedule(third), 600)]
    assert [buckets.count(name) for name in ("short", "medium", "long")] == [200, 200, 200]


@pytest.mark.parametrize(
    ("arrivals", "cv", "expected_cv"), [("poisson", 3.0, 1.0), ("bursty", 2.5, 2.5), ("constant", 3.0, 0.0)]
)
def test_gaps_have_the_rate_and_the_variation_asked_for(arrivals, cv, expected_cv):
    workload = Workload.article(arrivals=arrivals, rate=50.0, cv=cv, requests=20_000, seed=3)
    times = np.array([arrival.t_s for arrival in schedule(workload)])
    gaps = np.diff(times)
    assert len(times) == 20_000
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.06)
    assert gaps.std() / gaps.mean() == pytest.approx(expected_cv, rel=0.06, abs=1e-6)


def test_the_schedule_follows_from_the_seed():
    def times(seed):
        return [arrival.t_s for arrival in schedule(Workload.article(arrivals="poisson", requests=50, seed=seed))]

    assert times(1) == times(1)
    assert times(1) != times(2)


def test_a_duration_holds_the_requests_scheduled_inside_it():
    workload = Workload.article(arrivals="constant", rate=10.0, duration_s=3.0)
    times = [arrival.t_s for arrival in schedule(workload)]
    assert times == pytest.approx([0.1 * k for k in range(1, 30)])


def test_a_ramp_raises_the_rate_linearly():
    workload = Workload.article(arrivals="constant", rate=100.0, ramp_s=10.0, duration_s=5.0)
    times = np.array([arrival.t_s for arrival in schedule(workload)])
    # Linear from 0 to 100/s over 10 s: 500 requests in the ramp, a quarter of them in its first half.
    assert (times < 10).sum() == pytest.approx(500, abs=1)
    assert (times < 5).sum() == pytest.approx(125, abs=1)
    assert (times >= 10).sum() == pytest.approx(500, abs=1)


def test_the_count_of_requests_is_of_the_measured_part():
    workload = Workload.article(arrivals="constant", rate=10.0, warmup_s=2.0, requests=7)
    assert sum(arrival.t_s >= 2.0 for arrival in schedule(workload)) == 7


def test_json_round_trip():
    workload = Workload.article(users=3, duration_s=4.5, think_s=0.25, seed=9)
    assert Workload.from_json(workload.to_json()) == workload


@pytest.mark.parametrize(
    "changes",
    [
        {"users": 0}, {"users": 1.5}, {"users": True}, {"rate": 0}, {"rate": float("nan")}, {"arrivals": "sometimes"},
        {"mix": {"short": 0.5}}, {"mix": {"huge": 1.0}}, {"mix": {"short": 1.5, "long": -0.5}}, {"requests": 0},
        {"requests": 5, "duration_s": 5}, {"requests": None}, {"timeout_s": 0}, {"seed": -1}, {"max_tokens": 0},
        {"trace": "x.jsonl"}, {"arrivals": "trace"}, {"ramp_s": -1}, {"think_s": float("inf")}, {"cv": 0},
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(changes):
    field = next(iter(changes))
    with pytest.raises(ValueError, match=f"{field}|requests|trace"):
        Workload(**{"requests": 5, **changes})


@pytest.mark.parametrize("text", ["[]", "{", '{"no_such": 1}'])
def test_json_that_is_no_workload(text):
    with pytest.raises(ValueError, match="workload"):
        Workload.from_json(text)


def test_a_trace_gives_its_own_times_and_prompts(tmp_path):
    rows = [{"t": 0.0, "bucket": "long"}, {"t": 0.5, "prompt": "2+2?", "answer": "4", "max_tokens": 3}]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    first, second = schedule(Workload(arrivals="trace", trace=str(tmp_path / "trace.jsonl")))
    assert (first.t_s, first.bucket, first.prompt) == (0.0, "long", None)
    assert (second.t_s, second.prompt, second.answer, second.max_tokens) == (0.5, "2+2?", "4", 3)


@pytest.mark.parametrize(
    "line", ["nonsense", '{"bucket": "short"}', '{"t": 1}', '{"t": -1, "bucket": "short"}', '{"t": 1, "bucket": "x"}']
)
def test_a_bad_trace_names_the_line(tmp_path, line):
    (tmp_path / "trace.jsonl").write_text('{"t": 0, "bucket": "short"}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2"):
        list(schedule(Workload(arrivals="trace", trace=str(tmp_path / "trace.jsonl"))))
    with pytest.raises(UserError, match="cannot be read"):
        list(schedule(Workload(arrivals="trace", trace=str(tmp_path / "none.jsonl"))))
