"""``Link``: two or three hosts on this machine, with a wire of known delay, loss, rate and buffer between."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from labkit.errors import UserError
from labkit.link.leg import Leg
from labkit.link.relay import RelayCount, read_count
from labkit.probes.wire import ConnectionState, WireCounters, WireProbe, parse_connections, read_wire

if TYPE_CHECKING:
    from labkit.link.calibrate import Calibration

Mode = Literal["netem", "relay", "delay only"]
HOSTS = (("client", "origin"), ("client", "edge", "origin"))
_ANSWER_S = 20.0
_END_S = 5.0
_CONGESTION = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")


class Link:
    """Hosts in network namespaces of this process's own, for a ``with`` block, as root or as an ordinary user.

    With netem where the kernel has it, otherwise with our relay (one process a direction). Where namespaces are
    refused, a TCP relay on loopback adds the delay and nothing else; ``mode`` says which it is and ``notes`` why. A
    server listens on ``address(host)``; who calls it from another host asks ``endpoint(host, port)`` for where to.
    All of it ends with the block, or with this process, however that ends.

    ``origin_leg`` lies between edge and origin, with hosts=("client", "edge", "origin"); the edge forwards packets, so
    the client reaches the origin over both legs. ``congestion``: what hosts use for connections (cubic, bbr, reno;
    None: the system's). ``seed``: losses of the relay, in the order of packets; netem's where tc can seed.
    """

    def __init__(
        self,
        rtt_ms: float = 40.0,
        loss: float = 0.0,
        rate_mbit: float | None = None,
        buffer_kb: float | None = None,
        congestion: str | None = "cubic",
        seed: int = 0,
        hosts: Sequence[str] = ("client", "origin"),
        origin_leg: Leg | None = None,
        mode: Literal["auto"] | Mode = "auto",
    ) -> None:
        """Raises UserError for values that make no link."""
        if tuple(hosts) not in HOSTS:
            raise UserError(f"hosts must be {' or '.join(map(repr, HOSTS))}, got {tuple(hosts)!r}")
        if (len(hosts) == 3) != (origin_leg is not None):
            raise UserError("origin_leg is the wire between edge and origin: give it with three hosts, and only then")
        if mode not in ("auto", "netem", "relay", "delay only"):
            raise UserError(f"mode must be auto, netem, relay or delay only, got {mode!r}")
        if not 0 <= seed < 2**31:
            raise UserError(f"seed must be between 0 and 2³¹ − 1, got {seed!r}")
        self.hosts = tuple(hosts)
        self.legs = (Leg(rtt_ms, loss, rate_mbit, buffer_kb), *([origin_leg] if origin_leg else []))
        self.congestion, self.seed = congestion, seed
        self.mode: Mode | None = None
        """None outside of the ``with`` block."""
        self.notes: list[str] = []
        """What is not as one might think: why there are no namespaces, what could not be set."""
        self._wanted = mode
        self._helper: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._holders: dict[str, int] = {}
        self._addresses: dict[str, str] = {}
        self._user_namespace = False
        self._children: list[subprocess.Popen[Any]] = []
        self._forwarded: dict[tuple[str, int], int] = {}

    def __enter__(self) -> Link:
        """Raises UserError when a mode was asked for that this machine refuses, or an unknown congestion control."""
        if self._helper is not None:
            raise RuntimeError("this link is open already")
        self._check_congestion(self.congestion)
        try:
            built: dict[str, Any] = {"refused": "asked for"} if self._wanted == "delay only" else self._build()
            if "refused" not in built:
                self.mode, self.notes = built["mode"], built["notes"]
                self._holders, self._addresses = built["holders"], built["addresses"]
                self._user_namespace = built["user_namespace"]
            elif self._wanted in ("auto", "delay only"):
                self._delay_only(built["refused"])
            else:
                raise UserError(f"a link by {self._wanted} is not possible here: {built['refused']}")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def address(self, host: str) -> str:
        """The IPv4 address on which a process of ``host`` listens."""
        self._check(host)
        return self._addresses[host]

    def endpoint(self, host: str, port: int) -> tuple[str, int]:
        """Where another host reaches what listens on ``port`` of ``host``: (address, port), the same in both modes of
        namespaces, a port of the delaying relay where there are none."""
        self._check(host)
        if self.mode != "delay only":
            return self._addresses[host], port
        if (host, port) not in self._forwarded:
            self._forwarded[host, port] = int(self._ask({"do": "forward", "port": port}))
        return "127.0.0.1", self._forwarded[host, port]

    def popen(self, host: str, argv: Sequence[str | Path], **options: Any) -> subprocess.Popen[Any]:
        """``subprocess.Popen`` inside ``host``; what still runs there is killed when the link ends.

        Only the network is another one: files, users and process numbers stay. For an ordinary user the process sees
        itself as root, without the rights of root outside. Raises UserError when there is no such program.
        """
        self._check(host)
        command = [str(word) for word in argv]
        found = shutil.which(command[0], path=(options.get("env") or os.environ).get("PATH"))
        if found is None:
            raise UserError(f"there is no program {command[0]!r} to run on the {host}")
        process: subprocess.Popen[Any] = subprocess.Popen([*self._into(host), found, *command[1:]], **options)
        self._children.append(process)
        if self.mode == "delay only":
            self._ask({"do": "adopt", "pid": process.pid})
        return process

    def counters(self, host: str) -> WireCounters:
        """What the wire of ``host`` has carried since the link began. Raises UserError in mode "delay only"."""
        return read_wire(self._holder(host))

    def probe(self, host: str) -> WireProbe:
        """The same for a ``Sampler``, named after the host."""
        return WireProbe(self._holder(host), f"wire {host}")

    def connections(self, host: str) -> list[ConnectionState]:
        """The established TCP connections of ``host``, by ``ss -tin`` inside it."""
        self._holder(host)
        command = [*self._into(host), "ss", "-Htin", "state", "established"]
        return parse_connections(subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout)

    def relayed(self) -> list[RelayCount]:
        """What each direction of the relay has done with packets; empty in the other modes."""
        return [read_count(label, words) for label, words in self._ask({"do": "count"})] if self.mode == "relay" else []

    def kept_up(self, before: Sequence[RelayCount]) -> list[str]:
        """Why a run since ``before``, an earlier ``relayed()``, gives no verdict: missed frames or late ones."""
        from labkit.link.calibrate import relay_reasons

        return relay_reasons([now - then for now, then in zip(self.relayed(), before, strict=True)], self.legs)

    def reseed(self, seed: int) -> None:
        """The relay's losses begin anew from ``seed``: the same traffic meets the same ones. Other modes do nothing."""
        if not 0 <= seed < 2**31:
            raise UserError(f"seed must be between 0 and 2³¹ − 1, got {seed!r}")
        if self.mode == "relay":
            self._ask({"do": "reseed", "seed": seed})

    def change(self, leg: Leg, congestion: str | None = "cubic") -> None:
        """Another wire at the client, with the servers left running: what is on its way is lost, connections that are
        open keep their congestion control, losses begin anew from the seed. Raises UserError as ``with`` does."""
        self._check_congestion(congestion)
        legs = (leg, *self.legs[1:])
        if self.mode == "delay only":
            self._ask({"do": "delay", "one_way_s": float(sum(each.one_way_s for each in legs))})
        else:
            described = [dataclasses.asdict(each) for each in legs]
            self.notes = self._ask({"do": "change", "legs": described, "congestion": congestion})
        self.legs, self.congestion = legs, congestion

    def calibrate(self, seconds: float = 3.0) -> Calibration:
        """Measures RTT, loss, rate and buffer of every leg against what was asked for. Nothing else may use the link.

        Takes about ``seconds`` (0.5 to 120) and a few round trips. Losses begin anew from the seed afterwards.
        """
        from labkit.link.calibrate import calibrate

        return calibrate(self, seconds)

    def pcap(self, path: Path | str, host: str = "client") -> contextlib.AbstractContextManager[None]:
        """Within its block, writes every packet of ``host`` to ``path``, for Wireshark or tcpdump."""
        from labkit.link.pcap import capture

        self._holder(host)
        return capture(self, Path(path), host)

    def _build(self) -> dict[str, Any]:
        spec = {
            "hosts": self.hosts,
            "legs": [dataclasses.asdict(leg) for leg in self.legs],
            "seed": self.seed,
            "congestion": self.congestion,
            "mode": self._wanted,
        }
        if not sys.platform.startswith("linux"):
            return {"refused": "network namespaces are Linux's"}
        return self._start("labkit.link.keeper", json.dumps(spec))

    def _delay_only(self, reason: str) -> None:
        self._stop_helper()
        self._start("labkit.link.delay", str(sum(leg.one_way_s for leg in self.legs)))
        self.mode = "delay only"
        self.notes = [f"delay only, no packets: {reason}"]
        self._addresses = dict.fromkeys(self.hosts, "127.0.0.1")

    def _start(self, module: str, argument: str) -> dict[str, Any]:
        self._answers = queue.SimpleQueue()
        self._helper = subprocess.Popen(
            [sys.executable, "-m", module, str(os.getpid()), argument],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the process that made the link
        )
        threading.Thread(target=_listen, args=(self._helper, self._answers), daemon=True).start()
        answer: dict[str, Any] = json.loads(self._next_answer())
        return answer

    def _ask(self, command: dict[str, Any]) -> Any:
        with self._lock:
            if self._helper is None or self._helper.stdin is None:
                raise RuntimeError("the link is not open")
            self._helper.stdin.write(json.dumps(command) + "\n")
            self._helper.stdin.flush()
            return json.loads(self._next_answer())

    def _next_answer(self) -> str:
        try:
            line = self._answers.get(timeout=_ANSWER_S)
        except queue.Empty:
            line = ""
        if not line:
            raise RuntimeError("the helper process of the link does not answer; its error is above, if it had one")
        return line

    def _into(self, host: str) -> list[str]:
        if self.mode == "delay only":
            return []
        user = ["--user", "--preserve-credentials"] if self._user_namespace else []
        return ["nsenter", "--target", str(self._holders[host]), *user, "--net", "--"]

    def _check(self, host: str) -> None:
        if self.mode is None:
            raise RuntimeError("the link is not open: use it in a `with` block")
        if host not in self.hosts:
            raise UserError(f"this link has the hosts {', '.join(self.hosts)}, not {host!r}")

    def _holder(self, host: str) -> int:
        self._check(host)
        if self.mode == "delay only":
            raise UserError(f"no wire to look at: {'; '.join(self.notes)}")
        return self._holders[host]

    @staticmethod
    def _check_congestion(congestion: str | None) -> None:
        known = _CONGESTION.read_text().split() if _CONGESTION.exists() else []
        if congestion is not None and known and congestion not in known:
            raise UserError(
                f"this kernel has no congestion control {congestion!r}, only {', '.join(known)} "
                f"(as root, `modprobe tcp_{congestion}` may add it)"
            )

    def _end(self) -> None:
        self._stop_helper()
        for process in self._children:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
        self._children.clear()
        self._forwarded.clear()
        self.mode = None

    def _stop_helper(self) -> None:
        helper, self._helper = self._helper, None
        if helper is None:
            return
        assert helper.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            helper.stdin.close()
        try:
            helper.wait(_END_S)
        except subprocess.TimeoutExpired:
            helper.kill()
            helper.wait()


def _listen(helper: subprocess.Popen[str], answers: queue.SimpleQueue[str]) -> None:
    assert helper.stdout is not None
    with helper.stdout:
        for line in helper.stdout:
            answers.put(line)
    answers.put("")
