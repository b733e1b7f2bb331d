"""What the tests of the clients share: one event loop, a certificate, and requests to the golden server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from labkit.serving.tls import Certificate, own_certificate
from labkit.traffic.answer import Record
from labkit.traffic.client import Client
from labkit.traffic.golden import Golden, Script
from labkit.traffic.target import TLS_ALWAYS, Connections, Target

BODY = b'{"model": "golden", "stream": true, "messages": [{"role": "user", "content": "?"}]}'


@pytest.fixture(scope="session")
def certificate(tmp_path_factory) -> Certificate:
    return own_certificate(directory=tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="session")
def on_loop() -> Iterator[Callable[[Awaitable[Any]], Any]]:
    """Runs a coroutine on a loop that all tests share: gRPC keeps to the first loop of a process."""
    with asyncio.Runner() as runner:
        yield runner.run  # type: ignore[misc]


class Asked:
    """A golden server over ``transport`` and one client of it."""

    def __init__(self, golden: Golden, target: Target, run: Callable[[Awaitable[Any]], Any]) -> None:
        self.golden, self._target, self._run = golden, target, run

    def together(self, count: int, timeout_s: float = 10.0, apart_s: float = 0.0) -> list[Record]:
        """``count`` requests at once, or each ``apart_s`` after the one before."""
        return self._run(self._together(count, timeout_s, apart_s))

    def in_turn(self, bodies: list[bytes], timeout_s: float = 5.0) -> list[Record]:
        """One after the other."""
        return self._run(self._in_turn(bodies, timeout_s))

    async def _together(self, count: int, timeout_s: float, apart_s: float) -> list[Record]:
        client, records, tasks = Client(self._target), [Record(index) for index in range(count)], []
        for record in records:
            tasks.append(asyncio.create_task(client.chat(BODY, record, timeout_s)))
            if apart_s:
                await asyncio.sleep(apart_s)
        await asyncio.gather(*tasks)
        await client.close()
        return records

    async def _in_turn(self, bodies: list[bytes], timeout_s: float) -> list[Record]:
        client, records = Client(self._target), [Record(index) for index in range(len(bodies))]
        for record, body in zip(records, bodies, strict=True):
            await client.chat(body, record, timeout_s)
        await client.close()
        return records


@pytest.fixture
def asked(certificate, on_loop) -> Iterator[Callable[..., Asked]]:
    """``asked(scripts, transport, connections, most_streams=…)``: an Asked, its server stopped after the test."""
    started: list[Golden] = []

    def start(
        scripts: list[Script], transport: str = "http/1.1", connections: Connections | None = None, **more: Any
    ) -> Asked:
        tls = certificate if transport in TLS_ALWAYS else None
        golden = Golden(scripts, transport=transport, certificate=tls, **more).__enter__()
        started.append(golden)
        target = Target.parse(golden.url, None, transport, connections, str(certificate.certificate))
        return Asked(golden, target, on_loop)

    yield start
    for golden in started:
        golden.__exit__()
