from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from labkit.probes import others
from labkit.probes.others import OtherLoad, disturbance


def test_what_others_took_is_all_that_was_busy_less_what_was_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(clock=100.0, busy=16.0, own=3.0)
    monkeypatch.setattr(others, "time", SimpleNamespace(perf_counter=lambda: now.clock))
    monkeypatch.setattr(others, "busy_seconds", lambda: now.busy)
    monkeypatch.setattr(others, "_own_s", lambda: now.own)
    load = OtherLoad()
    now.clock, now.busy, now.own = 104.0, 22.0, 5.0
    assert load.cores() == 1.0
    now.own = 9.5
    assert load.cores() == 0.0, "clocks tick in steps: a little more of ours than was busy is none of others"


def test_time_of_this_process_and_of_its_children_is_ours() -> None:
    before = others._own_s()
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    after = others._own_s()
    assert after - before > 0.25
    spins = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run(["sh", "-c", f"{sys.executable} -c '{spins}'; true"], check=True)
    assert others._own_s() - after > 0.25, "a grandchild counts, once it has ended"


def test_a_program_that_is_not_ours_is_seen() -> None:
    load = OtherLoad()
    # Its parent ends at once, so that nobody of ours waits for it.
    subprocess.run(["sh", "-c", "timeout 0.8 sh -c 'while :; do :; done' >/dev/null 2>&1 &"], check=True)
    time.sleep(0.8)
    assert load.cores() > 0.3


def test_it_is_said_where_it_matters() -> None:
    assert disturbance(0.19, 2) is None and disturbance(0.3, 8) is None
    assert "kept 1.0 of 2 cores busy" in str(disturbance(1.04, 2))
