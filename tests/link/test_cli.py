from __future__ import annotations

import re
import subprocess
import sys


def labkit_link(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "labkit.cli", "link", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_link_is_shown_as_it_was_measured(open_link):
    with open_link(rtt_ms=0):
        pass
    for _ in range(3):  # a link on a crowded machine is off, and says so
        shown = labkit_link("--rtt-ms", "20", "--rate-mbit", "10", "--seconds", "0.6")
        if shown.returncode == 0:
            break
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert re.search(r"RTT +20 ms +2[0-2]", shown.stdout)
    assert re.search(r"client to origin: rate +10 Mbit/s +(9|10)", shown.stdout)
    assert "valid" in shown.stdout


def test_a_command_runs_on_the_client_and_its_status_is_handed_on(open_link):
    with open_link(rtt_ms=0):
        pass
    ran = labkit_link("--rtt-ms", "1", "--", "sh", "-c", "ip -br address show dev eth0; exit 7")
    assert "10.77.0.1/24" in ran.stdout and ran.returncode == 7


def test_without_namespaces_the_link_is_no_good_for_losses_and_says_so():
    shown = labkit_link("--rtt-ms", "10", "--loss", "0.01", "--mode", "delay only")
    assert shown.returncode == 1
    assert "loss needs network namespaces" in shown.stdout and "no verdict" in shown.stdout
