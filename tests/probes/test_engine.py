from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from labkit.probes.engine import EngineProbe
from labkit.probes.sampler import Sampler, series
from labkit.request import EngineStats


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    steps = 0
    status = 200

    def do_GET(self) -> None:
        type(self).steps += 1
        body = json.dumps({"waiting": 3, "steps": self.steps, "model": "m", "warm": True}).encode()
        self.send_response(self.status if self.path == "/stats" else 404)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def handler() -> type[Handler]:
    return type("Fresh", (Handler,), {"steps": 0})


@pytest.fixture
def server(handler: type[Handler]) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def address(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_numbers_are_read_and_the_rest_is_left(server: ThreadingHTTPServer) -> None:
    probe = EngineProbe(address(server))
    assert probe.read() == {"answered": 1.0, "waiting": 3.0, "steps": 1.0}
    assert probe.read()["steps"] == 2.0
    assert "/stats" in probe.description


def test_a_server_that_is_not_up_yet_is_a_gap_and_then_answers(handler: type[Handler]) -> None:
    reserved = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    port = reserved.server_address[1]
    reserved.server_close()
    probe = EngineProbe(f"http://127.0.0.1:{port}")
    assert probe.read() == {"answered": 0.0}
    later = ThreadingHTTPServer(("127.0.0.1", port), handler)
    threading.Thread(target=later.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        assert probe.read()["answered"] == 1.0
    finally:
        later.shutdown()
        later.server_close()


@pytest.mark.clock
def test_a_server_that_hangs_costs_its_timeout_and_leaves_a_gap() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        probe = EngineProbe(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.1)
        began = time.perf_counter()
        assert probe.read() == {"answered": 0.0}
        assert time.perf_counter() - began < 0.5


def test_an_error_status_is_a_gap(server: ThreadingHTTPServer, handler: type[Handler]) -> None:
    handler.status = 503
    assert EngineProbe(address(server)).read() == {"answered": 0.0}


def test_a_gap_lands_in_the_samples_at_its_time(server: ThreadingHTTPServer, handler: type[Handler]) -> None:
    with Sampler([EngineProbe(address(server))], hz=25) as sampler:
        time.sleep(0.2)
        handler.status = 500
        time.sleep(0.2)
        handler.status = 200
        time.sleep(0.2)
    answered = series(sampler.frame(), "engine", "answered")["value"]
    assert answered.iloc[0] == 1.0 and answered.iloc[-1] == 1.0
    assert 3 <= (answered == 0.0).sum() <= 7


def test_a_callable_is_read_in_process() -> None:
    probe = EngineProbe(lambda: EngineStats(waiting=2, busy_s=1.5))
    reading = probe.read()
    assert reading["waiting"] == 2.0 and reading["busy_s"] == 1.5 and reading["answered"] == 1.0


@pytest.mark.parametrize("source", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://"])
def test_an_address_of_another_kind_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="http://127.0.0.1:8000"):
        EngineProbe(source)
