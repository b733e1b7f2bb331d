"""The wire as the kernel counts it: bytes, segments, retransmissions and connections of one network namespace.

Counters come from ``/proc/PID/net`` (``dev``, ``snmp``, ``netstat``; man 5 proc_pid_net, RFC 1213 and RFC 4022 for the
names), which shows the namespace of that process; details of single connections from ``ss -tin`` (man 8 ss).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

_COLUMNS = {"bytes_sent": 8, "bytes_received": 0, "packets_sent": 9, "packets_received": 1}
"""Where a line of ``dev`` has them, counted after the colon."""


@dataclass(frozen=True)
class WireCounters:
    """Totals since the namespace was made; the difference of two is what happened between them.

    Bytes and packets are those of all interfaces but loopback, Ethernet headers of 14 bytes included. Where offloads
    are on, a "packet" may be 64 KiB that the card cuts up, and bytes lack the headers of what it is cut into; inside
    ``labkit.link`` they are off. Segments are TCP's own, loopback included.
    """

    bytes_sent: int
    bytes_received: int
    packets_sent: int
    packets_received: int
    segments_sent: int
    """First transmissions, acknowledgements too."""
    segments_received: int
    segments_retransmitted: int
    """Not part of ``segments_sent``."""
    timeouts: int
    """Retransmission timers that ran out: a stream stood still for 200 ms or more."""
    connections_opened: int
    """By this host; one that failed counts too."""
    connections_accepted: int
    resets_sent: int

    def __sub__(self, earlier: WireCounters) -> WireCounters:
        return WireCounters(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})

    @property
    def retransmitted_share(self) -> float:
        """Retransmitted segments of all that left; NaN if none did."""
        left = self.segments_sent + self.segments_retransmitted
        return self.segments_retransmitted / left if left else float("nan")


def read_wire(pid: int | str = "self") -> WireCounters:
    """The counters of the network namespace that process ``pid`` is in. Raises OSError when it is gone."""
    net = Path(f"/proc/{pid}/net")
    return parse_wire((net / "dev").read_text(), (net / "snmp").read_text(), (net / "netstat").read_text())


def parse_wire(dev: str, snmp: str, netstat: str) -> WireCounters:
    """From the text of the three files."""
    traffic = dict.fromkeys(_COLUMNS, 0)
    for line in dev.splitlines()[2:]:
        interface, _, numbers = line.partition(":")
        if interface.strip() != "lo":
            values = [int(number) for number in numbers.split()]
            for name, column in _COLUMNS.items():
                traffic[name] += values[column]
    tcp, extended = _paired(snmp, "Tcp"), _paired(netstat, "TcpExt")
    return WireCounters(
        **traffic,
        segments_sent=tcp["OutSegs"],
        segments_received=tcp["InSegs"],
        segments_retransmitted=tcp["RetransSegs"],
        timeouts=extended.get("TCPTimeouts", 0),
        connections_opened=tcp["ActiveOpens"],
        connections_accepted=tcp["PassiveOpens"],
        resets_sent=tcp["OutRsts"],
    )


def _paired(text: str, family: str) -> dict[str, int]:
    """The kernel's pairs of lines, "Tcp: name name …" and "Tcp: 1 2 …"."""
    names, values = (line.split()[1:] for line in text.splitlines() if line.startswith(f"{family}:"))
    return dict(zip(names, map(int, values), strict=True))


class WireProbe:
    """Reads ``WireCounters`` of the namespace of a process at the rate of a ``Sampler``, one series a counter."""

    def __init__(self, pid: int | str = "self", name: str = "wire") -> None:
        self.name = name
        self.description = f"/proc/{pid}/net: dev, snmp, netstat"
        self._pid = pid

    def read(self) -> Mapping[str, float]:
        """Empty once the process is gone."""
        try:
            counters = read_wire(self._pid)
        except OSError:
            return {}
        return {f.name: float(getattr(counters, f.name)) for f in fields(counters)}


@dataclass(frozen=True)
class ConnectionState:
    """One established TCP connection of ``ss -tin``."""

    local: str
    """address:port"""
    peer: str
    congestion: str
    """Congestion control, such as cubic; empty if ss names none."""
    rtt_ms: float
    """Smoothed, as this end sees it."""
    window_segments: int
    """Congestion window."""
    bytes_sent: int
    """Retransmissions included."""
    bytes_retransmitted: int
    bytes_received: int
    segments_retransmitted: int


def parse_connections(text: str) -> list[ConnectionState]:
    """From what ``ss -Htin state established`` prints: two lines a connection, the second indented.

    What a connection has not done yet is left out by ss, and is 0 here.
    """
    found, lines = [], text.splitlines()
    for first, second in zip(lines, lines[1:], strict=False):
        if first[:1].isspace() or not second[:1].isspace():
            continue
        local, peer = first.split()[-2:]
        words = dict(re.findall(r"(\w+):([0-9.]+)", second))
        retransmitted = re.search(r"\bretrans:\d+/(\d+)", second)
        kind = re.search(r"^\s+(?:(?:ts|sack|ecn|ecnseen|fastopen)\s+)*([a-z]\w*)\s", second)
        found.append(
            ConnectionState(
                local,
                peer,
                congestion=kind[1] if kind else "",
                rtt_ms=float(words.get("rtt", 0)),
                window_segments=int(words.get("cwnd", 0)),
                bytes_sent=int(words.get("bytes_sent", 0)),
                bytes_retransmitted=int(words.get("bytes_retrans", 0)),
                bytes_received=int(words.get("bytes_received", 0)),
                segments_retransmitted=int(retransmitted[1]) if retransmitted else 0,
            )
        )
    return found
