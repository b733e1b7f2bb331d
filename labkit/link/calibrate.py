"""Does a link do what was asked of it? Measured from inside its hosts, by datagrams counted at both ends."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from labkit.errors import UserError
from labkit.link.agent import LEAST_FRAME
from labkit.link.leg import FRAME_BYTES, Leg
from labkit.link.relay import RelayCount

if TYPE_CHECKING:
    from labkit.link.link import Link

MOST_OFF = 0.10
"""A run over a link that is off by more than this share of what was asked for gives no verdict."""
_PINGS = 40
_LONG_S = 1.0
"""A shorter calibration sends half the pings, and does not find out what an unlimited link could carry: that decides
nothing."""
_CONFIDENCE = 0.99
_SMALL_FRAMES_PER_S = 8000.0
_MOST_FRAMES_PER_S = 80_000.0
"""More than any relay in Python carries: a burst of these shows what the machine can."""
_LEAST_COUNTED, _LEAST_BURST = 200, 60
_OVERLOAD = 1.5


@dataclass(frozen=True)
class DirectionCalibration:
    """One direction of a leg. NaN: was not measured."""

    direction: str
    sent: int
    """Datagrams of which the loss was counted."""
    lost: int
    rate_mbit: float
    """Of frames that came through in a burst that was faster than the link, those lost by chance added; without a
    limit, what this machine carried of full frames."""
    buffer_kb: float
    """Wait in the full queue, in bytes at the measured rate; NaN if the burst was too short to fill the buffer."""

    @property
    def loss(self) -> float:
        return self.lost / self.sent if self.sent else math.nan


@dataclass(frozen=True)
class LegCalibration:
    """A leg as measured beside what was asked for."""

    name: str
    nominal: Leg
    rtt_ms: float
    """Lower quartile of the pings that came back: a crowded host's own delay comes on top and is not the link's; what
    the relay adds is counted by itself."""
    directions: tuple[DirectionCalibration, ...]

    @property
    def sent(self) -> int:
        return sum(each.sent for each in self.directions)

    @property
    def lost(self) -> int:
        return sum(each.lost for each in self.directions)

    def loss_interval(self) -> tuple[float, float]:
        """Wilson's interval of both directions together, at 99 %."""
        return wilson(self.lost, self.sent)

    def reasons(self) -> list[str]:
        """Why this leg is not the one that was asked for; empty if it is."""
        found, asked = [], self.nominal
        if math.isnan(self.rtt_ms) or (asked.rtt_ms and _off(self.rtt_ms, asked.rtt_ms)):
            found.append(f"{self.name}: RTT {self.rtt_ms:.3g} ms for {asked.rtt_ms:g} ms")
        if not self.directions:
            return found
        low, high = self.loss_interval()
        # A share that is counted has an interval. Off is what cannot be within 10 % of the nominal by chance.
        if low > asked.loss * (1 + MOST_OFF) or high < asked.loss * (1 - MOST_OFF):
            found.append(f"{self.name}: loss {self.lost} of {self.sent} for {asked.loss:.3g} ({low:.3g} to {high:.3g})")
        for each in self.directions:
            if asked.rate_mbit is not None and _off(each.rate_mbit, asked.rate_mbit):
                found.append(f"{each.direction}: {each.rate_mbit:.3g} Mbit/s for {asked.rate_mbit:g}")
            if asked.buffer_bytes is not None and _off(
                each.buffer_kb, asked.buffer_bytes / 1e3, slack=FRAME_BYTES / 1e3
            ):
                found.append(f"{each.direction}: buffer {each.buffer_kb:.3g} kB for {asked.buffer_bytes / 1e3:.3g}")
        return found


@dataclass(frozen=True)
class Calibration:
    """What a link was measured to be, before a run over it."""

    mode: str
    legs: tuple[LegCalibration, ...]
    asked: tuple[Leg, ...]
    congestion: tuple[str, ...]
    """Congestion control of the client's and the origin's end of a connection."""
    asked_congestion: str | None
    relay: tuple[RelayCount, ...] = ()
    """What the relay did during the calibration."""
    notes: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        """Within 10 % of what was asked for; only then does a run over the link give a verdict."""
        return not self.reasons()

    def reasons(self) -> list[str]:
        """Why not."""
        found = [reason for leg in self.legs for reason in leg.reasons()]
        if self.mode == "delay only":
            why = "; ".join(self.notes)
            found += ["loss needs network namespaces: " + why] if any(leg.loss for leg in self.asked) else []
            found += ["a rate needs network namespaces: " + why] if any(leg.rate_mbit for leg in self.asked) else []
            return found
        if self.asked_congestion is not None and set(self.congestion) != {self.asked_congestion}:
            found.append(f"congestion control {' and '.join(self.congestion)} for {self.asked_congestion}")
        # The burst over a leg without a rate is there to find out what the relay cannot carry.
        limited = {each.direction for leg in self.legs for each in leg.directions if leg.nominal.rate_mbit is not None}
        return found + relay_reasons([count for count in self.relay if count.direction in limited], self.asked)


