"""What a stretch of wire between two hosts is meant to do to packets."""

from __future__ import annotations

from dataclasses import dataclass

from labkit.errors import UserError

FRAME_BYTES = 1514
"""The longest Ethernet frame: MTU 1500 and the header of 14."""
LEAST_BUFFER_FRAMES = 10


@dataclass(frozen=True)
class Leg:
    """A full-duplex wire: both directions have the same delay, loss, rate and buffer, each its own queue.

    Sizes count Ethernet frames with their header of 14 bytes, without preamble and checksum, as ``tc`` does.
    """

    rtt_ms: float = 0.0
    """Milliseconds that the two directions add to a round trip, half of it each; 0 adds nothing."""
    loss: float = 0.0
    """Chance of every packet, in either direction, to be lost after it has left the queue."""
    rate_mbit: float | None = None
    """10⁶ bit/s each way; None: as fast as this machine forwards packets."""
    buffer_kb: float | None = None
    """Drop-tail buffer before the rate, 1,000 bytes; None: one bandwidth-delay product, at least 10 full frames."""

    def __post_init__(self) -> None:
        if not 0 <= self.rtt_ms <= 10_000:
            raise UserError(f"rtt_ms must be between 0 and 10,000 ms, got {self.rtt_ms!r}")
        if not 0 <= self.loss < 1:
            raise UserError(f"loss is a share of the packets, 0 to below 1 (0.01 is 1 %), got {self.loss!r}")
        if self.rate_mbit is not None and not 0.01 <= self.rate_mbit <= 100_000:
            raise UserError(f"rate_mbit must be between 0.01 and 100,000 Mbit/s, got {self.rate_mbit!r}")
        if self.buffer_kb is not None and self.rate_mbit is None:
            raise UserError("a buffer fills only before a limited rate: give rate_mbit with buffer_kb")
        if self.buffer_kb is not None and not FRAME_BYTES / 1e3 <= self.buffer_kb <= 1e6:
            raise UserError(f"buffer_kb must hold a full frame ({FRAME_BYTES} bytes) at least, got {self.buffer_kb!r}")

    @property
    def one_way_s(self) -> float:
        return self.rtt_ms / 2e3

    @property
    def buffer_bytes(self) -> int | None:
        """None where the rate is not limited."""
        if self.rate_mbit is None:
            return None
        if self.buffer_kb is not None:
            return round(self.buffer_kb * 1e3)
        return max(LEAST_BUFFER_FRAMES * FRAME_BYTES, round(self.rate_mbit * 1e6 / 8 * self.rtt_ms / 1e3))

    def __str__(self) -> str:
        rate = "no limit of the rate" if self.rate_mbit is None else f"{self.rate_mbit:g} Mbit/s"
        buffer = "" if self.buffer_bytes is None else f", buffer {self.buffer_bytes / 1e3:g} kB"
        loss = f"{100 * self.loss:g} % lost" if self.loss else "no loss"
        return f"RTT {self.rtt_ms:g} ms, {loss}, {rate}{buffer}"
