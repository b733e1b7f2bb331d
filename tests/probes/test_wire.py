from __future__ import annotations

import socket
import struct

import psutil
import pytest

from labkit.probes.wire import WireProbe, parse_connections, parse_wire, read_wire

DEV = """Inter-|   Receive                                     |  Transmit
 face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier compressed
    lo:  999       9    0    0    0     0          0         0      999       9    0    0    0     0       0          0
  eth0: 1000      10    1    0    0     0          0         0     2000      20    0    0    0     0       0          0
  eth1:5          1    0    0    0     0          0         0        7       2    0    0    0     0       0          0
"""
SNMP = """Ip: Forwarding DefaultTTL
Ip: 1 64
Tcp: RtoAlgorithm MaxConn ActiveOpens PassiveOpens InSegs OutSegs RetransSegs OutRsts
Tcp: 1 -1 3 4 50 60 6 2
"""
NETSTAT = "TcpExt: SyncookiesSent TCPTimeouts\nTcpExt: 0 5\nIpExt: InNoRoutes\nIpExt: 0\n"
# As ss 6.1 prints it, in a namespace: a connection that has lost segments, and one that has hardly done anything.
SS = (
    "0      1448   10.77.0.2:9001 10.77.0.1:40000\n"
    "\t ts sack cubic wscale:7,7 rto:244 rtt:41.5/3.2 ato:40 mss:1448 cwnd:17 ssthresh:12 bytes_sent:900000"
    " bytes_retrans:14480 bytes_acked:880001 bytes_received:77 segs_out:640 segs_in:320 send 4.7Mbps lastsnd:8"
    " retrans:2/10 dsack_dups:1 minrtt:40.1\n"
    "0      0      [::ffff:10.77.0.2]:9001 [::ffff:10.77.0.1]:40002\n"
    "\t bbr wscale:7,7 rto:204 rtt:0.5/0.2 mss:1448 cwnd:10 bbr:(bw:1Mbps,mrtt:0.4) segs_in:2\n"
)


def test_counters_come_from_their_columns_and_leave_loopback_out():
    counters = parse_wire(DEV, SNMP, NETSTAT)
    assert (counters.bytes_sent, counters.bytes_received) == (2007, 1005)
    assert (counters.packets_sent, counters.packets_received) == (22, 11)
    assert (counters.segments_sent, counters.segments_received, counters.segments_retransmitted) == (60, 50, 6)
    assert (counters.connections_opened, counters.connections_accepted, counters.resets_sent) == (3, 4, 2)
    assert counters.timeouts == 5
    assert counters.retransmitted_share == pytest.approx(6 / 66)
    assert (counters - counters).bytes_sent == 0


def test_connections_are_read_from_ss():
    first, second = parse_connections(SS)
    assert (first.local, first.peer, first.congestion) == ("10.77.0.2:9001", "10.77.0.1:40000", "cubic")
    assert (first.rtt_ms, first.window_segments) == (41.5, 17)
    assert (first.bytes_sent, first.bytes_retransmitted, first.bytes_received) == (900_000, 14_480, 77)
    assert first.segments_retransmitted == 10
    assert (second.congestion, second.bytes_sent, second.segments_retransmitted) == ("bbr", 0, 0)
    assert parse_connections("") == []


def test_a_connection_that_is_opened_counts_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        before = read_wire()
        clients = [socket.create_connection(server.getsockname()) for _ in range(40)]
        for each in clients:
            accepted, _ = server.accept()
            # Closed with a reset, so that nothing waits for the peer.
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            accepted.close()
            each.close()
        grown = read_wire() - before
    # Others may use the network of this machine meanwhile.
    assert 40 <= grown.connections_opened < 80 and 40 <= grown.connections_accepted < 80
    assert grown.resets_sent >= 40 and grown.segments_sent >= 120


def test_bytes_agree_with_psutil():
    peer = {name: io for name, io in psutil.net_io_counters(pernic=True).items() if name != "lo"}
    ours = read_wire()
    later = {name: io for name, io in psutil.net_io_counters(pernic=True).items() if name != "lo"}
    assert sum(io.bytes_sent for io in peer.values()) <= ours.bytes_sent
    assert ours.bytes_sent <= sum(io.bytes_sent for io in later.values())
    assert sum(io.packets_recv for io in peer.values()) <= ours.packets_received
    assert ours.packets_received <= sum(io.packets_recv for io in later.values())


def test_the_probe_gives_every_counter_and_nothing_for_a_process_that_is_gone():
    reading = WireProbe().read()
    assert reading["segments_sent"] > 0 and "retransmitted_share" not in reading
    assert WireProbe(2**22 + 1).read() == {}
