from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.errors import UserError
from labkit.link.leg import Leg
from labkit.link.relay import COUNTS, LATE_BUCKETS, DropTail, read_count


def simulate(arrivals: list[tuple[float, int]], rate: float, room: int) -> list[float | None]:
    """The same queue byte by byte: what waits is a list of frames, drained in the time between two arrivals."""
    waiting: list[list[float]] = []  # [number, bytes left]
    left: dict[int, float | None] = {}
    now = 0.0

    def drain(until: float) -> None:
        nonlocal now
        while waiting and now + waiting[0][1] / rate <= until:
            now += waiting[0][1] / rate
            left[int(waiting.pop(0)[0])] = now
        if waiting:
            waiting[0][1] -= (until - now) * rate
        now = until

    for number, (at, size) in enumerate(arrivals):
        drain(at)
        if sum(bytes_left for _, bytes_left in waiting) + size > room + 1e-6:
            left[number] = None
        else:
            waiting.append([number, size])
    drain(math.inf if not waiting else now + sum(b for _, b in waiting) / rate + 1.0)
    return [left[number] for number in range(len(arrivals))]


@settings(max_examples=60)
@given(
    gaps=st.lists(st.tuples(st.floats(0, 0.01), st.integers(60, 1514)), min_size=1, max_size=60),
    rate_mbit=st.sampled_from([0.5, 2.0, 10.0]),
    room=st.integers(1514, 8000),
)
def test_the_queue_lets_through_what_a_simulation_of_every_byte_does(gaps, rate_mbit, room):
    at, arrivals = 0.0, []
    for gap, size in gaps:
        at += gap
        arrivals.append((at, size))
    queue = DropTail(rate_mbit, room)
    expected = simulate(arrivals, rate_mbit * 1e6 / 8, room)
    for (came, size), reference in zip(arrivals, expected, strict=True):
        leaves = queue.admit(came, size)
        if leaves is None or reference is None:
            assert leaves is reference is None
        else:
            assert leaves == pytest.approx(reference, abs=1e-9)


def test_a_burst_fills_the_buffer_and_no_more():
    queue = DropTail(rate_mbit=8.0, buffer_bytes=10_500)  # 1 byte a µs
    leaves = [queue.admit(0.0, 1000) for _ in range(20)]
    assert leaves[:10] == pytest.approx([0.001 * (k + 1) for k in range(10)])
    assert leaves[10:] == [None] * 10
    assert queue.admit(0.0006, 1000) == pytest.approx(0.011)


def test_counts_tell_how_late_a_share_of_the_frames_was():
    words = dict.fromkeys(COUNTS, 0) | {"delivered": 100, "late_sum_us": 5_000}
    late = [0] * LATE_BUCKETS
    late[6], late[12] = 98, 2  # below 64 µs, below 4.096 ms
    count = read_count("a to b", [*words.values(), *late, 0])
    assert (count.late_ms(0.5), count.late_ms(0.98), count.late_ms(0.99)) == (0.064, 0.064, 4.096)
    assert count.late_mean_ms == 0.05
    assert (count - count).delivered == 0 and (count - count).late_ms(0.99) == 0.0


def test_a_buffer_is_a_bandwidth_delay_product_unless_given():
    assert Leg(rtt_ms=40, rate_mbit=100).buffer_bytes == 500_000
    assert Leg(rtt_ms=1, rate_mbit=1).buffer_bytes == 15_140
    assert Leg(rtt_ms=40, rate_mbit=100, buffer_kb=20).buffer_bytes == 20_000
    assert Leg(rtt_ms=40).buffer_bytes is None


@pytest.mark.parametrize(
    "wrong",
    [{"rtt_ms": -1}, {"loss": 1.0}, {"loss": 2}, {"rate_mbit": 0}, {"buffer_kb": 10}, {"rate_mbit": 1, "buffer_kb": 1}],
)
def test_a_wire_that_cannot_be_is_refused(wrong):
    with pytest.raises(UserError):
        Leg(**wrong)
