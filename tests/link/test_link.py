from __future__ import annotations

import hashlib
import json
import math
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from labkit.errors import UserError
from labkit.link import Leg, Link
from labkit.link.netem import queue_commands
from labkit.probes.wire import WireCounters

# Prints the numbers of the datagrams that came, once none has come for a while.
LISTEN = """
import json, socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
sock.bind((sys.argv[1], 9000)); print("ready", flush=True)
sock.settimeout(10); seen = []
try:
    while True:
        seen.append(int.from_bytes(sock.recv(2000)[:4], "big")); sock.settimeout(0.3)
except TimeoutError:
    print(json.dumps(seen))
"""
# Numbered datagrams of a given size, with a pause after each; prints how long it took to send them.
SEND = """
import socket, sys, time
to, count, size, pause = sys.argv[1], *map(float, sys.argv[2:])
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
began = time.monotonic()
for number in range(int(count)):
    sock.sendto(number.to_bytes(4, "big") + bytes(int(size) - 4), (to, 9000)); time.sleep(pause) if pause else None
print(time.monotonic() - began)
"""
SERVE_BYTES = """
import random, socket, sys
listener = socket.create_server((sys.argv[1], 9001)); print("ready", flush=True)
connection, _ = listener.accept()
connection.sendall(random.Random(7).randbytes(int(sys.argv[2])))
connection.shutdown(socket.SHUT_WR); connection.recv(1); connection.close()
"""
FETCH = """
import hashlib, socket, sys
connection = socket.create_connection((sys.argv[1], 9001)); digest = hashlib.sha256()
while piece := connection.recv(1 << 16): digest.update(piece)
print(digest.hexdigest(), flush=True); input()
"""
ECHO = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); sock.bind((sys.argv[1], 9002)); print("ready", flush=True)
while True: sock.sendto(*sock.recvfrom(100))
"""
PING = """
import socket, sys, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); trips = []
for _ in range(9):
    began = time.monotonic(); sock.sendto(b".", (sys.argv[1], 9002)); sock.recv(10)
    trips.append(time.monotonic() - began)
