"""Writes the packets of one host in the classic pcap format, for Wireshark and tcpdump.

``python -m labkit.link.pcap PATH`` captures every interface but loopback of the namespace it runs in until SIGTERM.
Format: https://www.ietf.org/archive/id/draft-ietf-opsawg-pcap-05.html, with nanoseconds and Ethernet headers.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.errors import UserError

if TYPE_CHECKING:
    from labkit.link.link import Link

_MAGIC_NANOSECONDS, _ETHERNET, _SNAP_BYTES = 0xA1B23C4D, 1, 65535
_HEADER = struct.pack("=IHHiIII", _MAGIC_NANOSECONDS, 2, 4, 0, 0, _SNAP_BYTES, _ETHERNET)
_ETH_P_ALL = 3
_SO_TIMESTAMPNS = 35
_BUFFER_BYTES = 32 << 20
_CLOSE_S = 10.0


@contextlib.contextmanager
def capture(link: Link, path: Path, host: str) -> Iterator[None]:
    """A capturing process in ``host`` while the block runs. Raises UserError if ``path`` cannot be written."""
    try:
        path.write_bytes(b"")
    except OSError as error:
        raise UserError(f"cannot write packets to {path}: {error.strerror}") from error
    command = [sys.executable, "-m", "labkit.link.pcap", str(path.absolute())]
    process = link.popen(host, command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        if not process.stdout.readline():
            raise RuntimeError(f"the capture on the {host} ended; its error is above")
        yield
    finally:
        process.terminate()
        try:
            process.communicate(timeout=_CLOSE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def main(path: str) -> None:
    """Prints a line when it has begun; on SIGTERM writes what the kernel has captured already, and ends."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)) as sock, open(path, "wb") as file:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        wake, stop = os.pipe()

        def ends(*_: Any) -> None:
            os.close(stop)
            sock.setblocking(False)

        signal.signal(signal.SIGTERM, ends)
        file.write(_HEADER)
        file.flush()
        print("capturing", flush=True)
        with contextlib.suppress(BlockingIOError):
            _write_frames(sock, file, wake)


def _write_frames(sock: socket.socket, file: Any, wake: int) -> None:
    """Until ``wake`` is closed at its other end; then raises BlockingIOError when nothing is left to be read."""

    room = socket.CMSG_SPACE(16)
    while True:
        readable, _, _ = select.select([sock.fileno(), wake], [], [])
        if sock.fileno() not in readable:
            return
        frame, extra, _, sender = sock.recvmsg(_SNAP_BYTES, room)
        if sender[0] == "lo":
            continue
        seconds, nanoseconds = struct.unpack("qq", extra[0][2])
        file.write(struct.pack("=IIII", seconds, nanoseconds, len(frame), len(frame)) + frame)


if __name__ == "__main__":
    main(sys.argv[1])
