"""What both ends of an HTTP/3 connection need beside the ``aioquic`` library: a socket that is read in batches, packets
that many streams share, a connection that stays while it is used, and the end of one noticed at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from aioquic.asyncio import QuicConnectionProtocol
from aioquic.buffer import Buffer
from aioquic.h3.connection import ErrorCode, H3Connection
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.congestion.base import register_congestion_control
from aioquic.quic.congestion.cubic import CubicCongestionControl
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import (
    ConnectionTerminated,
    HandshakeCompleted,
    ProtocolNegotiated,
    QuicEvent,
    StopSendingReceived,
)
from aioquic.quic.packet import (
    QuicErrorCode,
    QuicPacketType,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from aioquic.quic.packet_builder import QuicPacketBuilder, QuicPacketBuilderStop
from aioquic.quic.stream import QuicStream

PACKET_BYTES = 1350
"""Of UDP payload. With the headers of IPv6 it fits an MTU of 1500, and that of a tunnel on such a path."""
BUFFER_BYTES = 4 << 20
"""Asked of the kernel for datagrams that wait to be read, as far as it gives so much."""
BATCH = 64
"""Most datagrams that are read before others have their turn."""
WINDOW_BYTES = 1 << 40
"""For a peer that shall never wait for us."""
IDLE_S = 30.0
"""A peer that is silent for so long is gone."""
PING_S = 10.0
"""How often a connection in use says so, that neither end takes the other for gone while a prompt is worked on."""
ACK_S = 0.001
"""How long what came may wait for its acknowledgement, so that several packets are acknowledged together."""

FIRST_BYTES = 1200
"""Least size of a client's first datagram (RFC 9000, 14.1)."""
LEAST_FRAME_BYTES = 32
"""With less room than this a packet is full."""
TOGETHER = 64
"""Streams that one packet may have frames of."""

BROKEN = {
    QuicErrorCode.NO_ERROR,
    QuicErrorCode.INTERNAL_ERROR,  # aioquic's name for a peer that was silent for too long
    ErrorCode.H3_NO_ERROR,
    ErrorCode.H3_INTERNAL_ERROR,
    ErrorCode.H3_REQUEST_CANCELLED,
}
"""Codes of connections that ended without anybody having broken the protocol."""
CERTIFICATE_ALERTS = range(42, 50)
"""Of TLS (RFC 8446, 6)."""

# Whatever ends a connection is in the records and the metrics; aioquic would say it on the terminal besides.
logging.getLogger("quic").setLevel(logging.CRITICAL)


class Cubic(CubicCongestionControl):
    """CUBIC, as TCP has by default, with slow start up to the first loss (RFC 9002, 7.3.1). aioquic ends it when the
    round trip gets longer, too, and so it does when an end waits for a core: with 300 streams the window then stays
    for seconds below what they need."""

    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        self.rtt = rtt


register_congestion_control("labkit", Cubic)


def quic_settings(client: bool, **more: Any) -> QuicConfiguration:
    """The configuration of either end."""
    return QuicConfiguration(
        is_client=client,
        alpn_protocols=["h3"],
        congestion_control_algorithm="labkit",
        idle_timeout=IDLE_S,
        max_datagram_size=PACKET_BYTES,
        **more,
    )


def reason(end: ConnectionTerminated) -> str:
    """What the end of a connection says of itself, in words."""
    codes: Any = ErrorCode if end.frame_type is None else QuicErrorCode
    if end.frame_type is not None and end.error_code - QuicErrorCode.CRYPTO_ERROR in CERTIFICATE_ALERTS:
        return f"the certificate is not trusted: {end.reason_phrase or 'the other end says so'}"
    name = next((each.name for each in codes if each == end.error_code), f"{end.error_code:#x}")
    return f"{name}: {end.reason_phrase}" if end.reason_phrase else name


