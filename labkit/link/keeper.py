"""The helper process of a link: it holds the namespaces and the relays, and ends them with the process that asked.

``python -m labkit.link.keeper PARENT SPEC`` prints one line of JSON ({"mode": …} or {"refused": reason}), then answers
one line of standard input after the other. It ends when its input ends or the parent does, whatever killed that: it
kills every process inside its namespaces, and a namespace without processes is gone with all its interfaces.
Nothing outside of them is changed: there are no names in /run/netns, and the interfaces are born inside.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from labkit.link import namespaces as ns
from labkit.link import netem, relay
from labkit.link.leg import Leg

_PREFIX = "10.77"
_SYSCTLS = {
    # A connection must not begin with what the kernel remembers of an earlier one to the same address.
    "net/ipv4/tcp_no_metrics_save": "1",
    "net/ipv4/ip_forward": "1",
}


class Refused(Exception):
    """This machine or this user may not have namespaces; the message says why."""


class Keeper:
    """The hosts of one link, one network namespace each, and one in the middle that holds the wires."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.hosts: list[str] = spec["hosts"]
        self.legs = [Leg(**leg) for leg in spec["legs"]]
        self.seed: int = spec["seed"]
        self.congestion: str | None = spec["congestion"]
        self.wanted: str = spec["mode"]
        self.holders: dict[str, int] = {}
        self.notes: list[str] = []
        self.tallies: list[tuple[str, memoryview]] = []
        self.mode = ""
        self._relays: dict[tuple[int, int], int] = {}
        self.user_namespace = False
        self._outside = ns.network_id()

    def build(self) -> dict[str, Any]:
        """Raises Refused, with every process that was begun still inside the namespaces."""
        for tool in ("ip", "tc", "nsenter"):
            if shutil.which(tool) is None:
                raise Refused(f"`{tool}` is not installed (packages iproute2 and util-linux)")
        self._enter()
        try:
            for host in self.hosts:
                self.holders[host] = _hold_namespace()
            for number, _ in enumerate(self.legs):
                self._lay_wire(number)
            self._write_sysctls()
            self._route()
            self.mode = self._connect()
        except subprocess.CalledProcessError as error:
            raise Refused(f"`{' '.join(error.cmd)}`: {' '.join((error.stderr or '').split())}") from error
        except OSError as error:
            raise Refused(str(error)) from error
        return {
            "mode": self.mode,
            "holders": self.holders,
            "user_namespace": self.user_namespace,
            "addresses": {host: self._address(host) for host in self.hosts},
            "notes": self.notes,
        }

    def _enter(self) -> None:
        try:
            ns.unshare_network()
        except OSError as as_root:
            try:
                ns.unshare_user_and_network()
            except OSError as as_user:
                raise Refused(f"network namespaces are refused ({as_root}; {as_user})") from as_user
            self.user_namespace = True

    def _lay_wire(self, number: int) -> None:
        """Two veth pairs: each end of the leg, and what is in the middle namespace between them."""
        left, right = self.hosts[number], self.hosts[number + 1]
        for side, (host, interface) in enumerate(((left, "eth1" if number else "eth0"), (right, "eth0"))):
            holder, middle = self.holders[host], _ends(number)[side]
            own, other = self._number(number, side), self._number(number, 1 - side)
            _ip(f"link add {middle} type veth peer name {interface} address {own[1]} netns {holder}")
            _ip(f"link set {middle} addrgenmode none up")
            with ns.network_of(holder):
                ns.offloads_off(interface)
                _ip("link set lo up")
                _ip(f"link set {interface} addrgenmode none up")
                _ip(f"address add {own[0]}/24 dev {interface} noprefixroute")
                # Address resolution would be lost and delayed like everything else, and be part of what is measured.
                _ip(f"neighbour replace {other[0]} lladdr {other[1]} dev {interface} nud permanent")

    def _number(self, leg: int, side: int) -> tuple[str, str]:
        """Address and MAC of one end of a leg."""
        return f"{_PREFIX}.{leg}.{side + 1}", f"02:00:00:00:{leg:02x}:{side + 1:02x}"

    def _address(self, host: str) -> str:
        """A host in the middle is known by its address on the client's leg."""
        position = self.hosts.index(host)
        return self._number(max(position - 1, 0), min(position, 1))[0]

    def _route(self) -> None:
        congctl = f" congctl {self.congestion}" if self.congestion else ""
        for position, host in enumerate(self.hosts):
            near = [leg for leg in range(len(self.legs)) if leg in (position - 1, position)]
            with ns.network_of(self.holders[host]):
                for leg in near:
                    side, device = (1, "eth0") if leg == position - 1 else (0, "eth1" if position else "eth0")
                    own = self._number(leg, side)[0]
                    _ip(f"route replace {_PREFIX}.{leg}.0/24 dev {device} src {own} scope link{congctl}")
                for leg in set(range(len(self.legs))) - set(near):  # beyond the host in the middle
                    via = self._number(0, 1)[0] if position == 0 else self._number(1, 0)[0]
                    _ip(f"route replace {_PREFIX}.{leg}.0/24 via {via}{congctl}")

    def _write_sysctls(self) -> None:
        refused = set()
        for holder in self.holders.values():
            with ns.network_of(holder):
                for name, value in _SYSCTLS.items():
                    try:
                        Path("/proc/sys", name).write_text(value)
                    except OSError:
                        refused.add(name)
        if "net/ipv4/ip_forward" in refused and len(self.hosts) > 2:
            raise Refused("/proc/sys/net cannot be written, and three hosts need one that forwards")
        if "net/ipv4/tcp_no_metrics_save" in refused:
            self.notes.append("the kernel remembers earlier connections (tcp_no_metrics_save could not be set)")

    def _connect(self) -> str:
        reason = netem.netem_available() if self.wanted != "relay" else "the relay was asked for"
        if reason is not None and self.wanted == "netem":
            raise Refused(f"this kernel has no netem: {reason}")
        for number, leg in enumerate(self.legs):
            ends = _ends(number)
            if reason is None:
                netem.join(*ends, number)
                self._shape(number, leg)
                continue
            names = self.hosts[number : number + 2]
            for direction in (0, 1):
                label = " to ".join(names if direction == 0 else names[::-1])
                self.tallies.append((label, memoryview(mmap.mmap(-1, 8 * relay.TALLY_WORDS)).cast("q")))
            self._relay(number, leg)
        return "netem" if reason is None else "relay"

    def _shape(self, number: int, leg: Leg) -> None:
        note = "this version of tc cannot seed netem's losses"
        if not netem.shape(*_ends(number), leg, self.seed, number) and note not in self.notes:
            self.notes.append(note)

    def _relay(self, number: int, leg: Leg) -> None:
        """Both directions of a leg; those that carried it before are ended."""
        for direction, (source, target) in enumerate((_ends(number), _ends(number)[::-1])):
            if (before := self._relays.pop((number, direction), None)) is not None:
                os.kill(before, signal.SIGKILL)
                os.waitpid(before, 0)
            place, words = (number, direction), self.tallies[2 * number + direction][1]
            self._relays[place] = _start_relay(source, target, leg, self.seed, place, words)

    def change(self, legs: list[Leg], congestion: str | None) -> None:
        """Other wires between the same hosts. What is on its way is lost; counts go on."""
        if congestion != self.congestion:
            self.congestion = congestion
            self._route()
        for number, (leg, before) in enumerate(zip(legs, self.legs, strict=True)):
            if leg != before:
                (self._shape if self.mode == "netem" else self._relay)(number, leg)
        self.legs = legs

    def answer(self, command: dict[str, Any]) -> Any:
        match command:
            case {"do": "count"}:
                return [(label, list(words)) for label, words in self.tallies]
            case {"do": "reseed", "seed": int(seed)}:
                for _, words in self.tallies:
                    relay.reseed(words, seed)
                return len(self.tallies)
            case {"do": "change", "legs": legs, "congestion": congestion}:
                self.change([Leg(**leg) for leg in legs], congestion)
                return self.notes
        raise ValueError(f"unknown command {command!r}")

    def end(self) -> None:
        """Kills whatever is inside the namespaces, within two seconds, and never anything outside of them."""
        own = {ns.network_id(), *(ns.network_id(pid) for pid in self.holders.values())} - {self._outside}
        for _ in range(100):
            inside = ns.members(own)
            if not inside:
                return
            for pid in inside:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(0.02)


