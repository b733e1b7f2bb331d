"""One client process: sends its share of a workload and spools one line for every request that ended.

Run by ``labkit.traffic.generate`` as ``python -m labkit.traffic.worker`` and spoken to in lines of JSON: an order on
stdin, ``{"ready": true}`` back, the start time on stdin, then progress until ``{"end": true, …}``. When stdin closes
(the parent is gone) the process ends at once. A process of its own keeps the client's timing clear of whatever the
parent does.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count, islice
from typing import Any, TextIO

from labkit.traffic.answer import Record
from labkit.traffic.client import Client
from labkit.traffic.target import Target
from labkit.traffic.workload import Arrival, Workload, schedule
from labkit.training.ledger import is_correct, make_problem

WARMUP_INDEX = 10_000_000
"""Requests of a closed loop before its measured part are numbered from here on, so that the measured part always asks
the same questions however far the warm-up came."""

FAILURE_PAUSE_S = 0.5
"""A user who was turned away (refused, no connection, shed) waits this long before asking the next question."""

STATUS_EVERY_S = 0.25
LOOP_PROBE_S = 0.02


@dataclass(frozen=True)
class Order:
    """What one process is to do: request ``i`` is its own when ``i % processes == share``."""

    target: Target
    model: str
    workload: Workload
    share: int
    processes: int
    spool: str

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "workload": self.workload.to_json()})

    @classmethod
    def from_json(cls, text: str) -> Order:
        fields = json.loads(text)
        return cls(
            **{**fields, "target": Target(**fields["target"]), "workload": Workload.from_json(fields["workload"])}
        )


@dataclass(frozen=True)
class Ask:
    """A request ready to send, and the answer that would be right (None where nobody knows)."""

    index: int
    bucket: str
    family: str
    body: bytes
    answer: str | None
    t_s: float | None


def prepare(arrival: Arrival, workload: Workload, model: str) -> Ask:
    """The body of the request for one arrival; its prompt is a problem of the ledger task unless a trace brings its
    own."""
    family, prompt, answer = "", arrival.prompt, arrival.answer
    if prompt is None:
        problem = make_problem(workload.seed, arrival.index, arrival.bucket)
        family, prompt, answer = problem.family, problem.prompt, problem.answer
    fields: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": arrival.max_tokens or workload.max_tokens,
        "temperature": 0,
        "stream": workload.stream,
    }
    if workload.stream:
        fields["stream_options"] = {"include_usage": True}
    return Ask(arrival.index, arrival.bucket, family, json.dumps(fields).encode(), answer, arrival.t_s)


class _Sender:
    """The state of one process's part of a run."""

    def __init__(self, order: Order, zero: float, spool: TextIO) -> None:
        self.order, self.workload, self.zero = order, order.workload, zero
        self.client = Client(order.target)
        self.sent = self.ended = self.failed = 0
        self.latencies: list[float] = []
        self.lags: list[float] = []
        self._spool = spool

    def now(self) -> float:
        return time.perf_counter() - self.zero

    async def send(self, ask: Ask, scheduled_s: float) -> Record:
        record = Record(ask.index, ask.bucket, ask.family, scheduled=self.zero + scheduled_s)
        self.sent += 1
        await self.client.chat(ask.body, record, self.workload.timeout_s)
        if not record.failure and ask.answer is not None:
            record.correct = is_correct(ask.answer, record.text)
        self.ended += 1
        self.failed += bool(record.failure)
        assert record.end is not None
        if not record.failure:
            self.latencies.append(record.end - record.scheduled)
        self._spool.write(spool_line(record, self.zero))
        return record

    async def open_loop(self, asks: list[Ask]) -> None:
        async with asyncio.TaskGroup() as group:
            for ask in asks:
                assert ask.t_s is not None
                await self._sleep_until(ask.t_s)
                group.create_task(self.send(ask, ask.t_s))

    async def closed_loop(self) -> None:
        order, workload = self.order, self.workload
        starts = range(order.share, workload.users, order.processes)
        measured = own_share(schedule(workload), order)
        if workload.requests is not None:
            measured = islice(measured, len(range(order.share, workload.requests, order.processes)))
        warmup = (
            Arrival(WARMUP_INDEX + arrival.index, None, arrival.bucket)
            for arrival in own_share(schedule(workload), order)
        )
        end_s = float("inf") if workload.duration_s is None else workload.measured_from_s + workload.duration_s
        async with asyncio.TaskGroup() as group:
            for user in starts:
                group.create_task(self._user(workload.ramp_s * user / workload.users, warmup, measured, end_s))

    async def _user(self, start_s: float, warmup: Iterator[Arrival], measured: Iterator[Arrival], end_s: float) -> None:
        await self._sleep_until(start_s)
        ready_s = start_s
        while ready_s < end_s:
            arrival = next(warmup if ready_s < self.workload.measured_from_s else measured, None)
            if arrival is None:
                return
            ask = prepare(arrival, self.workload, self.order.model)
            record = await self.send(ask, ready_s)
            turned_away = record.failure in ("refused", "connect", "shed")
            pause = max(self.workload.think_s, FAILURE_PAUSE_S if turned_away else 0.0)
            ready_s = self.now() + pause
            if pause and ready_s < end_s:
                await self._sleep_until(ready_s)

    async def watch(self) -> None:
        """Reports progress, and samples how late the event loop runs what is due."""
        for tick in count(1):
            due = time.perf_counter() + LOOP_PROBE_S
            await asyncio.sleep(LOOP_PROBE_S)
            self.lags.append(time.perf_counter() - due)
            if tick % round(STATUS_EVERY_S / LOOP_PROBE_S) == 0:
                self.report()

    def report(self, **more: Any) -> None:
        self._spool.flush()
        _say({"sent": self.sent, "ended": self.ended, "failed": self.failed, "latencies": self.latencies, **more})
        self.latencies = []

    async def _sleep_until(self, t_s: float) -> None:
        while (left := t_s - self.now()) > 0:
            await asyncio.sleep(left)


