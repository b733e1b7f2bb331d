"""Linux namespaces and the few kernel calls for which Python 3.11 has no function of its own."""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_TIMERSLACK = 1, 29
_SIOCETHTOOL = 0x8946
# Commands of linux/ethtool.h: set the transmit checksum, TSO, GSO; then receive checksum and GRO.
_NEEDED_OFF = {"tx-checksum": 0x17, "tso": 0x1F, "gso": 0x24}
_WELCOME_OFF = {"rx-checksum": 0x15, "gro": 0x2C}
_GET_TX_CHECKSUM = 0x16

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare_network() -> None:
    """Moves this process, which must have one thread, into a new and empty network namespace. Raises OSError."""
    _check(_libc.unshare(CLONE_NEWNET), "a new network namespace")


def unshare_user_and_network() -> None:
    """The same for an ordinary user, who becomes root of a user namespace that holds nobody else. Raises OSError."""
    uid, gid = os.getuid(), os.getgid()
    _check(_libc.unshare(CLONE_NEWUSER | CLONE_NEWNET), "new user and network namespaces")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


@contextlib.contextmanager
def network_of(pid: int) -> Iterator[None]:
    """This thread, and what it starts, is inside the network namespace of process ``pid``. Raises OSError."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    try:
        _check(_libc.setns(there, CLONE_NEWNET), f"entering the network namespace of process {pid}")
        try:
            yield
        finally:
            _check(_libc.setns(own, CLONE_NEWNET), "going back to the own network namespace")
    finally:
        os.close(there)
        os.close(own)


def network_id(pid: int | str = "self") -> str:
    """Names the network namespace of a process: equal for two processes that share one. Raises OSError."""
    return os.readlink(f"/proc/{pid}/ns/net")


def die_with_parent(parent: int) -> None:
    """The kernel kills this process when the thread that forked it ends; exits at once if that was before the call."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0), "PR_SET_PDEATHSIG")
    if os.getppid() != parent:
        os._exit(1)


def wake_on_time() -> None:
    """Lets timers of this process fire within a microsecond instead of 50."""
    _check(_libc.prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0), "PR_SET_TIMERSLACK")


def offloads_off(interface: str) -> None:
    """What leaves ``interface`` of this namespace is what a wire would carry: whole checksums, frames of the MTU.

    Without it the kernel hands 64 KiB "segments" with unfinished checksums through a veth pair. Raises OSError.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for command in _NEEDED_OFF.values():
            _ethtool(sock, interface, command, 0)
        for command in _WELCOME_OFF.values():
            with contextlib.suppress(OSError):
                _ethtool(sock, interface, command, 0)
        if _ethtool(sock, interface, _GET_TX_CHECKSUM, 0):
            raise OSError(f"{interface}: the checksum offload cannot be turned off")


def _ethtool(sock: socket.socket, interface: str, command: int, value: int) -> int:
    asked = array.array("I", [command, value])
    request = struct.pack("16sP16x", interface.encode(), asked.buffer_info()[0])
    fcntl.ioctl(sock, _SIOCETHTOOL, request)
    return asked[1]


def members(namespaces: Iterable[str]) -> list[int]:
    """The processes, this one aside, that are inside one of the network namespaces, as far as this user may see."""
    wanted, found = set(namespaces), []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                if network_id(entry) in wanted:
                    found.append(int(entry))
    return found
