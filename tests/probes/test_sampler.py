from __future__ import annotations

import threading
import time

import pandas as pd
import pytest

from labkit.probes.sampler import Sampler, rate, series


class Fake:
    description = "a counter"

    def __init__(self, name: str = "fake", nap_s: float = 0.0, fails_at: int = -1) -> None:
        self.name, self.nap_s, self.fails_at, self.count = name, nap_s, fails_at, 0

    def read(self) -> dict[str, float]:
        self.count += 1
        time.sleep(self.nap_s)
        if self.count == self.fails_at:
            raise RuntimeError("no reading today")
        return {"count": self.count}


@pytest.mark.clock
def test_readings_keep_an_absolute_schedule() -> None:
    readings: list[float] = []

    def clock() -> float:
        readings.append(time.perf_counter())
        return readings[-1]

    with Sampler([Fake()], hz=50, clock=clock) as sampler:
        time.sleep(1.0)
    times = series(sampler.frame(), "fake", "count")["t_s"]
    # 50 ticks are due in a second; a schedule that slept a period after each reading would drift by its overheads.
    assert 48 <= len(times) + sampler.report()["probes"]["fake"]["missed"] <= 51
    offsets = (times - readings[0]) * 50
    assert (offsets - offsets.round()).abs().median() < 0.1


@pytest.mark.clock
def test_late_ticks_are_recorded_and_not_made_up_for() -> None:
    slow = Fake(nap_s=0.25)
    with Sampler([slow], hz=20) as sampler:
        time.sleep(1.05)
    report = sampler.report()["probes"]["fake"]
    times = series(sampler.frame(), "fake", "count")["t_s"]
    assert times.diff().dropna().min() > 0.25  # never two in a bunch
    assert report["missed"] == series(sampler.frame(), "fake", "missed")["value"].sum() > 0
    assert 18 <= report["ticks"] + report["missed"] <= 27


@pytest.mark.clock
def test_a_slow_probe_delays_only_itself() -> None:
    with Sampler([Fake("slow", nap_s=0.5), Fake("fast")], hz=50) as sampler:
        time.sleep(0.6)
    report = sampler.report()["probes"]
    assert report["fast"]["ticks"] >= 20
    assert report["slow"]["ticks"] <= 2


def test_a_probe_that_raises_is_recorded_and_read_again() -> None:
    with Sampler([Fake(fails_at=2)], hz=50) as sampler:
        time.sleep(0.2)
    report = sampler.report()["probes"]["fake"]
    assert report["failures"] == 1 and report["first_failure"] == "RuntimeError: no reading today"
    assert series(sampler.frame(), "fake", "failed")["value"].tolist() == [1.0]
    assert report["ticks"] > 5


def test_the_clock_of_the_run_stamps_the_samples() -> None:
    origin = time.perf_counter() - 1000.0
    with Sampler([Fake()], hz=50, clock=lambda: time.perf_counter() - origin) as sampler:
        time.sleep(0.1)
    assert sampler.frame()["t_s"].between(1000.0, 1001.0).all()


@pytest.mark.clock
def test_the_sampler_names_its_own_cost() -> None:
    class Busy(Fake):
        def read(self) -> dict[str, float]:
            end = time.thread_time() + 0.005
            while time.thread_time() < end:
                pass
            return {"x": 1.0}

    with Sampler([Busy()], hz=20) as sampler:
        time.sleep(1.0)
    # 20 readings of 5 ms of CPU time in a second: a tenth of a core.
    assert sampler.report()["cpu_share"] == pytest.approx(0.1, rel=0.3)


def test_stop_ends_the_threads_and_leaves_the_frame() -> None:
    before = threading.active_count()
    sampler = Sampler([Fake()], hz=1).start()
    time.sleep(0.05)
    began = time.perf_counter()
    frame = sampler.stop()
    assert time.perf_counter() - began < 0.5  # not a whole period
    assert threading.active_count() == before
    assert frame.columns.tolist() == ["t_s", "probe", "name", "value"] and len(frame) == 1
    with pytest.raises(RuntimeError, match="once"):
        sampler.start()


def test_no_probe_gives_an_empty_frame_with_the_right_columns() -> None:
    with Sampler([], hz=10) as sampler:
        pass
    assert sampler.frame().columns.tolist() == ["t_s", "probe", "name", "value"]


@pytest.mark.parametrize("hz", [0, -1, 10_000])
def test_a_rate_out_of_range_is_refused(hz: float) -> None:
    with pytest.raises(ValueError, match="hz"):
        Sampler([], hz=hz)


def test_two_probes_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="names"):
        Sampler([Fake(), Fake()])


def test_rate_is_the_growth_of_a_counter_and_skips_a_reset() -> None:
    samples = pd.DataFrame(
        {"t_s": [0.0, 1.0, 3.0, 4.0, 5.0], "probe": "e", "name": "n", "value": [0.0, 10.0, 14.0, 0.0, 3.0]}
    )
    assert rate(samples, "e", "n").to_dict("list") == {"t_s": [1.0, 3.0, 5.0], "value": [10.0, 2.0, 3.0]}