def spool_line(record: Record, zero: float) -> str:
    """One line of JSON for a request that ended; times relative to the start of the run."""
    fields = dict(vars(record))
    for name in ("scheduled", "sent", "first_byte", "end"):
        fields[name] = None if fields[name] is None else round(fields[name] - zero, 7)
    fields["chunks"] = [(round(t - zero, 7), tokens, part) for t, tokens, part in record.chunks]
    return json.dumps(fields) + "\n"


def own_share(arrivals: Iterator[Arrival], order: Order) -> Iterator[Arrival]:
    """Every arrival of the schedule belongs to exactly one process."""
    return islice(arrivals, order.share, None, order.processes)


async def _work(sender: _Sender, asks: list[Ask]) -> None:
    watch = asyncio.create_task(sender.watch())
    try:
        await (sender.open_loop(asks) if sender.workload.open_loop else sender.closed_loop())
    finally:
        watch.cancel()
        await sender.client.close()


def _first_error(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(3)


def _raise_file_limit() -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    order = Order.from_json(sys.stdin.readline())
    _raise_file_limit()
    asks: list[Ask] = []
    if order.workload.open_loop:
        mine = own_share(schedule(order.workload), order)
        asks = [prepare(arrival, order.workload, order.model) for arrival in mine]
    # A full collection would stop the event loop for tens of ms in mid-measurement; this process is short-lived.
    gc.collect()
    gc.freeze()
    gc.disable()
    _say({"ready": True})
    zero = float(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cpu_before, wall_before = time.process_time(), time.perf_counter()
    with open(order.spool, "a") as spool:
        sender = _Sender(order, zero, spool)
        try:
            asyncio.run(_work(sender, asks))
        except BaseExceptionGroup as group:
            # The parent shows the last line of what is said here, and a group's last line is a ruler.
            sys.exit(_first_error(group))
        wall = max(time.perf_counter() - wall_before, 1e-9)
        sender.report(end=True, lags=sender.lags, cpu_share=(time.process_time() - cpu_before) / wall)


if __name__ == "__main__":
    main()
