"""The client: chat requests over the transport that the target names, every event timed, every failure named.

HTTP/1.1 and HTTP/2 are written on ``asyncio.Protocol`` because the client must not be what is measured: bytes are timed
where they arrive, and nothing is parsed beyond what the metrics need. (HTTP/3 is ``aioquic``, in Python down to the
packets: calibration tells what that costs.) Times are ``time.perf_counter`` (CLOCK_MONOTONIC
on Linux: one clock for all processes of the machine).
"""

from __future__ import annotations

import time
from typing import Protocol

from labkit.traffic.answer import MESSAGE_CHARACTERS, Record
from labkit.traffic.pool import NoneFree
from labkit.traffic.target import Target


class Wire(Protocol):
    """How one transport sends a chat request and fills its record in."""

    async def chat(self, body: bytes, record: Record, deadline: float) -> None:
        """``deadline`` is on ``time.perf_counter``. Raises NoneFree, or OSError or TimeoutError when no connection can
        be made; whatever else the peer does is in the record."""

    async def close(self) -> None: ...


class Client:
    """Sends chat requests to one target over as many connections as the target says, and keeps them for reuse."""

    def __init__(self, target: Target) -> None:
        """Raises ValueError for a target whose transport is not settled yet."""
        self._wire = _wire(target)

    async def chat(self, body: bytes, record: Record, timeout_s: float) -> None:
        """Sends ``body`` (a JSON body for ``/v1/chat/completions``) and fills ``record`` in; it never raises for what
        the peer does."""
        record.sent = time.perf_counter()
        try:
            await self._wire.chat(body, record, record.sent + timeout_s)
        except NoneFree:
            _fail(record, "timeout", "no connection came free in time")
        except ConnectionRefusedError:
            _fail(record, "refused", "connection refused: no server listens there")
        except (OSError, TimeoutError) as error:
            _fail(record, "connect", str(error) or "no connection in time")

    async def close(self) -> None:
        await self._wire.close()


def _fail(record: Record, kind: str, message: str) -> None:
    record.failure, record.message, record.end = kind, message[:MESSAGE_CHARACTERS], time.perf_counter()


def _wire(target: Target) -> Wire:
    # Each transport loads only what it needs: a client starts in a process of its own, and more than once a run.
    if target.transport in ("http/1.1", "http/1.1 close"):
        from labkit.traffic.client_http1 import Http1

        return Http1(target)
    if target.transport in ("http/2", "http/2 tls"):
        from labkit.traffic.client_http2 import Http2

        return Http2(target)
    if target.transport == "http/3":
        from labkit.traffic.client_http3 import Http3

        return Http3(target)
    if target.transport == "grpc":
        from labkit.traffic.client_grpc import Grpc

        return Grpc(target)
    raise ValueError("the transport is not agreed on yet; Target.settled() asks the server")
