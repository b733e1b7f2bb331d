"""Nothing is left of a link, whatever ends the process that made it; and what there is where it may not be."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from labkit.link import Link
from labkit.link.namespaces import members

# Opens a link with something running on it, and tells which namespaces it has; then waits, or fails.
MAKE = """
import json, subprocess, sys, time
from labkit.link import Link
from labkit.link.namespaces import network_id
with Link(rtt_ms=10, loss=0.1, rate_mbit=10) as link:
    ids = []
    if link.mode != "delay only":
        link.popen("origin", ["sh", "-c", "setsid sleep 1000 & exec sleep 1000"])
        child = link.popen("client", ["sleep", "1000"])
        time.sleep(0.2)
        ids = [network_id(pid) for pid in (link._holders["client"], link._holders["origin"], link._helper.pid)]
        assert network_id(child.pid) == ids[0]
    print(json.dumps({"mode": link.mode, "notes": link.notes, "ids": ids, "user": link._user_namespace}), flush=True)
    if sys.argv[1] == "fail":
        raise KeyError("on purpose")
    time.sleep(1000)
"""
# As root without the rights of root: the way of an ordinary user, who makes a user namespace first.
AS_USER = ["setpriv", "--bounding-set", "-sys_admin,-net_admin,-net_raw", "--inh-caps", "-all"]


def interfaces() -> list[str]:
    return sorted(path.name for path in Path("/sys/class/net").iterdir())


def start(how: str, prefix: list[str]) -> tuple[subprocess.Popen[str], dict]:
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", MAKE, how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    line = process.stdout.readline()
    assert line, process.stderr.read()
    return process, json.loads(line)


def gone(ids: list[str]) -> bool:
    deadline = time.monotonic() + 10
    while members(ids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("as_user", [False, True])
@pytest.mark.parametrize("how", ["kill", "fail"])
def test_nothing_is_left_of_a_link(how, as_user):
    if as_user and shutil.which("setpriv") is None:
        pytest.skip("setpriv (util-linux) is not installed")
    before = interfaces()
    process, made = start(how=how, prefix=AS_USER if as_user else [])
    if made["mode"] == "delay only":
        process.kill()
        process.communicate()
        pytest.skip("; ".join(made["notes"]))
    assert made["user"] or not as_user
    assert how == "fail" or len(members(made["ids"])) >= 7
    assert interfaces() == before
    if how == "kill":
        process.send_signal(signal.SIGKILL)
    _, error = process.communicate(timeout=20)
    assert how == "kill" or "on purpose" in error
    assert gone(made["ids"])
    assert interfaces() == before and not list(Path("/run/netns").glob("*"))


def test_without_namespaces_there_is_a_delay_and_it_is_named():
    """A user namespace that may have no network namespaces refuses them as a locked-down machine does."""
    locked = ["unshare", "-Ur", "sh", "-c", 'echo 0 > /proc/sys/user/max_net_namespaces && exec "$@"', "sh"]
    if subprocess.run([*locked, "true"], capture_output=True).returncode:
        pytest.skip("no user namespace to forbid network namespaces in")
    process, made = start(how="fail", prefix=locked)
    process.communicate(timeout=20)
    assert made["mode"] == "delay only"
    assert "network namespaces are refused" in made["notes"][0]


def test_a_process_on_a_link_without_namespaces_ends_with_it():
    with Link(rtt_ms=1, mode="delay only") as link:
        child = link.popen("client", ["sleep", "1000"])
    assert child.returncode == -signal.SIGKILL