class ManyStreams(QuicConnection):
    """aioquic looks at every stream for every packet, also at those that have nothing to say, and at the rest of them
    once the packet is full: of 300 streams that takes several times as long as all else together. Here it sees a few
    of those that have something to say at a time. The packets are its own, and nobody is served out of turn."""

    _full = False
    _served: dict[QuicStream, None]

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, Any]]:
        streams, queue = self._streams, self._streams_queue
        ended = {number: stream for number, stream in streams.items() if stream.is_finished}
        self._streams = {number: stream for number, stream in streams.items() if _wants_window(stream)} | ended
        self._served = {}
        busy = [stream for stream in queue if _is_busy(stream)]
        datagrams: list[tuple[bytes, Any]] = []
        try:
            for start in range(0, max(1, len(busy)), TOGETHER):
                self._streams_queue = busy[start : start + TOGETHER]
                datagrams += self._packets(now)
        finally:
            gone = {stream for number, stream in ended.items() if number not in self._streams}
            for number in ended.keys() - self._streams.keys():
                del streams[number]
            self._streams = streams
            self._streams_queue = [each for each in queue if each not in self._served and each not in gone]
            self._streams_queue += self._served
        return datagrams

    def _packets(self, now: float) -> list[tuple[bytes, Any]]:
        datagrams: list[tuple[bytes, Any]] = []
        while True:
            self._full = False
            datagrams += super().datagrams_to_send(now)
            if not self._full:
                return datagrams
            self._loss._pacer.update_after_send(now=now)

    def _write_stream_frame(self, builder: QuicPacketBuilder, *arguments: Any, **more: Any) -> int:
        if builder.remaining_flight_space < LEAST_FRAME_BYTES and not builder.packet_is_empty:
            self._full = True
            raise QuicPacketBuilderStop
        used = super()._write_stream_frame(builder, *arguments, **more)
        if used:
            self._served[more["stream"]] = None
        return used


def _is_busy(stream: QuicStream) -> bool:
    sender = stream.sender
    return (
        not sender.buffer_is_empty or sender.reset_pending or stream.receiver.stop_pending or stream.is_finished
    )  # fmt: skip


def _wants_window(stream: QuicStream) -> bool:
    limit = stream.max_stream_data_local
    return stream.receiver.highest_offset * 2 > limit or stream.max_stream_data_local_sent != limit


