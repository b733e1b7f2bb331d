"""Clients that leave what was sent to them unread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any


class Unread(Exception):
    """The client leaves what was sent to it unread."""


class Outbox:
    """Sends of one request, one after the other. One timer watches them all: one for each would cost more than a send
    itself."""

    def __init__(self, seconds: float) -> None:
        """``seconds``: how long a send may wait for the client to make room."""
        self._seconds = seconds
        self._since: float | None = None

    async def put(self, sending: Awaitable[Any]) -> None:
        """Waits while the client's and the server's buffers are full."""
        self._since = time.monotonic()
        await sending
        self._since = None

    async def first_of(self, *tasks: asyncio.Task[Any]) -> None:
        """Returns once one of ``tasks`` is done. Raises Unread when a send waits for too long."""
        while True:
            done, _ = await asyncio.wait(tasks, timeout=self._seconds / 4, return_when=asyncio.FIRST_COMPLETED)
            if done:
                return
            if self._since is not None and time.monotonic() - self._since > self._seconds:
                raise Unread
