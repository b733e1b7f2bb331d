"""The golden server over HTTP/3."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

from aioquic.buffer import encode_uint_var
from aioquic.h3.connection import ErrorCode, FrameType, encode_frame
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, StopSendingReceived

from labkit.serving.quic import Http3End, Listener, quic_settings
from labkit.serving.tls import Certificate
from labkit.traffic.golden_http1 import Begin, page
from labkit.traffic.golden_play import Play, StreamVoice
from labkit.traffic.http2 import Header


class Http3Peer(Http3End):
    """``most_streams`` is what it lets a client open at once."""

    def __init__(
        self,
        quic: QuicConnection,
        begin: Begin,
        most_streams: int,
        made: Callable[[], None],
    ) -> None:
        super().__init__(quic)
        limit = quic._local_max_streams_bidi  # the library has no setting for it
        limit.value = limit.sent = most_streams
        self._begin = begin
        self._requests: dict[int, tuple[dict[bytes, bytes], bytearray]] = {}
        self._plays: dict[int, Play] = {}
        self._going = False
        made()

    def in_use(self) -> bool:
        return bool(self._plays)

    def happened(self, event: Any) -> None:
        if isinstance(event, HeadersReceived):
            self._requests[event.stream_id] = dict(event.headers), bytearray()
        elif isinstance(event, DataReceived):
            self._requests[event.stream_id][1].extend(event.data)
        elif isinstance(event, StopSendingReceived):
            self._requests.pop(event.stream_id, None)
            self._gone(event.stream_id)
            return
        else:
            return
        if event.stream_ended:
            self._answer(event.stream_id)

    def lost(self, end: ConnectionTerminated) -> None:
        for play in self._plays.values():
            play.stop()

    def headers(self, number: int, headers: list[Header]) -> None:
        assert self.http is not None
        self.http.send_headers(number, headers)
        self.send_soon()

    def data(self, number: int, data: bytes, end: bool = False) -> None:
        assert self.http is not None
        self.http.send_data(number, data, end)
        if end:
            self._plays.pop(number, None)
        self.send_soon()

    def reset(self, number: int, code: int = ErrorCode.H3_INTERNAL_ERROR) -> None:
        self.give_up(number, code)
        self._gone(number)

    def raw(self, number: int, data: bytes) -> None:
        self._quic.send_stream_data(number, data)
        self.send_soon()

    def go_away(self, number: int) -> None:
        """Streams before ``number`` are still answered. aioquic has no GOAWAY (RFC 9114, 5.2) of its own."""
        self._going = True
        assert self.http is not None and self.http._local_control_stream_id is not None
        self.raw(self.http._local_control_stream_id, encode_frame(FrameType.GOAWAY, encode_uint_var(number)))
        self.reset(number, ErrorCode.H3_REQUEST_REJECTED)

    def _answer(self, number: int) -> None:
        headers, body = self._requests.pop(number)
        if self._going:  # sent before the client knew
            self.reset(number, ErrorCode.H3_REQUEST_REJECTED)
            return
        voice, path = Http3Voice(self, number), headers[b":path"].decode()
        if path != "/v1/chat/completions":
            voice.plain(*page(path))
            return
        self._plays[number] = play = self._begin(headers.get(b"x-request-id", b"").decode(), self.now, voice)
        play.start(bool(json.loads(body).get("stream")))

    def _gone(self, number: int) -> None:
        if play := self._plays.pop(number, None):
            play.stop()


class Http3Voice(StreamVoice[Http3Peer]):
    def garbage(self) -> None:
        """Data where headers come first."""
        self._peer.raw(self._number, encode_frame(FrameType.DATA, b"220 smtp ready\r\n"))


async def serve_golden(
    port: int, certificate: Certificate, begin: Begin, most_streams: int, made: Callable[[], None]
) -> tuple[Listener, int]:
    """A server on 127.0.0.1 and its port (0 takes a free one); ``made`` is called for each connection."""
    settings = quic_settings(client=False)
    settings.load_cert_chain(certificate.certificate, certificate.key)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", port))
    peer = partial(Http3Peer, begin=begin, most_streams=most_streams, made=made)
    return Listener(settings, udp, peer), udp.getsockname()[1]
