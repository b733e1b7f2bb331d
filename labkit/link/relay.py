"""One direction of a leg in Python: delay, rate, drop-tail buffer and seeded loss between two interfaces.

The kernel stamps every frame as it comes and puts it into a ring that this process shares with it (``PACKET_RX_RING``,
linux/Documentation/networking/packet_mmap.rst); frames leave through a second packet socket. A frame waits in the
queue, may be lost after it, and arrives at the other host half a round trip later: loss is the receiver's, as on a
real path, for what the sender's own kernel drops it sends again at once.

How much the relay carries depends on the machine: `labkit link --rtt-ms 0` shows it, ``Link.calibrate`` measures it
and ``Link.kept_up`` says of a run whether frames were missed or came late. On two cores that sender and receiver
share, full frames passed at 550 to 650 Mbit/s one way; 15,000 frames of 150 bytes a second each way were 0.2 ms late
on average and 25,000 were 13 ms late.
"""

from __future__ import annotations

import collections
import contextlib
import mmap
import os
import random
import select
import socket
import struct
import time
from dataclasses import dataclass

from labkit.link.leg import Leg
from labkit.link.namespaces import wake_on_time

_SOL_PACKET = 263
_PACKET_RX_RING, _PACKET_STATISTICS, _PACKET_VERSION = 5, 6, 10
_PACKET_QDISC_BYPASS, _PACKET_IGNORE_OUTGOING = 20, 23
_TPACKET_V2 = 1
_ETH_P_ALL = 3
_TO_USER = 1

_SLOT_BYTES, _BLOCK_BYTES, _BLOCKS = 2048, 1 << 16, 256
_SLOTS = _BLOCKS * _BLOCK_BYTES // _SLOT_BYTES
_BATCH = 64
_MOST_HELD_BYTES = 256 << 20
_IDLE_S = 0.05

LATE_BUCKETS = 24
COUNTS = ("received", "delivered", "lost", "overflowed", "missed", "delivered_bytes", "late_sum_us", "late_max_us")
TALLY_WORDS = len(COUNTS) + LATE_BUCKETS + 1
"""The numbers that a relay shares with the process that started it: COUNTS, lateness by powers of two, the seed."""
_SEED_WORD = TALLY_WORDS - 1


class DropTail:
    """A queue of ``buffer_bytes`` that is emptied at ``rate_mbit``; a frame that does not fit is lost.

    The queue is a fluid: the frame that is being sent takes room in proportion to what is left of it.
    """

    def __init__(self, rate_mbit: float, buffer_bytes: int) -> None:
        self._bytes_per_s = rate_mbit * 1e6 / 8
        self._buffer_bytes = buffer_bytes
        self._free_at = float("-inf")

    def admit(self, at: float, size: int) -> float | None:
        """When the last byte of a frame of ``size`` bytes that comes at ``at`` has left; None if it overflowed."""
        begins = max(at, self._free_at)
        if (begins - at) * self._bytes_per_s + size > self._buffer_bytes:
            return None
        self._free_at = begins + size / self._bytes_per_s
        return self._free_at


@dataclass(frozen=True)
class RelayCount:
    """What one direction of the relay has done with frames since it began; the difference of two is a stretch of it."""

    direction: str
    received: int
    delivered: int
    lost: int
    """Thrown away by the dice."""
    overflowed: int
    """Did not fit into the drop-tail buffer."""
    missed: int
    """Lost because the relay could not keep up: nobody asked for it."""
    delivered_bytes: int
    late_sum_us: int
    late_max_us: int
    """Latest since the relay began, in a difference too."""
    late_us: tuple[int, ...]
    """Element k: frames that left less than 2^k µs after they should have, and 2^(k−1) or more."""

    def __sub__(self, earlier: RelayCount) -> RelayCount:
        grown = {name: getattr(self, name) - getattr(earlier, name) for name in COUNTS[:-1]}
        late = tuple(now - then for now, then in zip(self.late_us, earlier.late_us, strict=True))
        return RelayCount(self.direction, **grown, late_max_us=self.late_max_us, late_us=late)

    @property
    def late_mean_ms(self) -> float:
        return self.late_sum_us / self.delivered / 1e3 if self.delivered else 0.0

    def late_ms(self, share: float) -> float:
        """At most so late were this share of the frames (the upper edge of a bucket); 0 without frames."""
        below = 0
        for power, frames in enumerate(self.late_us):
            below += frames
            if below and below >= share * sum(self.late_us):
                return 2**power / 1e3
        return 0.0


def read_count(direction: str, words: list[int]) -> RelayCount:
    """``words``: the TALLY_WORDS numbers of a relay."""
    counts = dict(zip(COUNTS, words, strict=False))
    return RelayCount(direction, **counts, late_us=tuple(words[len(COUNTS) : _SEED_WORD]))