def relay_reasons(counts: Sequence[RelayCount], legs: Sequence[Leg]) -> list[str]:
    """Why what the relay did is not what was asked for: frames that it missed, or sent too late for the round trip."""
    rtt_ms = sum(leg.rtt_ms for leg in legs)
    missed, late_ms = sum(count.missed for count in counts), sum(count.late_mean_ms for count in counts)
    found = [f"the relay missed {missed} frames: this machine does not keep up"] if missed else []
    if rtt_ms and late_ms > MOST_OFF * rtt_ms:
        found.append(
            f"the relay is {late_ms:.2g} ms a round trip late for {rtt_ms:g} ms: this machine does not keep up"
        )
    return found


def calibrate(link: Link, seconds: float) -> Calibration:
    """Measures every leg of an open link, in about ``seconds`` and a few round trips; see ``Link.calibrate``.

    A share is counted with its interval: over 3 s of a link of one leg some 24,000 datagrams show a loss of 1 % to
    within 0.17 points at 99 %. Raises UserError for less than half a second.
    """
    if not 0.5 <= seconds <= 120:
        raise UserError(f"a calibration takes between 0.5 and 120 seconds, got {seconds!r}")
    before = link.relayed()
    with contextlib.ExitStack() as stack:
        with ThreadPoolExecutor(len(link.hosts)) as threads:
            entered = threads.map(stack.enter_context, [_agent(link, host) for host in link.hosts])
            agents = dict(zip(link.hosts, entered, strict=True))
        if link.mode == "delay only":
            return _delay_only(link, agents)
        first, last = agents[link.hosts[0]], agents[link.hosts[-1]]
        spoken = first.ask({"do": "converse", "to": last.listening, "count": 0})["congestion"]
        legs = tuple(
            _measure(leg, near, far, seconds / len(link.legs), lost_in_rate=link.mode == "relay")
            for leg, near, far in zip(link.legs, agents.values(), list(agents.values())[1:], strict=False)
        )
    relay = tuple(now - then for now, then in zip(link.relayed(), before, strict=True))
    link.reseed(link.seed)
    return Calibration(str(link.mode), legs, link.legs, tuple(spoken), link.congestion, relay, tuple(link.notes))


class _Remote:
    """An ``agent`` in a host, spoken to through its pipes: commands do not cross the link."""

    def __init__(self, link: Link, host: str) -> None:
        command = [sys.executable, "-m", "labkit.link.agent", link.address(host)]
        self.host = host
        self.process = link.popen(host, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None and self.process.stdout is not None
        self._commands, self._answers = self.process.stdin, self.process.stdout
        self._turn = threading.Lock()
        datagrams, connections = map(int, self._line().split())
        self.address = (link.address(host), datagrams)
        self.listening = (link.address(host), connections)

    def ask(self, command: dict[str, Any]) -> Any:
        with self._turn:  # both directions at once are two who ask
            self._commands.write(json.dumps(command) + "\n")
            self._commands.flush()
            return json.loads(self._line())

    def _line(self) -> str:
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"the calibration's process on the {self.host} ended; its error is above")
        return str(line)


@contextlib.contextmanager
def _agent(link: Link, host: str) -> Iterator[_Remote]:
    remote = _Remote(link, host)
    try:
        yield remote
    finally:
        remote.process.kill()
        remote.process.communicate()


