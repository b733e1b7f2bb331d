"""JMeter, running the plan that ``labkit load`` writes for it, asks our questions and keeps to the golden clock."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice

import pandas as pd
import pytest

from labkit.experiments.metrics import requests_table
from labkit.traffic.golden import Golden, Script
from labkit.traffic.jmeter import read_jtl, write_plan
from labkit.traffic.target import Target
from labkit.traffic.worker import FAILURE_PAUSE_S, prepare
from labkit.traffic.workload import Workload, schedule

pytestmark = [pytest.mark.peers, pytest.mark.timeout(300)]

ANSWER = b'data: {"choices": [{"index": 0, "delta": {"content": "7"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
MS = 0.04
"""What a client in Java may add on two cores that others use as well."""


@pytest.fixture
def run(peer, output_of, tmp_path) -> Callable[..., pd.DataFrame]:
    """``run(workload, target, "-Jname=value", ...)``: JMeter's requests, index that of the schedule."""
    program = peer("jmeter") / "jmeter"
    if shutil.which("java") is None:
        pytest.skip("JMeter needs Java; install default-jre-headless")

    def send(workload: Workload, target: Target, *more: str) -> pd.DataFrame:
        plan, results = tmp_path / "plan.jmx", tmp_path / "plan.jtl"
        write_plan(plan, workload, target, "golden")
        given = [f"-Jresults={results}", "-Jsample_variables=index", "-j", tmp_path / "jmeter.log", *more]
        output_of([program, "-n", "-t", plan, *given], 120)
        return requests_table(read_jtl(results))

    return send


class Asked(ThreadingHTTPServer):
    """Answers every request at once, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.connections: set[int] = set()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Asked

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        self.server.connections.add(self.client_address[1])
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(len(ANSWER)))
        self.end_headers()
        self.wfile.write(ANSWER)

    def log_message(self, *_: object) -> None:
        """Nothing is said of a request."""


@pytest.fixture
def asked() -> Iterator[Asked]:
    server = Asked()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_it_sends_what_our_client_sends_and_nothing_twice(run, asked, tmp_path):
    """The plan is for another place, without the key; both are given when it is run."""
    workload = Workload.article(users=6, requests=120, seed=5)
    target = Target.parse("http://192.0.2.1:8000/base", "of the export")
    port, key = asked.server_address[1], "of-the-run"
    table = run(workload, target, "-Jhost=127.0.0.1", f"-Jport={port}", f"-Japi_key={key}")
    expected = [prepare(arrival, workload, "golden").body for arrival in islice(schedule(workload), 120)]
    assert sorted(int(headers["x-request-id"]) for _, headers, _ in asked.requests) == list(range(120))
    for path, headers, body in asked.requests:
        assert path == "/base/v1/chat/completions" and body == expected[int(headers["x-request-id"])]
        assert headers["content-type"] == "application/json" and headers["authorization"] == f"Bearer {key}"
    assert len(asked.connections) == 6  # kept
    assert list(table.index) == list(range(120)) and not table["failure"].any()
    assert list(table["bucket"]) == [arrival.bucket for arrival in islice(schedule(workload), 120)]


FAULTS = {
    "": "", "4xx": "4xx", "429": "shed", "503": "shed", "5xx": "5xx", "reset": "connect", "truncate": "truncated",
    "no finish": "truncated", "data error": "stream_error", "stall": "timeout",
}  # fmt: skip


@pytest.mark.clock
def test_its_times_are_those_of_the_script_and_its_failures_have_our_names(run):
    """Its latency is that of the first byte of the body: here 0.3 s, not the 0.1 s of the headers."""
    scripts = [Script(headers_s=0.1, ttft_s=0.3, itl_s=0.02, tokens=11, reasoning=5, fault=each) for each in FAULTS]
    slow = Script(headers_s=0.1, ttft_s=0.3, itl_s=0.06, tokens=15)  # bytes keep coming beyond the timeout
    workload = Workload.article(users=4, requests=22, timeout_s=1.0)
    with Golden([*scripts, slow]) as golden:
        table = run(workload, Target.parse(golden.url))
        assert sorted(int(one.request_id) for one in golden.answered) == list(range(22))
    kinds = [*FAULTS.values(), "timeout"]
    assert list(table["failure"]) == kinds * 2
    took, first = table["end"] - table["sent"], table["first_byte"] - table["sent"]
    whole, stalled, late = 11, 20, 21  # the JVM warms up on the first eleven
    assert took[whole] == pytest.approx(0.5, abs=MS) and first[whole] == pytest.approx(0.3, abs=MS)
    assert took[late] == pytest.approx(0.3 + 14 * 0.06, abs=MS)
    # Silent after five tokens; JMeter waits for its timeout from the last byte on.
    assert took[stalled] == pytest.approx(0.3 + 4 * 0.02 + 1.0, abs=MS)


@pytest.mark.clock
def test_the_clock_ends_it_and_users_think(run):
    """The second user comes after 3 s of the run, which began before JMeter, still warming up, had sent anything."""
    workload = Workload.article(users=2, requests=None, duration_s=1.0, ramp_s=6.0, think_s=0.3)
    scripts = [Script(fault="503"), *(Script(ttft_s=each, tokens=1) for each in (0.2, 2.5, *[0.8] * 30))]
    with Golden(scripts) as golden:
        table = run(workload, Target.parse(golden.url))
        assert sorted(int(one.request_id) for one in golden.answered) == list(range(len(table)))
    sent, end = table["sent"], table["end"]
    assert FAILURE_PAUSE_S - 0.01 < sent[1] - end[0] < FAILURE_PAUSE_S + 0.2
    assert 0.29 < sent[2] - end[1] < 0.4
    assert sent[2] < sent[3] < min(3.0 + MS, end[2])
    assert 4.0 < sent.max() < 7.0 + MS and len(table) < 14
