"""Reads probes at a fixed rate on the clock of the run, one thread a probe, and says what that cost."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pandas as pd

COLUMNS = ("t_s", "probe", "name", "value")


class Probe(Protocol):
    """Something that can be read many times a second. ``read`` is only ever called by one thread."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str:
        """What is read, or "absent: reason". Lands in the manifest of the run."""

    def read(self) -> Mapping[str, float]:
        """One reading, name -> value; empty when there is nothing to read."""


@dataclass
class _Track:
    """What the thread of one probe has seen so far."""

    probe: Probe
    rows: list[tuple[float, str, str, float]] = field(default_factory=list)
    latest: dict[str, float] = field(default_factory=dict)
    ticks: int = 0
    missed: int = 0
    latest_start_s: float = 0.0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    failures: int = 0
    first_failure: str | None = None


class Sampler:
    """Reads every probe ``hz`` times a second from ``start`` to ``stop``.

    Tick k is due at ``start + k / hz`` by ``clock`` (seconds, monotonic). A tick that comes too late is left out and
    recorded as ``missed`` (value: how many in a row), never made up for in a bunch. A probe that is slow delays only
    itself, and one that raises is recorded as ``failed`` and read again at the next tick.
    """

    def __init__(
        self, probes: Sequence[Probe], hz: float = 10.0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Raises ValueError for a rate outside 0.01 to 1000 Hz and for two probes of one name."""
        if not 0.01 <= hz <= 1000:
            raise ValueError(f"hz must be between 0.01 and 1000, got {hz!r}")
        names = [probe.name for probe in probes]
        if len(set(names)) < len(names):
            raise ValueError(f"probes need names of their own, got {', '.join(names)}")
        self.hz = float(hz)
        self._clock = clock
        self._tracks = [_Track(probe) for probe in probes]
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()
        self._began: float | None = None
        self._ended: float | None = None

    def start(self) -> Sampler:
        """Raises RuntimeError when started a second time."""
        if self._threads or self._began is not None:
            raise RuntimeError("a sampler is started once; make a new one")
        self._began = self._clock()
        for track in self._tracks:
            thread = threading.Thread(target=self._watch, args=(track,), name=f"probe-{track.probe.name}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def stop(self, timeout_s: float = 5.0) -> pd.DataFrame:
        """Ends the threads (a reading under way has ``timeout_s`` to end) and returns ``frame()``."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout_s)
        if self._ended is None:
            self._ended = self._clock()
        return self.frame()

    def __enter__(self) -> Sampler:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def frame(self) -> pd.DataFrame:
        """All samples so far by time: t_s float64 (clock, middle of the reading), probe, name, value float64."""
        rows = [row for track in self._tracks for row in tuple(track.rows)]
        rows.sort(key=lambda row: row[0])
        table = pd.DataFrame(rows, columns=list(COLUMNS))
        return table.astype({"t_s": "float64", "value": "float64"})

    def latest(self) -> dict[str, dict[str, float]]:
        """The last reading of every probe: probe -> name -> value."""
        return {track.probe.name: dict(track.latest) for track in self._tracks}

    def report(self) -> dict[str, Any]:
        """For the manifest: the rate, what each probe is, its ticks, missed ticks, failures and its own cost.

        ``cpu_share`` is the CPU time of the sampler's threads over the time it ran, in cores.
        """
        end = self._ended if self._ended is not None else self._clock()
        lasted = max(end - self._began, 1e-9) if self._began is not None else 0.0
        cpu_s = sum(track.cpu_s for track in self._tracks)
        return {
            "hz": self.hz,
            "lasted_s": lasted,
            "cpu_s": cpu_s,
            "cpu_share": cpu_s / lasted if lasted else 0.0,
            "probes": {
                track.probe.name: {
                    "description": track.probe.description,
                    "ticks": track.ticks,
                    "missed": track.missed,
                    "latest_start_ms": track.latest_start_s * 1e3,
                    "mean_reading_ms": track.wall_s / track.ticks * 1e3 if track.ticks else 0.0,
                    "failures": track.failures,
                    "first_failure": track.first_failure,
                }
                for track in self._tracks
            },
        }

    def _watch(self, track: _Track) -> None:
        assert self._began is not None
        period, tick = 1.0 / self.hz, 0
        while True:
            wait = self._began + tick * period - self._clock()
            if wait > 0 and self._stop.wait(wait):
                return
            if self._stop.is_set():
                return
            self._read(track, due=self._began + tick * period)
            # The next tick is the first one that is still to come: late ones are named, not bunched.
            due_next = max(tick + 1, math.ceil((self._clock() - self._began) * self.hz))
            skipped = due_next - tick - 1
            if skipped:
                track.missed += skipped
                track.rows.append((self._clock(), track.probe.name, "missed", float(skipped)))
            tick = due_next

    def _read(self, track: _Track, due: float) -> None:
        before, cpu_before = self._clock(), time.thread_time()
        track.latest_start_s = max(track.latest_start_s, before - due)
        try:
            reading = dict(track.probe.read())
        except Exception as error:  # a probe must never take the run down with it
            track.failures += 1
            track.first_failure = track.first_failure or f"{type(error).__name__}: {error}"
            reading = {"failed": 1.0}
        after = self._clock()
        middle, name = (before + after) / 2, track.probe.name
        track.rows.extend((middle, name, key, float(value)) for key, value in reading.items())
        track.latest = reading
        track.ticks += 1
        track.wall_s += after - before
        track.cpu_s += time.thread_time() - cpu_before


def series(samples: pd.DataFrame, probe: str, name: str) -> pd.DataFrame:
    """One reading over time: t_s, value; empty when the probe never gave it."""
    chosen = samples[(samples["probe"] == probe) & (samples["name"] == name)]
    return chosen[["t_s", "value"]].reset_index(drop=True)


def rate(samples: pd.DataFrame, probe: str, name: str) -> pd.DataFrame:
    """How fast a counter grew between two readings: t_s (of the later reading), value (per second).

    A counter that fell was reset (the server was started anew): that interval is left out.
    """
    counter = series(samples, probe, name)
    grown, elapsed = counter["value"].diff(), counter["t_s"].diff()
    whole = (grown >= 0) & (elapsed > 0)
    return pd.DataFrame({"t_s": counter["t_s"][whole], "value": grown[whole] / elapsed[whole]}).reset_index(drop=True)
