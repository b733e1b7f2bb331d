from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from labkit.probes.host import HostProbe


@contextmanager
def child(code: str) -> Iterator[subprocess.Popen[str]]:
    """A Python child that has printed one line."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.clock
def test_a_busy_child_shows_as_what_the_kernel_charged_it() -> None:
    with child("print('up', flush=True)\nwhile True: pass") as process:
        probe, peer = HostProbe(process.pid), psutil.Process(process.pid)
        probe.read()
        began, before = time.perf_counter(), sum(peer.cpu_times()[:2])
        time.sleep(1.0)
        reading = probe.read()
        charged = 100 * (sum(peer.cpu_times()[:2]) - before) / (time.perf_counter() - began)
    # On a crowded machine the child gets less than a core; the probe must still say what it got.
    assert reading["tree_cpu"] == pytest.approx(charged, abs=8.0)
    assert reading["tree_cpu"] > 10.0
    assert reading["tree_processes"] == 1
    assert reading["cpu"] > 5.0
    assert all(0.0 <= reading[name] <= 100.0 for name in reading if name.startswith("cpu"))


def test_rss_follows_what_a_child_allocates() -> None:
    code = "print('up', flush=True); input(); kept = bytearray(b'x') * (200 << 20); print('grown', flush=True); input()"
    with child(code) as process:
        probe = HostProbe(process.pid)
        before = probe.read()["tree_rss_bytes"]
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        process.stdout.readline()
        after = probe.read()["tree_rss_bytes"]
    assert after - before == pytest.approx(200 << 20, rel=0.03)


def test_the_tree_holds_grandchildren_and_ends_at_zero() -> None:
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print('up', flush=True)\ntry: input()\nfinally: p.kill(); p.wait()"
    )
    with child(code) as process:
        probe = HostProbe(process.pid)
        assert probe.read()["tree_processes"] == 2
        process.communicate("end\n")
    assert probe.read()["tree_processes"] == 0


def test_a_pid_that_never_was_reads_as_an_empty_tree() -> None:
    assert HostProbe(2**22 - 3).read()["tree_processes"] == 0


def test_the_machine_part() -> None:
    probe = HostProbe()
    probe.read()
    time.sleep(0.2)
    reading = probe.read()
    memory = psutil.virtual_memory()
    assert reading["memory_total_bytes"] == memory.total
    assert 0 < reading["memory_used_bytes"] < memory.total
    assert reading["runnable"] >= 1  # this very task
    assert {"load1", "swap_used_bytes", "swap_in_bytes", "swap_out_bytes", "cpu"} <= set(reading)
    assert not any(name.startswith("tree_") for name in reading)
    assert "cores" in probe.description
