"""What the comparisons with programs of others share: their environments, and a server of ours to point them at."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from labkit.traffic.answer import Record
from labkit.traffic.client_http1 import Http1Answer
from labkit.traffic.target import Target

ROOT = Path(__file__).resolve().parents[2]
READY_WITHIN_S = 180


@pytest.fixture(scope="session")
def peer() -> Callable[[str], Path]:
    """Name of a peer -> the ``bin`` folder of its environment; the test is skipped where there is none."""

    def find(name: str) -> Path:
        folder = ROOT / ".venv-peers" / name / "bin"
        if not any(folder.parent.glob(".installed-*")):
            pytest.skip(f"{folder.parent} is not installed; `make test-peers` installs it")
        return folder

    return find


@pytest.fixture(scope="session")
def started() -> Callable[..., AbstractContextManager[str]]:
    """``with started(command) as url``: a server that prints ``ready on http://…``, ended by an interrupt."""
    return _started


@pytest.fixture(scope="session")
def serve() -> Callable[..., AbstractContextManager[str]]:
    """``with serve(model, "--knob", "value") as url``: ``labkit serve`` in a process of its own, on a free port."""
    labkit = Path(sys.executable).parent / "labkit"
    return lambda model, *options: _started([labkit, "serve", str(model), "--port", "0", *options])


@pytest.fixture(scope="session")
def output_of() -> Callable[..., str]:
    """What a program prints; when it fails, its errors become the failure's text."""

    def run(command: list[str | Path], timeout_s: float, **environment: str) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, env={**os.environ, **environment}, cwd=ROOT
        )
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    return run


class Tap:
    """Passes bytes between a client of others and a server, and times each answer on the way with our client's reader.

    ``records`` holds our record of every chat request, so that two clocks can be compared on the very same answers.
    """

    def __init__(self, server: str) -> None:
        self._server = Target.parse(server)
        self._exchanges: list[Http1Answer] = []
        self._loop = asyncio.new_event_loop()
        self._listening = self._loop.run_until_complete(asyncio.start_server(self._pass_on, "127.0.0.1"))
        self.url = f"http://127.0.0.1:{self._listening.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    @property
    def records(self) -> list[dict[str, object]]:
        return [asdict(exchange.record) for exchange in self._exchanges]

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._server.host, self._server.port)
        answering: list[Http1Answer] = []

        async def answers() -> None:
            while data := await there.read(65536):
                now = time.perf_counter()
                writer.write(data)
                if answering and not answering[-1].over.done():
                    answering[-1].received(data, now)
            writer.close()

        task = asyncio.create_task(answers())
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                now = time.perf_counter()
                length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
                if b"/v1/chat/completions" in head.split(b"\r\n", 1)[0]:
                    record = Record(len(self._exchanges), scheduled=now, sent=now)
                    answering.append(Http1Answer(record, asyncio.get_running_loop()))
                    self._exchanges.append(answering[-1])
                else:
                    answering.clear()
                back.write(head + (await reader.readexactly(int(length[1])) if length else b""))
        except (asyncio.IncompleteReadError, ConnectionResetError):
            # guidellm hangs up at "[DONE]", before the last chunk, which ends the answer for us.
            await asyncio.wait([exchange.over for exchange in answering] or [task], timeout=1)
            back.close()
            await task


@pytest.fixture
def tap() -> Iterator[Callable[[str], Tap]]:
    """``tap(url)``: a Tap before the server at ``url``."""
    taps: list[Tap] = []

    def make(server: str) -> Tap:
        taps.append(Tap(server))
        return taps[-1]

    yield make
    for each in taps:
        each.close()


@contextmanager
def _started(command: list[str | Path]) -> Iterator[str]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        yield _address(process)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"{command} did not end within 30 s of an interrupt") from None


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    overdue = threading.Timer(READY_WITHIN_S, process.kill)
    overdue.start()
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"ready on (http://[\w.:]+)", line):
                return found[1]
    finally:
        overdue.cancel()
    raise AssertionError(f"the server ended, or was not ready within {READY_WITHIN_S} s; it said: {''.join(said)}")
