"""The golden server over HTTP/2, and over gRPC, which is HTTP/2 with length-prefixed messages and trailers.

gRPC is spoken here on the same frames, not by its own library: its Python server would take more of the machine than
the client whose part is to be told, and cannot be made to break off, garble or go away in mid-stream.
"""

from __future__ import annotations

import asyncio
import json
import time

from grpc_health.v1.health_pb2 import HealthCheckResponse
from h2.errors import ErrorCodes
from h2.events import DataReceived, RequestReceived, StreamEnded, StreamReset, WindowUpdated
from h2.exceptions import ProtocolError

from labkit.traffic.golden_http1 import Begin, page
from labkit.traffic.golden_play import Play, StreamVoice, Voice
from labkit.traffic.grpc_messages import METHOD, framed, take_messages
from labkit.traffic.http2 import Header, Inbox, Outbox, open_connection
from labkit.wire.generation_pb2 import GenerateChunk, GenerateRequest, Usage

STATUS = {"4xx": 3, "429": 8, "503": 14, "5xx": 13}
"""gRPC's numbers: INVALID_ARGUMENT, RESOURCE_EXHAUSTED, UNAVAILABLE, INTERNAL."""


class Http2Peer(asyncio.Protocol):
    """``most_streams`` is what it lets a client open at once."""

    def __init__(self, begin: Begin, most_streams: int) -> None:
        self._begin = begin
        self._h2 = open_connection(client=False, MAX_CONCURRENT_STREAMS=most_streams)
        self._inbox, self._outbox = Inbox(self._h2), Outbox(self._h2)
        self._requests: dict[int, tuple[dict[bytes, bytes], bytearray]] = {}
        self._plays: dict[int, Play] = {}
        self._going = self._flushing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        for play in self._plays.values():
            play.stop()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        try:
            events = self._h2.receive_data(data)
        except ProtocolError:
            self._write()
            self._transport.close()
            return
        for event in events:
            if isinstance(event, RequestReceived):
                assert event.stream_id is not None
                self._requests[event.stream_id] = dict(event.headers), bytearray()
            elif isinstance(event, DataReceived):
                assert event.stream_id is not None and event.flow_controlled_length is not None
                self._requests[event.stream_id][1].extend(event.data or b"")
                self._inbox.took(event.flow_controlled_length)
            elif isinstance(event, StreamEnded):
                assert event.stream_id is not None
                self._answer(event.stream_id, now)
            elif isinstance(event, StreamReset):
                assert event.stream_id is not None
                self._requests.pop(event.stream_id, None)
                self._gone(event.stream_id)
            elif isinstance(event, WindowUpdated):
                self._outbox.windows_opened()
        self._flush()

    def headers(self, number: int, headers: list[Header], end: bool = False) -> None:
        self._h2.send_headers(number, headers, end_stream=end)
        self._flush()

    def data(self, number: int, data: bytes, end: bool = False, trailers: list[Header] | None = None) -> None:
        self._outbox.put(number, data, end, trailers)
        self._flush()

    def reset(self, number: int) -> None:
        self._h2.reset_stream(number, ErrorCodes.INTERNAL_ERROR)
        self._gone(number)
        self._flush()

    def raw(self, data: bytes) -> None:
        self._write()
        self._transport.write(data)

    def go_away(self, number: int) -> None:
        """Streams before ``number`` are still answered. The h2 library would take the connection for closed."""
        self._write()
        self._going = True
        last = max((each for each in self._plays if each < number), default=0)
        # RFC 9113, 6.8: length, type 7, no flags, stream 0; last stream, NO_ERROR.
        self._transport.write(b"\x00\x00\x08\x07\x00" + bytes(4) + last.to_bytes(4, "big") + bytes(4))

    def _answer(self, number: int, now: float) -> None:
        headers, body = self._requests.pop(number)
        if self._going:  # sent before the client knew
            return
        path = headers[b":path"].decode()
        if path == "/v1/chat/completions":
            voice: Voice = Http2Voice(self, number)
            request_id, stream = headers.get(b"x-request-id", b"").decode(), bool(json.loads(body).get("stream"))
        elif path == METHOD:
            voice = GrpcVoice(self, number)
            request_id, stream = GenerateRequest.FromString(next(take_messages(body))).request_id, True
        else:
            self._other(path, number)
            return
        self._plays[number] = play = self._begin(request_id, now, voice)
        play.start(stream)

    def _other(self, path: str, number: int) -> None:
        if path == "/grpc.health.v1.Health/Check":
            voice = GrpcVoice(self, number)
            voice.headers()
            voice.message(HealthCheckResponse(status=HealthCheckResponse.SERVING).SerializeToString())
            voice.end()
        elif path.count("/") == 2 and "." in path.split("/")[1]:
            GrpcVoice(self, number).status(12, "no such method")
        else:
            Http2Voice(self, number).plain(*page(path))

    def _gone(self, number: int) -> None:
        self._outbox.forget(number)
        if play := self._plays.pop(number, None):
            play.stop()

    def _flush(self) -> None:
        """What several streams have to say at one moment goes out in one write."""
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._write)

    def _write(self) -> None:
        self._flushing = False
        if data := self._h2.data_to_send():
            self._transport.write(data)


class Http2Voice(StreamVoice[Http2Peer]):
    def garbage(self) -> None:
        """A frame of data on stream 0, which carries none."""
        self._peer.raw(bytes(9))


class GrpcVoice(Voice):
    def __init__(self, peer: Http2Peer, number: int) -> None:
        self._peer, self._number = peer, number

    def headers(self) -> None:
        self._peer.headers(self._number, [(b":status", b"200"), (b"content-type", b"application/grpc")])

    def message(self, message: bytes) -> None:
        self._peer.data(self._number, framed(message))

    def tokens(self, text: str, count: int, reasoning: bool) -> None:
        chunk = GenerateChunk(tokens=count, reasoning=text) if reasoning else GenerateChunk(tokens=count, text=text)
        self.message(chunk.SerializeToString())

    def finish(self, usage: dict[str, int]) -> None:
        used = Usage(prompt_tokens=usage["prompt_tokens"], completion_tokens=usage["completion_tokens"])
        self.message(GenerateChunk(finish_reason="stop", usage=used).SerializeToString())
        self.end()

    def refuse(self, fault: str) -> None:
        self.status(STATUS[fault], f"scripted {fault}")

    def status(self, code: int, message: str) -> None:
        """An answer that is nothing but a status."""
        self._peer.headers(
            self._number,
            [(b":status", b"200"), (b"content-type", b"application/grpc"), *_status(code, message)],
            end=True,
        )

    def error(self) -> None:
        self._peer.data(self._number, b"", trailers=_status(13, "scripted error"))

    def end(self) -> None:
        self._peer.data(self._number, b"", trailers=_status(0, ""))

    def cut(self) -> None:
        self._peer.reset(self._number)

    def garbage(self) -> None:
        """A frame of three megabytes; one of data on stream 0 would be overlooked."""
        self._peer.raw(b"220 smtp ready\r\n")

    def go_away(self) -> None:
        self._peer.go_away(self._number)


def _status(code: int, message: str) -> list[Header]:
    return [(b"grpc-status", str(code).encode()), (b"grpc-message", message.encode())]
