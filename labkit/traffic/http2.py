"""What both ends of an HTTP/2 connection need beside the ``h2`` library: windows, and data that waits for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from h2.config import H2Configuration
from h2.connection import ConnectionInputs, H2Connection, H2ConnectionStateMachine
from h2.events import Event
from h2.exceptions import FrameTooLargeError
from h2.settings import SettingCodes, Settings

Header = tuple[bytes, bytes]

WINDOW_BYTES = 2**31 - 1
"""The largest flow-control window there is: the peer shall never wait for us."""
FIRST_WINDOW_BYTES = 2**16 - 1


DATA = 0
SETTINGS = 4
"""Types of frames; SETTINGS come first."""
HEADER_BYTES = 9
MOST_FRAME_BYTES = 2**14
"""What a peer may send in a frame unless told otherwise."""


class _GoingOn(H2ConnectionStateMachine):
    """After a GOAWAY the streams below its last go on; h2's own machine takes the connection for closed."""

    def process_input(self, input_: ConnectionInputs) -> list[Event]:
        return [] if input_ is ConnectionInputs.RECV_GOAWAY else super().process_input(input_)


def open_connection(client: bool, **settings: int) -> H2Connection:
    """A connection whose peer may send as much as it likes; ``settings`` by the names of ``SettingCodes``. Headers are
    bytes, and neither end's are checked: that costs more than all else does."""
    connection = H2Connection(
        H2Configuration(
            client_side=client, header_encoding=None, validate_outbound_headers=False, validate_inbound_headers=False
        )
    )
    connection.state_machine = _GoingOn()
    said = {SettingCodes[name]: value for name, value in settings.items()}
    connection.local_settings = Settings(client, {SettingCodes.INITIAL_WINDOW_SIZE: WINDOW_BYTES, **said})
    connection.initiate_connection()
    connection.increment_flow_control_window(WINDOW_BYTES - FIRST_WINDOW_BYTES)
    return connection


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    whole: bytes
    """Header and all."""


def take_frames(buffer: bytearray) -> Iterator[Frame]:
    """The whole frames at the beginning of ``buffer``, which are taken from it. Raises h2's ProtocolError for one that
    is larger than was agreed, at once (h2 waits until it is all there)."""
    start = 0
    try:
        while len(buffer) - start >= HEADER_BYTES:
            length = int.from_bytes(buffer[start : start + 3], "big")
            if length > MOST_FRAME_BYTES:
                raise FrameTooLargeError(f"a frame of {length} bytes; {MOST_FRAME_BYTES} are agreed on")
            end = start + HEADER_BYTES + length
            if len(buffer) < end:
                return
            stream = int.from_bytes(buffer[start + 5 : start + HEADER_BYTES], "big") & 0x7FFFFFFF
            frame = Frame(buffer[start + 3], buffer[start + 4], stream, bytes(buffer[start:end]))
            start = end
            yield frame
    finally:
        del buffer[:start]


def window_update(size: int) -> bytes:
    """A frame that lets the peer send ``size`` more bytes on the connection."""
    return b"\x00\x00\x04\x08\x00" + bytes(4) + size.to_bytes(4, "big")


def not_http2(first: bytes) -> str:
    """What is wrong with the first bytes of a server, or "" while nothing is: they are a SETTINGS frame.

    h2 would wait for the megabytes that it reads into the length of an HTTP/1.1 status line.
    """
    if len(first) < 4 or first[3] == SETTINGS:
        return ""
    return f"the server does not speak HTTP/2; it says {bytes(first[:40])!r}"


class Inbox:
    """Opens the connection's window again before the peer comes to its end; a stream never gets so far."""

    def __init__(self, connection: H2Connection) -> None:
        self._connection = connection
        self._taken = 0

    def took(self, size: int) -> None:
        self._taken += size
        if self._taken > WINDOW_BYTES // 2:
            self._connection.increment_flow_control_window(self._taken)
            self._taken = 0


@dataclass
class _Rest:
    data: bytearray = field(default_factory=bytearray)
    end: bool = False
    trailers: list[Header] | None = None


class Outbox:
    """Sends data on streams as far as the peer's windows let it, and the rest when they open."""

    def __init__(self, connection: H2Connection) -> None:
        self._connection = connection
        self._rests: dict[int, _Rest] = {}

    def put(self, number: int, data: bytes, end: bool = False, trailers: list[Header] | None = None) -> None:
        """``end`` closes the stream after ``data``; so do ``trailers``, which then follow it."""
        rest = self._rests.setdefault(number, _Rest())
        rest.data += data
        rest.end, rest.trailers = end, trailers
        self._send(number, rest)

    def windows_opened(self) -> None:
        for number, rest in list(self._rests.items()):
            self._send(number, rest)

    def forget(self, number: int) -> None:
        self._rests.pop(number, None)

    def _send(self, number: int, rest: _Rest) -> None:
        connection, ended = self._connection, False
        while rest.data:
            most = min(connection.local_flow_control_window(number), connection.max_outbound_frame_size)
            if most <= 0:
                return
            piece = bytes(rest.data[:most])
            del rest.data[:most]
            ended = rest.end and not rest.data
            connection.send_data(number, piece, end_stream=ended)
        if rest.trailers is not None:
            connection.send_headers(number, rest.trailers, end_stream=True)
        elif rest.end and not ended:
            connection.end_stream(number)
        del self._rests[number]
