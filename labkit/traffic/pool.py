"""Connections for streams: some that all share, or for each stream one of its own while it lasts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from labkit.traffic.target import Connections

CONNECT_TIMEOUT_S = 10.0
TRIES = 3
"""How often a request is sent that the peer says it did not look at (GOAWAY, or more streams than it takes)."""


class Carrier(Protocol):
    """A connection, as far as a pool cares. Not ``open``: it takes no more streams."""

    @property
    def open(self) -> bool: ...

    def close(self) -> None: ...


C = TypeVar("C", bound=Carrier)


class NoneFree(Exception):
    """No connection came free in time."""


class OwnConnections(Generic[C]):
    """A connection carries one stream at a time and is kept for the next; with a limit, streams wait for one."""

    def __init__(self, connections: Connections, connect: Callable[[], Awaitable[C]]) -> None:
        self._connect = connect
        self._idle: list[C] = []
        self._free = asyncio.Semaphore(connections) if isinstance(connections, int) else None

    async def take(self, within_s: float) -> tuple[C, bool]:
        """A connection and whether it was used before. Raises NoneFree, or OSError or TimeoutError when none can be
        made."""
        if self._free is not None:
            try:
                async with asyncio.timeout(within_s):
                    await self._free.acquire()
            except TimeoutError:
                raise NoneFree from None
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection, True
        try:
            async with asyncio.timeout(min(CONNECT_TIMEOUT_S, within_s)):
                return await self._connect(), False
        except BaseException:
            self._release()
            raise

    def give(self, connection: C) -> None:
        """The stream is over; a connection that is not open any more is forgotten."""
        if connection.open:
            self._idle.append(connection)
        self._release()

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _release(self) -> None:
        if self._free is not None:
            self._free.release()


@dataclass
class _Place(Generic[C]):
    made: asyncio.Task[C] | None = None
    streams: int = 0


class SharedConnections(Generic[C]):
    """So many connections, opened as streams come; a stream goes to the one that carries the fewest."""

    def __init__(self, connections: int, connect: Callable[[], Awaitable[C]]) -> None:
        self._connect = connect
        self._places: list[_Place[C]] = [_Place() for _ in range(connections)]
        self._taken: dict[C, _Place[C]] = {}

    async def take(self, within_s: float) -> tuple[C, bool]:
        """A connection and whether it was there already. Raises OSError or TimeoutError when none can be made."""
        place = min(self._places, key=lambda place: place.streams)
        made, used = place.made, True
        if made is None or (made.done() and (made.cancelled() or made.exception() or not made.result().open)):
            used = False
            place.made = made = asyncio.create_task(self._limited())
        place.streams += 1
        try:
            # Others wait for the same connection: one of them giving up must not take it from the rest.
            async with asyncio.timeout(within_s):
                connection = await asyncio.shield(made)
        except BaseException:
            place.streams -= 1
            raise
        self._taken[connection] = place
        return connection, used

    def give(self, connection: C) -> None:
        self._taken[connection].streams -= 1

    def close(self) -> None:
        for place in self._places:
            made = place.made
            if made is None or not made.done():
                if made is not None:
                    made.cancel()
            elif not made.cancelled() and not made.exception():
                made.result().close()

    async def _limited(self) -> C:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            return await self._connect()


def pool_of(connections: Connections, connect: Callable[[], Awaitable[C]]) -> OwnConnections[C] | SharedConnections[C]:
    """For a protocol whose connections carry many streams: so many that all share, or one a stream."""
    if isinstance(connections, int):
        return SharedConnections(connections, connect)
    return OwnConnections(connections, connect)