class Port(asyncio.DatagramTransport):
    """A UDP socket on the event loop: all that has come is handed on before anything is answered. (asyncio's own
    reads one datagram a turn.) Sent is what the kernel takes; what it does not take is lost, and sent again by QUIC."""

    def __init__(self, udp: socket.socket, received: Callable[[bytes, Any], None], address: Any = None) -> None:
        """``udp`` is bound, or connected to ``address``, and is taken over."""
        super().__init__()
        udp.setblocking(False)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            udp.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
        self._udp, self._received, self._address = udp, received, address
        self.refused: Callable[[], None] = lambda: None
        """Called when the kernel says that nobody listens at ``address``."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(udp, self._read)

    def sendto(self, data: Any, addr: Any = None) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                if self._address is None:
                    self._udp.sendto(data, addr)
                else:
                    self._udp.send(data)
            except ConnectionRefusedError:
                self._loop.call_soon(self.refused)
            except OSError:  # no route, a packet too large: the same as one that is lost on its way
                pass

    def close(self) -> None:
        if self._udp.fileno() >= 0:
            self._loop.remove_reader(self._udp)
            self._udp.close()

    def _read(self) -> None:
        for _ in range(BATCH):
            if self._udp.fileno() < 0:  # closed by what came
                return
            try:
                data, address = self._udp.recvfrom(65536)
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionRefusedError:
                self.refused()
                return
            except OSError:
                return
            self._received(data, self._address or address)


class Listener:
    """Connections of clients, by the ids that their packets bear (RFC 9000, 5.2)."""

    def __init__(self, settings: QuicConfiguration, udp: socket.socket, accept: Callable[[QuicConnection], Http3End]):
        """``udp`` is bound, and taken over; ``accept`` makes the end of a new connection."""
        self._settings, self._accept = settings, accept
        self._ends: dict[bytes, Http3End] = {}
        self._port = Port(udp, self._received)

    def close(self) -> None:
        """Says goodbye to all."""
        for end in set(self._ends.values()):
            end.close(ErrorCode.H3_NO_ERROR)
        self._ends.clear()
        self._port.close()

    def _received(self, data: bytes, address: Any) -> None:
        try:
            header = pull_quic_header(Buffer(data=data), host_cid_length=self._settings.connection_id_length)
        except ValueError:
            return
        known = self._settings.supported_versions
        if header.version is not None and header.version not in known:
            if header.packet_type != QuicPacketType.VERSION_NEGOTIATION and len(data) >= FIRST_BYTES:
                answer = encode_quic_version_negotiation(
                    source_cid=header.destination_cid,
                    destination_cid=header.source_cid,
                    supported_versions=known,
                )
                self._port.sendto(answer, address)
            return
        end = self._ends.get(header.destination_cid)
        if end is None:
            if header.packet_type != QuicPacketType.INITIAL or len(data) < FIRST_BYTES:
                return
            end = self._begin(header.destination_cid)
        end.datagram_received(data, address)

    def _begin(self, number: bytes) -> Http3End:
        quic = ManyStreams(configuration=self._settings, original_destination_connection_id=number)
        end = self._accept(quic)
        end.connection_made(self._port)
        self._ends[number] = self._ends[quic.host_cid] = end
        end.numbers |= {number, quic.host_cid}

        def issued(new: bytes) -> None:
            self._ends[new] = end
            end.numbers.add(new)

        def over() -> None:
            for each in end.numbers:
                self._ends.pop(each, None)

        end._connection_id_issued_handler = issued
        end._connection_id_retired_handler = lambda old: self._ends.pop(old, None)  # type: ignore[assignment]
        end._connection_terminated_handler = over
        return end


class Http3End(QuicConnectionProtocol, ABC):
    """One end of one connection. What several streams have to say at one moment goes out together, when the event loop
    has run what was ready; acknowledgements wait for ACK_S."""

    http_kind: type[H3Connection] = H3Connection

    def __init__(self, quic: QuicConnection) -> None:
        super().__init__(quic)
        self.http: H3Connection | None = None
        self.now = 0.0
        """When the datagram that is being read came, in s of ``time.perf_counter``."""
        self.numbers: set[bytes] = set()
        """The ids by which a Listener knows the connection."""
        self.settled = False
        """Whether the handshake is done."""
        self.end: ConnectionTerminated | None = None
        self._acknowledging: asyncio.TimerHandle | None = None
        self._staying = self._loop.call_later(PING_S, self._stay)

    @abstractmethod
    def in_use(self) -> bool:
        """Whether a request is under way."""

    @abstractmethod
    def happened(self, event: Any) -> None:
        """An event of HTTP/3, or a reset of a stream."""

    def acknowledged(self) -> None:
        """The peer may have taken what was sent."""

    @abstractmethod
    def lost(self, end: ConnectionTerminated) -> None:
        """The connection has ended; called once."""

    def send_soon(self) -> None:
        self._transmit_soon()

    def unacknowledged(self, number: int) -> int:
        """Bytes of a stream that were handed over and that the peer has not acknowledged yet."""
        stream = self._quic._streams.get(number)  # the library has no other way to ask
        return 0 if stream is None else len(stream.sender._buffer)

    def give_up(self, number: int, code: int) -> None:
        """Resets our part of a stream."""
        self._quic.reset_stream(number, code)
        if self.http is not None:  # it forgets a stream whose sending has ended, and learns of that in this way only
            self.http.handle_event(StopSendingReceived(error_code=code, stream_id=number))
        self.send_soon()

    def datagram_received(self, data: bytes | str, addr: Any) -> None:
        self.now = time.perf_counter()
        settled = self.settled
        self._quic.receive_datagram(data, addr, now=self._loop.time())  # type: ignore[arg-type]
        self._process_events()
        self.acknowledged()
        self._look_for_the_end()
        if not settled or self.end is not None:
            self.send_soon()
        elif self._acknowledging is None and self._transmit_task is None:
            self._acknowledging = self._loop.call_later(ACK_S, self.transmit)

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, ProtocolNegotiated):
            self.http = self.http_kind(self._quic)
        elif isinstance(event, HandshakeCompleted):
            self.settled = True
        elif isinstance(event, ConnectionTerminated):
            self._ended(event)
        if self.http is not None:
            for each in self.http.handle_event(event):
                self.happened(each)
            self.happened(event)

    def transmit(self) -> None:
        if self._acknowledging is not None:
            self._acknowledging.cancel()
            self._acknowledging = None
        super().transmit()

    def _look_for_the_end(self) -> None:
        """aioquic tells of an end once the time is over in which packets may still come for it."""
        if self._quic._close_event is not None:
            self._ended(self._quic._close_event)

    def _ended(self, event: ConnectionTerminated) -> None:
        if self.end is None:
            self.end = event
            self._staying.cancel()
            self.lost(event)

    def _stay(self) -> None:
        self._staying = self._loop.call_later(PING_S, self._stay)
        if self.in_use():
            self._quic.send_ping(0)
            self.transmit()
