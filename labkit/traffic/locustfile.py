"""The same workload as a Locust user: ``locust -f labkit/traffic/locustfile.py --host http://127.0.0.1:8000``.

Needs ``pip install locust`` (in an environment of its own if you like: of labkit it loads what needs nothing else).
Headless with ``--headless -u 300 -r 300 -t 60s``, otherwise with its page at http://localhost:8089; ``--processes 2``
uses two cores, ``--master`` and ``--worker`` several machines. What is asked is set by ``LABKIT_WORKLOAD``, the JSON of
a ``labkit.traffic.workload.Workload`` (mix, seed, max_tokens, think_s, timeout_s; Locust itself says how many users
there are and for how long), and ``LABKIT_MODEL``; ``LABKIT_API_KEY`` is sent if set.

Besides the request (Locust's time of it ends with the last byte) it reports TTFT (first content token, reasoning
included) and ITL (gaps between chunks, all answers' together) in milliseconds, type ``SSE``, and a truncated stream as
a failure, which Locust by itself takes for a success.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

from geventhttpclient.response import HTTPParseError
from locust import FastHttpUser, constant, events, task
from locust.runners import WorkerRunner

from labkit.traffic.http1 import SseParser
from labkit.traffic.workload import Arrival, Workload, schedule
from labkit.training.ledger import make_problem

CHAT = "/v1/chat/completions"
MOST_PROCESSES = 1024
"""Locust numbers its processes; each takes every so many-th request, so that none is asked twice."""


class Truncated(Exception):
    """The answer began and did not end whole."""


class StreamError(Exception):
    """An error inside a 200."""


def _workload() -> Workload:
    given = os.environ.get("LABKIT_WORKLOAD")
    return Workload.from_json(given) if given else Workload.article()


WORKLOAD = _workload()


class LedgerUser(FastHttpUser):
    """Asks questions of the ledger task, each after the answer to the one before."""

    wait_time = constant(WORKLOAD.think_s)
    network_timeout = connection_timeout = WORKLOAD.timeout_s
    arrivals: Iterator[Arrival] = iter(())
    model = os.environ.get("LABKIT_MODEL", "")

    @task
    def ask(self) -> None:
        arrival = next(type(self).arrivals)
        prompt = make_problem(WORKLOAD.seed, arrival.index, arrival.bucket).prompt
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": WORKLOAD.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.model:
            body["model"] = self.model
        headers = {"Content-Type": "application/json", "X-Request-Id": str(arrival.index)}
        if key := os.environ.get("LABKIT_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        sent = time.perf_counter()
        with self.client.post(
            CHAT, data=json.dumps(body), headers=headers, name=f"chat {arrival.bucket}", stream=True,
            catch_response=True,
        ) as response:  # fmt: skip
            try:
                if response.status_code == 200:
                    self._read(response, sent, arrival.bucket)
            except (Truncated, StreamError) as error:
                response.failure(f"{type(error).__name__}: {error}")
            # Of a streamed answer Locust takes the time to its headers.
            response.request_meta["response_time"] = (time.perf_counter() - sent) * 1e3

    def _read(self, response: Any, sent: float, bucket: str) -> None:
        parser, last, finished, done = SseParser(), 0.0, False, False
        try:
            while line := response.stream.readline(b"\n"):  # read() would wait for all of the answer
                now = time.perf_counter()
                for payload in parser.feed(line):
                    if payload == b"[DONE]":
                        done = True
                        continue
                    event = json.loads(payload)
                    if event.get("error"):
                        raise StreamError(str(event["error"].get("message", "")))
                    for choice in event.get("choices", ()):
                        delta = choice.get("delta") or {}
                        finished = finished or bool(choice.get("finish_reason"))
                        if delta.get("reasoning_content") or delta.get("content"):
                            self._fire("ITL" if last else "TTFT", bucket, now - (last or sent))
                            last = now
        except (OSError, HTTPParseError) as error:
            raise Truncated(str(error)) from error
        if not (finished and done):
            raise Truncated("no finish reason or no [DONE]")

    def _fire(self, metric: str, bucket: str, seconds: float) -> None:
        self.environment.events.request.fire(
            request_type="SSE", name=f"{metric} {bucket}", response_time=seconds * 1e3, response_length=0,
            exception=None, context={},
        )  # fmt: skip


@events.test_start.add_listener
def _share_out(environment: Any, **_: Any) -> None:
    """Each process has its own part of the schedule."""
    runner = environment.runner
    first, step = (runner.worker_index, MOST_PROCESSES) if isinstance(runner, WorkerRunner) else (0, 1)
    LedgerUser.arrivals = islice(schedule(WORKLOAD), first, None, step)
