from __future__ import annotations

import pytest

from labkit.bench.drive import Answered
from labkit.bench.users import Load, load_of, measured_requests, most_users
from labkit.bench.workloads import Request


@pytest.mark.parametrize("first", [1, 16])
@pytest.mark.parametrize("true", [0, 1, 7, 16, 20, 33, 128])
def test_the_search_finds_the_last_number_under_the_limit(first, true):
    asked = []

    def measure(users: int) -> Load:
        asked.append(users)
        return Load(users, 1.0, (0.0, users / (true + 0.5), 0.0), (0.0, 0.0), 1)

    found = most_users(measure, 1.0, first)
    assert found <= true and true - found < max(1, true // 24) + 1
    assert len(asked) == len(set(asked)) <= 14


def test_percentiles_and_throughput_of_a_load():
    answered = [
        Answered(Request([1], 1), added_s=float(i), first_s=i + 0.5, end_s=i + 1.0 + (i == 99)) for i in range(100)
    ]
    load = load_of(4, answered)
    assert load.e2e_s == (1.0, 1.0, 1.0) and load.ttft_s == (0.5, 0.5)
    assert load.requests_s == pytest.approx(4 / 1.01)
    assert load.figures()["E2E P95 ms"] == pytest.approx(1000) and load.measured == 100


def test_a_p95_has_enough_requests():
    assert measured_requests(1) == 120 and measured_requests(64) == 384