def reseed(words: memoryview, seed: int) -> None:
    words[_SEED_WORD] = seed


def dice(seed: int, leg: int, direction: int) -> random.Random:
    """Decides of the frames of one direction, in the order in which they leave the queue."""
    return random.Random(f"{seed}/{leg}/{direction}")


class Ring:
    """Frames that arrive at one interface, with the time at which the kernel saw them."""

    def __init__(self, interface: str) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.socket.setsockopt(_SOL_PACKET, _PACKET_VERSION, _TPACKET_V2)
        self.socket.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        ring = struct.pack("IIII", _BLOCK_BYTES, _BLOCKS, _SLOT_BYTES, _SLOTS)
        self.socket.setsockopt(_SOL_PACKET, _PACKET_RX_RING, ring)
        self._memory = memoryview(mmap.mmap(self.socket.fileno(), _BLOCKS * _BLOCK_BYTES))
        self._status = self._memory.cast("I")
        self._slot = 0
        self.socket.bind((interface, _ETH_P_ALL))

    def take(self, most: int) -> list[tuple[float, bytes]]:
        """Up to ``most`` frames that are there, each with its arrival by ``time.time()``."""
        frames = []
        memory, status, slot = self._memory, self._status, self._slot
        for _ in range(most):
            word = slot * (_SLOT_BYTES // 4)
            if not status[word] & _TO_USER:
                break
            start = slot * _SLOT_BYTES
            # struct tpacket2_hdr: status, length, captured length, offset of the frame (16 bits), seconds, nanoseconds
            begin = start + (status[word + 3] & 0xFFFF)
            frames.append((status[word + 4] + status[word + 5] * 1e-9, bytes(memory[begin : begin + status[word + 2]])))
            status[word] = 0
            slot = slot + 1 if slot + 1 < _SLOTS else 0
        self._slot = slot
        return frames

    def missed(self) -> int:
        """Frames for which the ring had no room since the last call."""
        _, dropped = struct.unpack("II", self.socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        return int(dropped)


def forward(source: str, target: str, leg: Leg, seed: int, place: tuple[int, int], words: memoryview) -> None:
    """Carries what arrives at ``source`` to ``target`` for ever. ``place``: number of the leg and of the direction."""
    wake_on_time()
    ring, out = Ring(source), _sender(target)
    queue = None if leg.rate_mbit is None else DropTail(leg.rate_mbit, leg.buffer_bytes or 0)
    reseed(words, seed)
    chance, loss, delay_s, now_seed = dice(seed, *place), leg.loss, leg.one_way_s, seed
    line: collections.deque[tuple[float, bytes]] = collections.deque()
    held, next_look, clock = 0, 0.0, time.monotonic
    while True:
        now = clock()
        wait = min(line[0][0] - now if line else _IDLE_S, _IDLE_S)
        if wait > 0:
            select.select([ring.socket], [], [], wait)
        if words[_SEED_WORD] != now_seed:
            now_seed = words[_SEED_WORD]
            chance = dice(now_seed, *place)
        now, ahead = clock(), time.time()
        for stamp, frame in ring.take(_BATCH):
            words[0] += 1
            # The kernel stamps with the wall clock, which may be set at any time; the age of a frame is short.
            came = now - min(max(ahead - stamp, 0.0), 1.0)
            leaves = came if queue is None else queue.admit(came, len(frame))
            if leaves is None:
                words[3] += 1
            elif loss and chance.random() < loss:
                words[2] += 1
            elif held + len(frame) > _MOST_HELD_BYTES:
                words[4] += 1
            else:
                line.append((leaves + delay_s, frame))
                held += len(frame)
        now = clock()
        while line and line[0][0] <= now:
            due, frame = line.popleft()
            held -= len(frame)
            _deliver(out, frame, int((now - due) * 1e6), words)
        if now >= next_look:
            words[4] += ring.missed()
            next_look = now + _IDLE_S


def _sender(interface: str) -> socket.socket:
    out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    out.setsockopt(_SOL_PACKET, _PACKET_QDISC_BYPASS, 1)
    out.bind((interface, 0))
    return out


def _deliver(out: socket.socket, frame: bytes, late_us: int, words: memoryview) -> None:
    try:
        out.send(frame)
    except OSError:  # the interface's own queue is full
        words[4] += 1
        return
    words[1] += 1
    words[5] += len(frame)
    words[6] += late_us
    if late_us > words[7]:
        words[7] = late_us
    words[len(COUNTS) + min(late_us.bit_length(), LATE_BUCKETS - 1)] += 1


def raise_priority() -> None:
    """A relay that waits for a core delays packets, so it goes before what is measured; allowed to root only, and what
    it was worth shows in how late frames are."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError:
        with contextlib.suppress(OSError):
            os.nice(-10)
