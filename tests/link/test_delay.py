from __future__ import annotations

import hashlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from labkit.errors import UserError
from labkit.link import Leg, Link

RTT_S = 0.03


@contextmanager
def server(talk) -> Iterator[int]:
    """A server for one connection in a thread; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            connection, _ = listener.accept()
            with connection:
                talk(connection)

        thread = threading.Thread(target=run)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def link() -> Iterator[Link]:
    with Link(rtt_ms=RTT_S * 1e3, mode="delay only") as made:
        yield made


@pytest.mark.clock
def test_a_byte_comes_back_a_round_trip_later(link):
    def echo(connection: socket.socket) -> None:
        while piece := connection.recv(100):
            connection.sendall(piece)

    with server(echo) as port, socket.create_connection(link.endpoint("origin", port)) as client:
        began = time.monotonic()
        client.sendall(b"1")
        client.recv(1)
        fresh_s = time.monotonic() - began
        trips = []
        for _ in range(10):
            began = time.monotonic()
            client.sendall(b"1")
            client.recv(1)
            trips.append(time.monotonic() - began)
    # A new connection costs a round trip more.
    assert 1.9 * RTT_S < fresh_s < 2 * RTT_S + 0.1
    assert min(trips) >= RTT_S and min(trips) == pytest.approx(RTT_S, abs=0.006)


@pytest.mark.clock
def test_the_delay_may_change(link):
    link.change(Leg(rtt_ms=3 * RTT_S * 1e3))
    assert link.calibrate(0.5).legs[0].rtt_ms == pytest.approx(3 * RTT_S * 1e3, abs=6)
    link.change(Leg(rtt_ms=RTT_S * 1e3))
    assert link.calibrate(0.5).valid


def test_both_ways_are_whole_and_end_one_after_the_other(link):
    data, got = random.Random(3).randbytes(3_000_000), []

    def swallow_then_answer(connection: socket.socket) -> None:
        digest = hashlib.sha256()
        while piece := connection.recv(1 << 16):
            digest.update(piece)
        got.append(digest.hexdigest())
        connection.sendall(data[::-1])

    with server(swallow_then_answer) as port, socket.create_connection(link.endpoint("origin", port)) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        back = b"".join(iter(lambda: client.recv(1 << 16), b""))
    assert got == [hashlib.sha256(data).hexdigest()] and back == data[::-1]


def test_where_nobody_listens_the_client_is_turned_away(link):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with socket.create_connection(link.endpoint("origin", port), timeout=5) as client:
        with pytest.raises(ConnectionResetError):
            client.recv(1)


@pytest.mark.clock
def test_calibration_names_what_cannot_be_had(link):
    calibration = link.calibrate()
    assert calibration.mode == "delay only" and calibration.valid, calibration.reasons()
    assert calibration.legs[0].rtt_ms == pytest.approx(RTT_S * 1e3, rel=0.1)
    with Link(rtt_ms=5, loss=0.01, rate_mbit=10, mode="delay only") as lossy:
        reasons = lossy.calibrate().reasons()
    assert any("loss needs network namespaces" in reason for reason in reasons)
    assert any("a rate needs network namespaces" in reason for reason in reasons)


def test_there_is_no_wire_to_count(link):
    for look in (link.counters, link.probe, link.connections, lambda host: link.pcap("x.pcap", host)):
        with pytest.raises(UserError, match="delay only"):
            look("client")