def _ends(number: int) -> tuple[str, str]:
    """The interfaces in the middle between which a leg lies."""
    return f"wire{number}a", f"wire{number}b"


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True, text=True)


def _hold_namespace() -> int:
    """A child that does nothing but keep a network namespace of its own. Its pid."""
    parent = os.getpid()
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            ns.die_with_parent(parent)
            ns.unshare_network()
            os.write(tell, b"1")
            while True:
                signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    with os.fdopen(ready, "rb") as pipe:
        if pipe.read(1) != b"1":
            raise OSError("a second network namespace is refused")
    return child


def _start_relay(source: str, target: str, leg: Leg, seed: int, place: tuple[int, int], words: memoryview) -> int:
    """Its pid."""
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            ns.die_with_parent(parent)
            os.close(0)
            relay.raise_priority()
            relay.forward(source, target, leg, seed, place, words)
        except BaseException as error:
            print(f"labkit: the relay from {source} to {target} failed: {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(1)
    return child


def serve(keeper: Keeper, parent: int) -> None:
    """Answers until standard input or the parent ends."""
    watched = os.pidfd_open(parent)
    rest = b""
    while True:
        readable, _, _ = select.select([0, watched], [], [])
        if watched in readable:
            return
        read = os.read(0, 65536)
        if not read:
            return
        *lines, rest = (rest + read).split(b"\n")
        for line in lines:
            print(json.dumps(keeper.answer(json.loads(line))), flush=True)


def main(parent: int, spec: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keeper = Keeper(spec)
    try:
        if os.getppid() != parent:
            return
        try:
            print(json.dumps(keeper.build()), flush=True)
        except Refused as reason:
            print(json.dumps({"refused": str(reason)}), flush=True)
            return
        serve(keeper, parent)
    except BrokenPipeError:
        pass
    finally:
        keeper.end()


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