print(min(trips) * 1e3)
"""


@pytest.fixture
def flood(python_in):
    """Sends from client to origin: the numbers of those that came, and the seconds in which they were sent."""

    def send(link: Link, count: int, size: int, pause: float = 0.0) -> tuple[list[int], float]:
        listener = python_in(link, "origin", LISTEN, link.address("origin"), wait=False)
        took_s = float(python_in(link, "client", SEND, link.address("origin"), count, size, pause))
        return json.loads(listener.communicate(timeout=30)[0]), took_s

    return send


@pytest.mark.clock
def test_a_link_is_what_was_asked_for_and_calibration_says_when_it_is_not(open_link):
    with open_link(rtt_ms=30, loss=0.05, rate_mbit=20, buffer_kb=30) as link:
        for _ in range(3):  # a link on a crowded machine is off, and says so
            calibration = link.calibrate(seconds=0.8)
            if calibration.valid:
                break
        (leg,) = calibration.legs
        assert leg.rtt_ms == pytest.approx(30, rel=0.1)
        low, high = leg.loss_interval()
        assert low < 0.05 < high and leg.sent > 2000
        for each in leg.directions:
            assert each.rate_mbit == pytest.approx(20, rel=0.1)
            assert each.buffer_kb == pytest.approx(30, abs=4)
        assert calibration.congestion == ("cubic", "cubic")
        assert calibration.valid, calibration.reasons()
        link.legs = (Leg(rtt_ms=40, loss=0.01, rate_mbit=25, buffer_kb=60),)
        reasons = link.calibrate(seconds=0.6).reasons()
    for word in ("RTT", "loss", "Mbit/s for 25", "buffer"):
        assert any(word in reason for reason in reasons), (word, reasons)


def test_the_seed_decides_which_packets_are_lost(open_link, flood):
    with open_link(rtt_ms=2, loss=0.1, seed=5, mode="relay") as link:
        arrived, _ = flood(link, 300, 100, pause=0.0003)
        chance = random.Random("5/0/0")
        assert arrived == [number for number in range(300) if chance.random() >= 0.1]
        link.reseed(6)
        other, _ = flood(link, 300, 100, pause=0.0003)
        chance = random.Random("6/0/0")
        assert other == [number for number in range(300) if chance.random() >= 0.1]


def test_a_drop_tail_buffer_overflows_where_arithmetic_says(open_link, flood):
    frame, buffer_kb, rate_mbit = 1042, 30, 8
    with open_link(rtt_ms=2, rate_mbit=rate_mbit, buffer_kb=buffer_kb) as link:
        before = link.counters("origin")
        arrived, took_s = flood(link, 150, frame - 42)
        grown = link.counters("origin") - before
        counts = link.relayed()
    fits = buffer_kb * 1000 / frame
    # While the burst is sent the queue is emptied as well; a crowded machine may take long over it.
    most = (buffer_kb * 1000 + rate_mbit * 1e6 / 8 * took_s) / frame
    assert math.floor(fits) <= len(arrived) <= min(150, math.ceil(most) + 2)
    assert len(arrived) == 150 or arrived[: math.floor(fits)] == list(range(math.floor(fits)))
    assert grown.packets_received == len(arrived) and grown.bytes_received == len(arrived) * frame
    if counts:
        assert counts[0].overflowed == 150 - len(arrived) and counts[0].missed == 0


def test_a_transfer_over_a_lossy_link_is_whole_and_counted(tmp_path, open_link, python_in):
    size = 600_000
    with open_link(rtt_ms=4, loss=0.02, seed=1, congestion="reno") as link, link.pcap(tmp_path / "client.pcap"):
        before = {host: link.counters(host) for host in link.hosts}
        python_in(link, "origin", SERVE_BYTES, link.address("origin"), size, wait=False)
        command = [sys.executable, "-c", FETCH, link.address("origin")]
        client = link.popen("client", command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        digest = client.stdout.readline().strip()
        states = link.connections("client")
        client.communicate("\n", timeout=20)
        grown = {host: now - before[host] for host, now in settled(link).items()}
        lost = link.relayed()[1].lost if link.mode == "relay" else None
    assert digest == hashlib.sha256(random.Random(7).randbytes(size)).hexdigest()
    client, origin = grown["client"], grown["origin"]
    assert (client.connections_opened, origin.connections_accepted) == (1, 1)
    # 1,448 bytes fit into a segment of a 1,500-byte packet with time stamps, and each has 66 bytes of headers.
    segments = math.ceil(size / 1448)
    assert size + 66 * segments <= client.bytes_received <= (size + 66 * segments) * 1.1
    assert origin.bytes_sent > client.bytes_received
    assert origin.packets_sent == origin.segments_sent + origin.segments_retransmitted
    if lost is not None:
        assert origin.packets_sent - client.packets_received == lost
        # What is lost is sent again, but for bare acknowledgements; a few are sent again without need.
        assert lost - 3 <= origin.segments_retransmitted <= 2 * lost + 10 and lost > 2
    assert [state.congestion for state in states] in (["reno"], [])
    frames = list(packets(tmp_path / "client.pcap"))
    assert len(frames) == client.packets_sent + client.packets_received
    assert sum(map(len, frames)) == client.bytes_sent + client.bytes_received


def settled(link: Link, quiet_s: float = 1.0, limit_s: float = 15.0) -> dict[str, WireCounters]:
    """The counters of all hosts once nothing has come or gone for a while: what ends a connection takes a time to
    cross, and longer where it is lost and sent again."""
    began, found = time.monotonic(), None
    while (now := {host: link.counters(host) for host in link.hosts}) != found:
        assert time.monotonic() - began < limit_s, f"still on the way: {now}"
        found = now
        time.sleep(quiet_s)
    return now


def packets(path: Path):
    """The frames of a pcap file."""
    data = path.read_bytes()
    magic, major, minor, _, _, _, network = struct.unpack_from("=IHHiIII", data)
    assert (magic, major, minor, network) == (0xA1B23C4D, 2, 4, 1)
    at = 24
    while at < len(data):
        _, nanoseconds, kept, length = struct.unpack_from("=IIII", data, at)
        assert kept == length and nanoseconds < 10**9
        yield data[at + 16 : at + 16 + kept]
        at += 16 + kept


@pytest.mark.clock
def test_the_wire_may_change_under_a_server_that_stays(open_link, flood, python_in):
    with open_link(rtt_ms=2, congestion="cubic", mode="relay") as link:
        python_in(link, "origin", ECHO, link.address("origin"), wait=False)
        near = float(python_in(link, "client", PING, link.address("origin")))
        before, loss = link.relayed(), 0.3
        link.change(Leg(rtt_ms=30), congestion="reno")
        far = float(python_in(link, "client", PING, link.address("origin")))
        assert link.calibrate(0.6).congestion == ("reno", "reno")
        assert (near, far) == (pytest.approx(2, abs=2), pytest.approx(30, abs=3))
        link.change(Leg(rtt_ms=2, loss=loss))
        arrived, _ = flood(link, 300, 100, pause=0.0003)
        chance = random.Random("0/0/0")
        assert arrived == [number for number in range(300) if chance.random() >= loss]
        grown = link.relayed()[0] - before[0]
        assert grown.lost == 300 - len(arrived) and grown.delivered > 300  # the counts of all relays there were


@pytest.mark.clock
def test_an_edge_lies_between_client_and_origin(open_link, python_in):
    with open_link(rtt_ms=30, hosts=("client", "edge", "origin"), origin_leg=Leg(rtt_ms=6)) as link:
        for host in ("edge", "origin"):
            python_in(link, host, ECHO, link.address(host), wait=False)
        trips = {
            (source, target): float(python_in(link, source, PING, link.address(target)))
            for source, target in (("client", "edge"), ("edge", "origin"), ("client", "origin"))
        }
    assert trips["client", "edge"] == pytest.approx(30, abs=3)
    assert trips["edge", "origin"] == pytest.approx(6, abs=3)
    assert trips["client", "origin"] == pytest.approx(36, abs=4)


def test_tc_understands_what_is_asked_of_netem_and_tbf(open_link):
    leg = Leg(rtt_ms=40, loss=0.01, rate_mbit=10, buffer_kb=64)
    with open_link(rtt_ms=0) as link:
        netem, tbf = queue_commands("eth0", leg, None)
        asked = link.popen("client", ["tc", *netem], stderr=subprocess.PIPE, text=True)
        complaint = asked.communicate(timeout=10)[1]
        assert asked.returncode == 0 or "qdisc kind is unknown" in complaint
        if asked.returncode:  # a kernel without netem: tbf alone
            tbf = [word for word in tbf if word != "1:1"]
            tbf[tbf.index("parent")] = "root"
        assert link.popen("client", ["tc", *tbf]).wait(10) == 0
        shown = link.popen("client", ["tc", "qdisc", "show", "dev", "eth0"], stdout=subprocess.PIPE, text=True)
        assert "rate 10Mbit" in shown.communicate(timeout=10)[0]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"hosts": ("a", "b")}, "hosts must be"),
        ({"hosts": ("client", "edge", "origin")}, "origin_leg"),
        ({"origin_leg": Leg()}, "origin_leg"),
        ({"mode": "magic"}, "mode must be"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_link_that_cannot_be_is_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        Link(**wrong)


def test_what_is_unknown_is_named(open_link):
    with pytest.raises(UserError, match="congestion control 'vegetable'"), Link(congestion="vegetable"):
        pass
    with pytest.raises(RuntimeError, match="not open"):
        Link().address("client")
    with open_link(rtt_ms=0) as link:
        with pytest.raises(UserError, match="client, origin"):
            link.address("edge")
        with pytest.raises(UserError, match="no program"):
            link.popen("client", ["no-such-program"])
