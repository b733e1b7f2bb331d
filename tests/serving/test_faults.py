"""What clients do to a wire, on purpose or not, while others stream: the server stays up, the others keep their pace,
and what the request held comes back."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings
import httpx
import pytest

from labkit.deployment import Deployment
from labkit.experiments.measure import running_server, serve_command
from labkit.serving.options import ServerOptions
from labkit.traffic.answer import Record
from labkit.traffic.client import Client
from labkit.traffic.target import Target

CHAT = "/v1/chat/completions"
GAP_S = 0.02
WORDS = 30


class Http2:
    """A client that does to a connection what no proper one does."""

    def __init__(self, helpers: Any, url: str, window: int | None = None) -> None:
        self.socket = helpers.connect(url)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        if window is not None:
            self.h2.local_settings[h2.settings.SettingCodes.INITIAL_WINDOW_SIZE] = window
        self.h2.initiate_connection()
        self.flush()
        self.text: dict[int, str] = {}
        self.resets: dict[int, int] = {}

    def flush(self) -> None:
        self.socket.sendall(self.h2.data_to_send())

    def ask(self, body: bytes) -> int:
        stream = self.h2.get_next_available_stream_id()
        headers = [(":method", "POST"), (":scheme", "http"), (":authority", "test"), (":path", CHAT)]
        self.h2.send_headers(stream, [*headers, ("content-type", "application/json")])
        self.h2.send_data(stream, body, end_stream=True)
        self.flush()
        return stream

    def read(self, until: Callable[[], bool], seconds: float = 10.0) -> bool:
        """Whether ``until`` came true before the end of the connection."""
        deadline = time.monotonic() + seconds
        while not until():
            self.socket.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                data = self.socket.recv(65536)
            except (TimeoutError, ConnectionResetError):
                return until()
            if not data:
                return until()
            for event in self.h2.receive_data(data):
                if isinstance(event, h2.events.DataReceived):
                    stream = event.stream_id
                    self.text[stream] = self.text.get(stream, "") + (event.data or b"").decode()
                    self.h2.acknowledge_received_data(event.flow_controlled_length, stream)
                elif isinstance(event, h2.events.StreamReset):
                    self.resets[event.stream_id] = event.error_code
            self.flush()
        return True


@contextmanager
def keeping_pace(url: str, helpers: Any) -> Iterator[None]:
    """Others stream meanwhile: all of their tokens come, none long after its turn."""
    gaps: list[float] = []
    words = []

    def stream() -> None:
        with (
            httpx.Client(timeout=20) as client,
            client.stream("POST", url + CHAT, json=helpers.chat(stream=True, max_tokens=WORDS)) as answer,
        ):
            last = time.monotonic()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    gaps.append(time.monotonic() - last)
                    last = time.monotonic()
                    words.append(json.loads(line[6:])["choices"][0]["delta"].get("content", ""))

    threads = [threading.Thread(target=stream) for _ in range(3)]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(30)
    assert "".join(words) == "word " * WORDS * 3
    late = sorted(gaps)[-max(1, len(gaps) // 20)]
    assert late < GAP_S + 0.15, f"one gap in twenty was {late:.3f} s or more"


@pytest.fixture(params=["http/1.1", "http/2"])
def served(request: Any, helpers: Any, engine: Any) -> Iterator[str]:
    engine.core.max_context = 10**6
    engine.pieces, engine.gap_s = ("word ",) * 1_500, GAP_S
    options = ServerOptions(model_name="tiny", send_timeout_s=0.5, body_timeout_s=1.0)
    with helpers.running(engine, options, request.param) as url:
        yield url
        assert httpx.get(url + "/health").status_code == 200
        assert helpers.eventually(lambda: httpx.get(url + "/stats").json()["kv_blocks_used"] == 0, 5.0)


def long(helpers: Any) -> bytes:
    return json.dumps(helpers.chat(stream=True, max_tokens=1_500)).encode()


def connected(helpers: Any, url: str, request: bytes, engine: Any) -> socket.socket:
    connection = helpers.connect(url)
    connection.sendall(helpers.raw_post(CHAT, request))
    got = b""
    while b"word" not in got:
        got += connection.recv(65536)
    return connection


@pytest.mark.parametrize("fault", ["reset", "half-closed", "header bytes", "body bytes", "idle"])
def test_faults_of_a_connection(served: str, helpers: Any, engine: Any, fault: str) -> None:
    held = []
    with keeping_pace(served, helpers):
        if fault in ("reset", "half-closed"):
            for _ in range(20):
                connection = connected(helpers, served, long(helpers), engine)
                if fault == "reset":
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    connection.close()
                else:
                    connection.shutdown(socket.SHUT_WR)
                    held.append(connection)
        elif fault == "idle":
            held += [helpers.connect(served) for _ in range(400)]
        else:
            held += [helpers.connect(served) for _ in range(20)]
            whole = helpers.raw_post(CHAT, long(helpers))
            start = 0 if fault == "header bytes" else whole.index(b"\r\n\r\n") + 4
            for connection in held:
                connection.sendall(whole[:start])
            for byte in whole[start : start + 6]:
                for connection in held:
                    connection.sendall(bytes([byte]))
                time.sleep(0.1)
    if fault == "half-closed":
        # Whoever sends no more has left, as far as this server can tell: its request ends.
        assert helpers.eventually(lambda: engine.running == 0, 5.0)
    if fault == "body bytes":
        assert held[0].recv(65536).startswith(b"HTTP/1.1 408")
    for connection in held:
        connection.close()


@pytest.mark.parametrize("served", ["http/2"], indirect=True)
@pytest.mark.parametrize("fault", ["goaway", "rst_stream", "oversize frame", "no window", "connection lost"])
def test_faults_of_a_connection_that_many_streams_share(served: str, helpers: Any, engine: Any, fault: str) -> None:
    with keeping_pace(served, helpers):
        client = Http2(helpers, served, window=0 if fault == "no window" else None)
        streams = [client.ask(long(helpers)) for _ in range(10)]
        assert helpers.eventually(lambda: engine.running == 13)
        if fault == "no window":
            # Nothing may be sent: the requests are given up when that has lasted.
            assert helpers.eventually(lambda: engine.running <= 3, 10.0)
        else:
            assert client.read(lambda: all(client.text.get(each) for each in streams))
        if fault == "goaway":
            client.h2.close_connection()
            client.flush()
            client.socket.close()
        elif fault == "rst_stream":
            for stream in streams[:5]:
                client.h2.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
            client.flush()
            assert helpers.eventually(lambda: engine.running <= 8)
            before = {each: len(client.text[each]) for each in streams[5:]}
            assert client.read(lambda: all(len(client.text[each]) > before[each] for each in streams[5:]))
            client.socket.close()
        elif fault == "oversize frame":
            # A DATA frame of 1 MiB where the server allows 16 KiB: an error of the connection (RFC 9113, 4.2).
            with suppress(ConnectionError):  # the server need not hear it out
                client.socket.sendall(struct.pack(">BHBBL", 16, 0, 0, 0, streams[0]) + b"x" * (1 << 20))
            assert helpers.eventually(lambda: engine.running <= 3)
        elif fault == "connection lost":
            client.socket.close()
        assert helpers.eventually(lambda: engine.running <= 3, 5.0)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["http/1.1", "http/2", "grpc"])
def test_ten_thousand_idle_connections(helpers: Any, tiny_model: Path, tmp_path: Path, transport: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    deployment = Deployment(model=str(tiny_model), transport=transport)  # type: ignore[arg-type]
    command = [*serve_command(deployment), "--schedule", "ttft_ms=50,itl_ms=20,tokens=50"]
    held = []
    try:
        with running_server(deployment, tmp_path / "log", command=command) as server:
            host, port = server.url.partition("://")[2].split(":")
            for _ in range(10_000):
                held.append(socket.create_connection((host, int(port))))
            records = [Record(index) for index in range(20)]

            async def streams() -> None:
                client = Client(Target.parse(server.url, transport=transport))
                await asyncio.gather(*(client.chat(long(helpers), record, 30) for record in records))
                await client.close()

            asyncio.run(streams())
            assert all(record.text.endswith(" 48 49 ") for record in records), [each.message for each in records]
            gaps = [b[0] - a[0] for record in records for a, b in pairwise(record.chunks)]
            assert sorted(gaps)[-len(gaps) // 20] < 0.02 + 0.15
            assert httpx.get(server.http_url + "/stats").json()["running"] == 0
    finally:
        for connection in held:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
