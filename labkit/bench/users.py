"""How many closed-loop users an engine takes with P95 latency under a limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from labkit.bench.drive import Answered
from labkit.experiments.intervals import percentile

LEAST_MEASURED = 120
"""More than the 90 answers that a P95 needs before it says anything."""
FIRST_USERS = {"cuda": 16, "cpu": 1}
MOST_USERS = 4096


@dataclass(frozen=True)
class Load:
    """What so many users saw. Seconds, end to end and to the first token."""

    users: int
    requests_s: float
    e2e_s: tuple[float, float, float]
    """P50, P95, P99."""
    ttft_s: tuple[float, float]
    """P50, P95."""
    measured: int

    @property
    def p95_s(self) -> float:
        return self.e2e_s[1]

    def figures(self) -> dict[str, float]:
        return {
            "users": float(self.users),
            "requests/s": self.requests_s,
            "E2E P50 ms": self.e2e_s[0] * 1e3,
            "E2E P95 ms": self.e2e_s[1] * 1e3,
            "E2E P99 ms": self.e2e_s[2] * 1e3,
            "TTFT P50 ms": self.ttft_s[0] * 1e3,
            "TTFT P95 ms": self.ttft_s[1] * 1e3,
            "measured": float(self.measured),
        }


def measured_requests(users: int) -> int:
    return max(LEAST_MEASURED, 6 * users)


def load_of(users: int, answered: Sequence[Answered]) -> Load:
    """From the measured requests of one closed loop. Throughput is by Little's law: users / mean latency, exact for
    users without think time and free of what the ends of the measurement cut off."""
    e2e, ttft = [each.e2e_s for each in answered], [each.ttft_s for each in answered]
    return Load(
        users,
        users * len(e2e) / sum(e2e),
        (percentile(e2e, 50).value, percentile(e2e, 95).value, percentile(e2e, 99).value),
        (percentile(ttft, 50).value, percentile(ttft, 95).value),
        len(e2e),
    )


def most_users(measure: Callable[[int], Load], limit_s: float, first: int) -> int:
    """The largest number of users found with P95 E2E below ``limit_s``; 0 if a single one waits longer.

    Doubles (or halves) from ``first`` until the limit lies between two numbers, then bisects to one part in 24.
    ``measure`` is called once a number.
    """
    under, over = 0, first
    while over <= MOST_USERS and measure(over).p95_s < limit_s:
        under, over = over, 2 * over
    while under == 0 and over > 1:
        half = over // 2
        if measure(half).p95_s < limit_s:
            under = half
        else:
            over = half
    while over - under > max(1, under // 24):
        middle = (under + over) // 2
        if measure(middle).p95_s < limit_s:
            under = middle
        else:
            over = middle
    return under
