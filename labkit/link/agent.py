"""What ``calibrate`` runs inside each host: sends, counts and echoes datagrams, and names its congestion control.

``python -m labkit.link.agent ADDRESS`` prints its ports (for datagrams, for connections), then answers one line of JSON
after the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
import threading
import time
from statistics import median
from typing import Any

HEADERS = 42
"""Bytes of a datagram's frame that are not payload: Ethernet 14, IPv4 20, UDP 8."""
_FORM = struct.Struct("!cxxxId")
"""Kind, number, time at which it left (CLOCK_MONOTONIC, one clock for all hosts)."""
LEAST_FRAME = _FORM.size + HEADERS
_ASK, _REPLY, _COUNT = b"a", b"r", b"c"
_TICK_S = 0.001
_SO_RCVBUFFORCE = 33
_BUFFER_BYTES = 32 << 20
_TCP_S = 15.0


class Agent:
    """One socket for datagrams, one for connections, each on a free port of ``address``."""

    def __init__(self, address: str) -> None:
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        _widen(self._udp)
        self._udp.bind((address, 0))
        self._tcp = socket.create_server((address, 0))
        self.ports: tuple[int, int] = (self._udp.getsockname()[1], self._tcp.getsockname()[1])
        self._round_trips: list[float] = []
        self._arrivals: list[tuple[float, float, int]] = []
        for loop in (self._receive, self._accept):
            threading.Thread(target=loop, daemon=True).start()

    def _receive(self) -> None:
        while True:
            message, sender = self._udp.recvfrom(2048)
            now = time.monotonic()
            kind, _, sent = _FORM.unpack_from(message)
            if kind == _COUNT:
                self._arrivals.append((now, now - sent, len(message) + HEADERS))
            elif kind == _ASK:
                self._udp.sendto(_REPLY + message[1:], sender)
            else:
                self._round_trips.append(now - sent)

    def _accept(self) -> None:
        """One connection at a time: a line with the congestion control of this end, then an echo."""
        while True:
            connection, _ = self._tcp.accept()
            with connection:
                connection.sendall(_congestion(connection).encode() + b"\n")
                while piece := connection.recv(2048):
                    connection.sendall(piece)

    def answer(self, command: dict[str, Any]) -> Any:
        match command:
            case {"do": "ping", "to": to, "count": count, "wait_s": wait_s}:
                return self._ping(tuple(to), count, wait_s)
            case {"do": "send", "to": to, "count": count, "frame": frame, "per_s": per_s}:
                return self._send(tuple(to), count, frame, per_s)
            case {"do": "arrived", "expected": expected, "wait_s": wait_s}:
                return self._arrived(expected, wait_s)
            case {"do": "converse", "to": to, "count": count}:
                return self._converse(tuple(to), count)
        raise ValueError(f"unknown command {command!r}")

    def _ping(self, to: tuple[str, int], count: int, wait_s: float) -> list[float]:
        """Round trips in seconds of those that came back within ``wait_s`` of the last one."""
        trips: list[float] = []
        self._round_trips = trips
        for number in range(count):
            self._udp.sendto(_FORM.pack(_ASK, number, time.monotonic()), to)
            time.sleep(5 * _TICK_S)
        deadline = time.monotonic() + wait_s
        while len(trips) < count and time.monotonic() < deadline:
            time.sleep(_TICK_S)
        return trips

    def _send(self, to: tuple[str, int], count: int, frame: int, per_s: float) -> int:
        """``count`` frames of ``frame`` bytes, evenly over count / per_s seconds as far as it can. How many."""
        padding = bytes(frame - LEAST_FRAME)
        began, sent = time.monotonic(), 0
        while sent < count:
            now = time.monotonic()
            for _ in range(min(count, int((now - began) * per_s) + 1) - sent):
                self._udp.sendto(_FORM.pack(_COUNT, sent, time.monotonic()) + padding, to)
                sent += 1
            if (wait := began + sent / per_s - time.monotonic()) > 0:
                time.sleep(max(wait, _TICK_S))
        return sent

    def _arrived(self, expected: int, wait_s: float) -> dict[str, float]:
        """What has come: as soon as that is all, after ``wait_s`` at the latest."""
        deadline = time.monotonic() + wait_s
        while len(self._arrivals) < expected and time.monotonic() < deadline:
            time.sleep(_TICK_S)
        arrivals, self._arrivals = self._arrivals, []
        return _summary(arrivals)

    def _converse(self, to: tuple[str, int], count: int) -> dict[str, Any]:
        """Over one connection: the congestion control of both ends, and round trips of ``count`` bytes in seconds."""
        trips: list[float] = []
        with socket.create_connection(to, timeout=_TCP_S) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ends = [_congestion(connection), connection.recv(64).decode().strip()]
            for _ in range(count):
                began = time.monotonic()
                connection.sendall(b".")
                connection.recv(1)
                trips.append(time.monotonic() - began)
        return {"congestion": ends, "round_trips": trips}


def _widen(sock: socket.socket) -> None:
    """What arrives while this process waits for a core must not be lost here; root may have more room than others."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
    except OSError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)


def _congestion(connection: socket.socket) -> str:
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


def _summary(arrivals: list[tuple[float, float, int]]) -> dict[str, float]:
    """Frames, bytes that came after the first and how long that took; the fastest way, and the median of the last third
    of them, in seconds."""
    if len(arrivals) < 2:
        return {"frames": len(arrivals), "bytes_after_first": 0, "took_s": 0.0, "fastest_s": 0.0, "last_s": 0.0}
    ways = [way for _, way, _ in arrivals]
    return {
        "frames": len(arrivals),
        "bytes_after_first": sum(size for _, _, size in arrivals[1:]),
        "took_s": arrivals[-1][0] - arrivals[0][0],
        "fastest_s": min(ways),
        "last_s": median(ways[-max(1, len(ways) // 3) :]),
    }


def main(address: str) -> None:
    with contextlib.suppress(OSError):  # only root may
        os.nice(-10)
    agent = Agent(address)
    print(*agent.ports, flush=True)
    for line in sys.stdin:
        print(json.dumps(agent.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
