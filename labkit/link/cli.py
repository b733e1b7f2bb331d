"""The ``labkit link`` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from labkit.link.calibrate import Calibration


def link(
    command: Annotated[
        list[str] | None, typer.Argument(help="After --: a command to run on the client, instead of calibrating.")
    ] = None,
    rtt_ms: Annotated[float, typer.Option(help="Round trip, in milliseconds.")] = 40.0,
    loss: Annotated[float, typer.Option(help="Share of packets lost each way: 0.01 is 1 %.")] = 0.0,
    rate_mbit: Annotated[float | None, typer.Option(help="Mbit/s each way; absent: no limit.")] = None,
    buffer_kb: Annotated[
        float | None, typer.Option(help="Drop-tail buffer, 1,000 bytes; absent: one bandwidth-delay product.")
    ] = None,
    congestion: Annotated[str, typer.Option(help="Congestion control of TCP: cubic, bbr or reno.")] = "cubic",
    seed: Annotated[int, typer.Option(help="Seed of the losses.")] = 0,
    serving: Annotated[
        str | None, typer.Option(help="A command to run on the origin beside it, such as a server.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long a calibration takes.")] = 3.0,
    pcap: Annotated[Path | None, typer.Option(help="Write the client's packets to this file.")] = None,
    mode: Annotated[
        Literal["auto", "netem", "relay", "delay only"], typer.Option(help="What makes the link.")
    ] = "auto",
) -> None:
    """Make a link between two hosts of its own on this machine (client 10.77.0.1, origin 10.77.0.2), and measure it or
    run a command at the end of it. Nothing of it is left afterwards.

    labkit link --rtt-ms 40 --loss 0.01 --rate-mbit 20

    labkit link --serving "python3 -m http.server 80" -- curl -sI --retry 5 --retry-connrefused http://10.77.0.2/
    """
    import contextlib
    import shlex

    from labkit.link.link import Link

    with contextlib.ExitStack() as stack:
        made = stack.enter_context(Link(rtt_ms, loss, rate_mbit, buffer_kb, congestion, seed, mode=mode))
        for note in made.notes:
            print(f"labkit: {note}", file=sys.stderr)
        if pcap is not None:
            stack.enter_context(made.pcap(pcap))
        if serving is not None:
            made.popen("origin", shlex.split(serving))
        if command:
            status = made.popen("client", command).wait()
        else:
            calibration = made.calibrate(seconds)
            _show(calibration)
            status = 0 if calibration.valid else 1
    if status:
        raise typer.Exit(status if status > 0 else 128 - status)


def _show(calibration: Calibration) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "asked for", "measured", box=None, pad_edge=False, header_style="bold")
    for leg in calibration.legs:
        asked = leg.nominal
        table.add_row(f"{leg.name}: RTT", f"{asked.rtt_ms:g} ms", f"{leg.rtt_ms:.3g} ms")
        if leg.directions:
            low, high = (f"{100 * share:.3g}" for share in leg.loss_interval())
            measured = f"{leg.lost / leg.sent:.3%} of {leg.sent:,} ({low} to {high} % at 99 %)"
            table.add_row("loss", f"{asked.loss:.3%}", measured)
        for each in leg.directions:
            rate = "no limit" if asked.rate_mbit is None else f"{asked.rate_mbit:g} Mbit/s"
            found = "not measured" if each.rate_mbit != each.rate_mbit else f"{each.rate_mbit:.4g} Mbit/s"
            table.add_row(f"{each.direction}: rate", rate, found)
            if asked.buffer_bytes is not None:
                full = "not filled" if each.buffer_kb != each.buffer_kb else f"{each.buffer_kb:.4g} kB"
                table.add_row(f"{each.direction}: buffer", f"{asked.buffer_bytes / 1e3:g} kB", full)
    for count in calibration.relay:
        late = f"{count.late_mean_ms:.2g} ms on average, 99 % within {count.late_ms(0.99):.2g} ms"
        table.add_row(f"{count.direction}: late, under the burst too", "", late)
    if calibration.congestion:
        table.add_row(
            "congestion control", calibration.asked_congestion, ", ".join(sorted(set(calibration.congestion)))
        )
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    print(f"made by {calibration.mode}; " + ("valid" if calibration.valid else "off: no verdict over this link"))
    for reason in calibration.reasons():
        print(f"  {reason}")