def _measure(leg: Leg, near: _Remote, far: _Remote, seconds: float, lost_in_rate: bool) -> LegCalibration:
    wait_s = 2 * leg.rtt_ms / 1e3 + 0.1
    pings = _PINGS if seconds >= _LONG_S else _PINGS // 2
    trips = near.ask({"do": "ping", "to": far.address, "count": pings, "wait_s": wait_s})
    pairs = ((near, far), (far, near))
    # Half of the time for the loss of both directions at once, a quarter for a burst.
    per_s = _SMALL_FRAMES_PER_S
    if leg.rate_mbit is not None:
        per_s = min(per_s, 0.4 * leg.rate_mbit * 1e6 / 8 / LEAST_FRAME)
    count = max(_LEAST_COUNTED, round(per_s * seconds / 2))
    with ThreadPoolExecutor(len(pairs)) as threads:
        sent = [threads.submit(_send, a, b, count, LEAST_FRAME, per_s, wait_s) for a, b in pairs]
        counted = [count - each.result()["frames"] for each in sent]
    if leg.rate_mbit is not None:
        with ThreadPoolExecutor(len(pairs)) as threads:
            sending = [threads.submit(_overload, leg, a, b, seconds / 4, wait_s) for a, b in pairs]
            bursts = [each.result() for each in sending]
    else:  # one after the other, for what they find is what this machine can do
        found = seconds >= _LONG_S
        bursts = [_unlimited(a, b, seconds / 4, wait_s) if found else (math.nan, math.nan) for a, b in pairs]
    directions = []
    for (source, target), lost, (rate, buffer) in zip(pairs, counted, bursts, strict=True):
        rate /= 1 - leg.loss if lost_in_rate else 1.0
        directions.append(DirectionCalibration(f"{source.host} to {target.host}", count, lost, rate, buffer))
    return LegCalibration(f"{near.host} and {far.host}", leg, _lower_quartile(trips) * 1e3, tuple(directions))


def _send(source: _Remote, target: _Remote, count: int, frame: int, per_s: float, wait_s: float) -> dict[str, Any]:
    source.ask({"do": "send", "to": target.address, "count": count, "frame": frame, "per_s": per_s})
    arrived: dict[str, Any] = target.ask({"do": "arrived", "expected": count, "wait_s": wait_s})
    return arrived


def _unlimited(source: _Remote, target: _Remote, seconds: float, wait_s: float) -> tuple[float, float]:
    """What this machine carries of full frames over a leg without a limit, in Mbit/s."""
    count = round(_MOST_FRAMES_PER_S * seconds)
    return _mbit(_send(source, target, count, FRAME_BYTES, _MOST_FRAMES_PER_S, wait_s)), math.nan


def _overload(leg: Leg, source: _Remote, target: _Remote, seconds: float, wait_s: float) -> tuple[float, float]:
    """Rate in Mbit/s and wait in the full queue in kB, of full frames that come faster than the link takes them."""
    assert leg.buffer_bytes is not None and leg.rate_mbit is not None
    frames_per_s = leg.rate_mbit * 1e6 / 8 / FRAME_BYTES
    count = max(_LEAST_BURST, round(_OVERLOAD * frames_per_s * seconds))
    queue_s = leg.buffer_bytes / FRAME_BYTES / frames_per_s
    # The overload of a third of the frames must fill it: the wait of the last third of arrivals is then the full one.
    fills = (1 - 1 / _OVERLOAD) * count / 3 > leg.buffer_bytes / FRAME_BYTES
    per_s = _OVERLOAD * frames_per_s
    arrived = _send(source, target, count, FRAME_BYTES, per_s, wait_s + min(queue_s, count / per_s))
    rate = _mbit(arrived)
    if not fills:
        return rate, math.nan
    # The fastest frame's own time on the wire is part of its way, and a full queue holds it too. Frames of one size
    # fill it to between its room and one frame less.
    return rate, (arrived["last_s"] - arrived["fastest_s"]) * rate * 1e3 / 8 + 1.5 * FRAME_BYTES / 1e3


def _mbit(arrived: dict[str, Any]) -> float:
    return float(arrived["bytes_after_first"] * 8 / arrived["took_s"] / 1e6) if arrived["took_s"] > 0 else math.nan


def _delay_only(link: Link, agents: dict[str, _Remote]) -> Calibration:
    """The wires in a row are one delay there."""
    near, far = agents[link.hosts[0]], agents[link.hosts[-1]]
    to = link.endpoint(far.host, far.listening[1])
    trips = near.ask({"do": "converse", "to": to, "count": _PINGS // 2})["round_trips"]
    whole = Leg(sum(leg.rtt_ms for leg in link.legs))
    leg = LegCalibration(f"{near.host} and {far.host}", whole, _lower_quartile(trips) * 1e3, ())
    return Calibration("delay only", (leg,), link.legs, (), link.congestion, (), tuple(link.notes))


def _lower_quartile(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 4] if values else math.nan


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Interval of a share at 99 %: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n); 0 to 1 for n = 0."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + _CONFIDENCE / 2)
    p = hits / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return (0.0 if hits == 0 else low), (1.0 if hits == n else high)


def _off(measured: float, asked: float, slack: float = 0.0) -> bool:
    """NaN, which was not measured, is not off."""
    return abs(measured - asked) > MOST_OFF * asked + slack
