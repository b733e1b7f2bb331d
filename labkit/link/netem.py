"""A leg by the kernel's own means where it has them: netem for delay and loss, tbf for rate and drop-tail buffer."""

from __future__ import annotations

import subprocess

from labkit.link.leg import FRAME_BYTES, Leg

_MOST_PACKETS = 1_000_000
_TICK_S = 0.002
"""What tbf may send at once: enough for two ticks of a slow kernel clock."""


def netem_available() -> str | None:
    """None if this network namespace takes a netem; otherwise the reason why not, in tc's words."""
    for command in ("tc qdisc add dev lo root netem limit 10 delay 1ms", "ip link add probe0 type bridge"):
        tried = subprocess.run(command.split(), capture_output=True, text=True)
        if tried.returncode:
            return " ".join(tried.stderr.split()) or f"`{command}` failed"
    subprocess.run("tc qdisc del dev lo root".split(), check=True, capture_output=True)
    subprocess.run("ip link del probe0".split(), check=True, capture_output=True)
    return None


def queue_commands(interface: str, leg: Leg, seed: int | None) -> list[list[str]]:
    """The commands of tc that turn what leaves ``interface`` into one direction of ``leg``.

    The loss is thrown before the queue here, after it in the relay: with netem a lost packet takes no part of the rate.
    """
    netem = ["qdisc", "add", "dev", interface, "root", "handle", "1:", "netem", "limit", str(_MOST_PACKETS)]
    netem += ["delay", f"{leg.one_way_s * 1e6:.0f}us"]
    if leg.loss:
        netem += ["loss", f"{leg.loss * 100:.6f}%"]
        netem += [] if seed is None else ["seed", str(seed)]
    commands = [netem]
    if leg.rate_mbit is not None:
        burst = max(2 * FRAME_BYTES, round(leg.rate_mbit * 1e6 / 8 * _TICK_S))
        tbf = ["qdisc", "add", "dev", interface, "parent", "1:1", "handle", "10:", "tbf"]
        tbf += ["rate", f"{leg.rate_mbit * 1e6:.0f}bit", "burst", f"{burst}b", "limit", f"{leg.buffer_bytes}b"]
        commands.append(tbf)
    return commands


def join(first: str, second: str, number: int) -> None:
    """Bridges two interfaces of this namespace. Raises subprocess.CalledProcessError."""
    bridge = f"bridge{number}"
    _run(["ip", "link", "add", bridge, "type", "bridge", "stp_state", "0", "mcast_snooping", "0"])
    for interface in (first, second):
        _run(["ip", "link", "set", interface, "master", bridge])
    _run(["ip", "link", "set", bridge, "addrgenmode", "none", "up"])


def shape(first: str, second: str, leg: Leg, seed: int, number: int) -> bool:
    """Makes ``leg`` of what lies between two bridged interfaces, whatever it was before. True if the loss is seeded.

    Older versions of tc know no seed. Raises subprocess.CalledProcessError.
    """
    seeded = True
    for direction, interface in enumerate((second, first)):
        # There is none at first, and then tc complains.
        subprocess.run(["tc", "qdisc", "del", "dev", interface, "root"], capture_output=True)
        netem, *rest = queue_commands(interface, leg, seed * 4 + number * 2 + direction + 1)
        if subprocess.run(["tc", *netem], capture_output=True).returncode:
            seeded = not leg.loss
            netem = queue_commands(interface, leg, None)[0]
            _run(["tc", *netem])
        for command in rest:
            _run(["tc", *command])
    return seeded


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
