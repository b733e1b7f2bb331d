"""Delay without privileges: a TCP relay on the loopback interface that hands on every byte half a round trip later.

``python -m labkit.link.delay PARENT ONE_WAY_S`` answers one line of JSON after the other: {"do": "forward", "port": p}
opens a port that leads to 127.0.0.1:p and says which, {"do": "adopt", "pid": n} names a process that ends with the
link, {"do": "delay", "one_way_s": s} changes the delay. It ends when its input or the parent does. There are no packets
to lose here and no rate.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import selectors
import signal
import socket
import struct
import sys
from typing import Any

from labkit.link.namespaces import wake_on_time

_READ_BYTES = 65536
_MOST_PIECES = 4096
_BACKLOG = 4096
_RESET = struct.pack("ii", 1, 0)
"""Linger for no time: what is closed is reset."""

_Pieces = asyncio.Queue[tuple[float, bytes]]


class _PreciseSelector(selectors.EpollSelector):
    """epoll counts milliseconds and rounds up; a short delay would be too long by a good part of one."""

    def select(self, timeout: float | None = None) -> Any:
        if timeout is not None and timeout > 0:
            select.select([self.fileno()], [], [], timeout)
            timeout = 0
        return super().select(timeout)


class DelayRelay:
    """Ports that lead to others, with ``one_way_s`` in each direction."""

    def __init__(self, one_way_s: float) -> None:
        self.one_way_s = one_way_s
        self.adopted: list[int] = []
        self._servers: list[asyncio.Server] = []
        self._carrying: set[asyncio.Task[None]] = set()

    async def answer(self, command: dict[str, Any]) -> Any:
        match command:
            case {"do": "forward", "port": int(port)}:
                server = await asyncio.start_server(
                    lambda reader, writer: self._begin(port, reader, writer), "127.0.0.1", 0, backlog=_BACKLOG
                )
                self._servers.append(server)
                return server.sockets[0].getsockname()[1]
            case {"do": "adopt", "pid": int(pid)}:
                with contextlib.suppress(ProcessLookupError):
                    self.adopted.append(os.pidfd_open(pid))
                return pid
            case {"do": "delay", "one_way_s": float(one_way_s)}:
                self.one_way_s = one_way_s
                return one_way_s
        raise ValueError(f"unknown command {command!r}")

    def _begin(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._carry(port, reader, writer))
        self._carrying.add(task)
        task.add_done_callback(self._carrying.discard)

    async def _carry(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The client's connection is open at once. The server's opens when it would have: a handshake takes one and a
        half round trips until the server has a connection, and the client's first bytes come with the end of it."""
        opens = asyncio.get_running_loop().time() + 3 * self.one_way_s
        pieces: _Pieces = asyncio.Queue(_MOST_PIECES)
        tasks = [asyncio.create_task(self._collect(reader, pieces, opens))]
        writers = [writer]
        try:
            await asyncio.sleep(3 * self.one_way_s)
            back, onward = await asyncio.open_connection("127.0.0.1", port)
            writers.append(onward)
            for each in writers:
                each.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answers: _Pieces = asyncio.Queue(_MOST_PIECES)
            tasks.append(asyncio.create_task(self._collect(back, answers, 0.0)))
            await asyncio.gather(_hand_on(pieces, onward), _hand_on(answers, writer))
            for each in writers:
                each.close()
        except BaseException as error:
            for each in writers:  # nobody listens, or one end was reset: so is the other
                each.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                each.transport.abort()
            if not isinstance(error, OSError):
                raise
        finally:
            for task in tasks:
                task.cancel()

    async def _collect(self, reader: asyncio.StreamReader, pieces: _Pieces, not_before: float) -> None:
        """Everything that is read, with the time at which it is due; nothing stands for the end."""
        loop, piece = asyncio.get_running_loop(), b"."
        while piece:
            try:
                piece = await reader.read(_READ_BYTES)
            except OSError:
                piece = b""
            await pieces.put((max(loop.time() + self.one_way_s, not_before), piece))

    def end(self) -> None:
        for descriptor in self.adopted:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)


async def _hand_on(pieces: _Pieces, writer: asyncio.StreamWriter) -> None:
    """Writes every piece when it is due, until the end, which is handed on too. Raises OSError."""
    loop = asyncio.get_running_loop()
    while True:
        due, piece = await pieces.get()
        if (wait := due - loop.time()) > 0:
            await asyncio.sleep(wait)
        if not piece:
            if not writer.is_closing():
                await writer.drain()
                writer.write_eof()
            return
        writer.write(piece)
        await writer.drain()


async def serve(relay: DelayRelay, parent: int) -> None:
    """Answers until standard input or the parent ends."""
    loop = asyncio.get_running_loop()
    commands = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    loop.add_reader(os.pidfd_open(parent), commands.feed_eof)
    print(json.dumps({"mode": "delay only"}), flush=True)
    while line := await commands.readline():
        print(json.dumps(await relay.answer(json.loads(line))), flush=True)


def main(parent: int, one_way_s: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    relay = DelayRelay(one_way_s)
    try:
        if os.getppid() == parent:
            wake_on_time()
            with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(_PreciseSelector())) as runner:
                runner.run(serve(relay, parent))
    except BrokenPipeError:
        pass
    finally:
        relay.end()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
