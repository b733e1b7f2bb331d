"""The host through psutil: cores, run queue, memory and swap of the machine, CPU and RSS of one tree of processes."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

_TREE_REFRESH_S = 1.0


class HostProbe:
    """The machine and, with ``pid``, that process and its descendants.

    Machine: cpu (% of all usable cores), cpu0, cpu1, … (% of each core this process may use), load1, runnable (tasks
    running or waiting for a core at this instant, Linux only), memory_used_bytes, memory_total_bytes,
    swap_used_bytes, swap_total_bytes, swap_in_bytes and swap_out_bytes (counters since boot). CPU is measured from
    one reading to the next, so the first reading has none.
    Tree: tree_cpu (% of one core, from reading to reading), tree_rss_bytes (pages shared by two processes count twice),
    tree_threads, tree_processes; all 0 processes once the tree is gone.
    """

    name = "host"

    def __init__(self, pid: int | None = None) -> None:
        self._cores = usable_cores()
        self._pid = pid
        self._times = psutil.cpu_times(percpu=True)
        self._tree: list[psutil.Process] = []
        self._tree_found_at = float("-inf")
        self._tree_cpu: dict[int, float] = {}
        self._tree_cpu_at: float | None = None
        tree = f", and the processes under pid {pid}" if pid is not None else ""
        self.description = f"psutil {psutil.__version__}: {len(self._cores)} of {len(self._times)} cores{tree}"

    def read(self) -> Mapping[str, float]:
        reading = self._cpu()
        reading["load1"] = os.getloadavg()[0]
        runnable = _runnable()
        if runnable is not None:
            reading["runnable"] = runnable
        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
        reading["memory_used_bytes"] = float(memory.total - memory.available)
        reading["memory_total_bytes"] = float(memory.total)
        reading["swap_used_bytes"] = float(swap.used)
        reading["swap_total_bytes"] = float(swap.total)
        reading["swap_in_bytes"] = float(swap.sin)
        reading["swap_out_bytes"] = float(swap.sout)
        if self._pid is not None:
            reading.update(self._read_tree())
        return reading

    def _cpu(self) -> dict[str, float]:
        times = psutil.cpu_times(percpu=True)
        before, self._times = self._times, times
        shares: dict[str, float] = {}
        for core in self._cores:
            if core >= len(times) or core >= len(before):
                continue
            all_s = _total(times[core]) - _total(before[core])
            idle_s = _idle(times[core]) - _idle(before[core])
            if all_s > 0:
                shares[f"cpu{core}"] = min(100.0, max(0.0, 100.0 * (1 - idle_s / all_s)))
        return {"cpu": sum(shares.values()) / len(shares), **shares} if shares else {}

    def _read_tree(self) -> dict[str, float]:
        now = time.perf_counter()
        # Walking every process of the machine is the dear part, and children seldom come and go.
        if now - self._tree_found_at >= _TREE_REFRESH_S:
            self._tree, self._tree_found_at = _family(self._pid or 0), now
        rss = threads = spent = 0.0
        alive = 0
        cpu: dict[int, float] = {}
        for process in self._tree:
            try:
                with process.oneshot():
                    if process.status() == psutil.STATUS_ZOMBIE:
                        continue
                    times = process.cpu_times()
                    rss += process.memory_info().rss
                    threads += process.num_threads()
                cpu[process.pid] = times.user + times.system
                alive += 1
            except psutil.Error:
                continue
        for pid, total in cpu.items():
            spent += total - self._tree_cpu.get(pid, total)
        reading = {"tree_rss_bytes": rss, "tree_threads": threads, "tree_processes": float(alive)}
        if self._tree_cpu_at is not None and now > self._tree_cpu_at:
            reading["tree_cpu"] = 100.0 * spent / (now - self._tree_cpu_at)
        self._tree_cpu, self._tree_cpu_at = cpu, now
        return reading


def _family(pid: int) -> list[psutil.Process]:
    try:
        head = psutil.Process(pid)
        return [head, *head.children(recursive=True)]
    except psutil.Error:
        return []


def usable_cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def busy_seconds() -> float:
    """Seconds since boot that the cores which this process may use were not idle, summed over them."""
    times = psutil.cpu_times(percpu=True)
    return sum(_total(times[core]) - _idle(times[core]) for core in usable_cores() if core < len(times))


def _total(times: Any) -> float:
    # Guest time is already counted in user time on Linux.
    return float(sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0))


def _idle(times: Any) -> float:
    return float(times.idle + getattr(times, "iowait", 0.0))


def _runnable() -> float | None:
    try:
        return float(Path("/proc/loadavg").read_text().split()[3].split("/")[0])
    except (OSError, IndexError, ValueError):
        return None
