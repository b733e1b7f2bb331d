"""HTTP/3 on a UDP socket: an ASGI server on ``aioquic``.

hypercorn, the ASGI server with HTTP/3 of the field, is built on the same library. Of 300 streams on a connection its
version 0.18 runs 128; an application whose client reset a stream learns of it by an error in its next send, one whose
client is gone does not, and answers that nobody reads grow without end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import deque
from functools import partial
from typing import Any
from urllib.parse import unquote

from aioquic.h3.connection import ErrorCode
from aioquic.h3.events import DataReceived, Headers, HeadersReceived
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, StopSendingReceived, StreamDataReceived, StreamReset
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from labkit.errors import UserError
from labkit.serving.http import MOST_HEADER_BYTES, MOST_STREAMS, listen, serve_app
from labkit.serving.quic import Http3End, Listener, quic_settings
from labkit.serving.tls import Certificate

MOST_UNREAD_BYTES = 64 * 1024
"""Of an answer that the client has not acknowledged; with more, the application waits."""
TRIES = 20
"""How often a number is tried that is to be free for both TCP and UDP."""
ADVERTISED_S = 3600

log = logging.getLogger(__name__)


class _Exchange:
    """One request and its answer, as the application sees them."""

    def __init__(self, peer: _Peer, number: int, scope: Scope) -> None:
        self.scope = scope
        self._peer, self._number = peer, number
        self._came: deque[Message] = deque()
        self._news, self._room = asyncio.Event(), asyncio.Event()
        self.asked = self.answered = self.gone = False
        """Whether the request is in, the answer is out, the client has left."""

    def body(self, data: bytes, end: bool) -> None:
        self.asked = end
        self._came.append({"type": "http.request", "body": data, "more_body": not end})
        self._news.set()

    def leave(self) -> None:
        self.gone = True
        self._news.set()
        self._room.set()

    def look_for_room(self) -> None:
        """The client took something."""
        if not self._room.is_set() and self._unread() <= MOST_UNREAD_BYTES // 2:
            self._room.set()

    async def receive(self) -> Message:
        while not self._came:
            if self.gone or self.answered:
                return {"type": "http.disconnect"}
            self._news.clear()
            await self._news.wait()
        return self._came.popleft()

    async def send(self, message: Message) -> None:
        """Waits while the client leaves what was sent to it unread; says nothing to one that has left."""
        if self.gone:
            return
        http = self._peer.http
        assert http is not None
        if message["type"] == "http.response.start":
            status = str(message["status"]).encode()
            headers = [(bytes(name).lower(), bytes(value)) for name, value in message.get("headers", ())]
            headers = [each for each in headers if each[0] not in (b"connection", b"transfer-encoding", b"keep-alive")]
            http.send_headers(self._number, [(b":status", status), *headers])
        else:
            end = not message.get("more_body", False)
            http.send_data(self._number, message.get("body", b""), end)
            if end:
                self.answered = True
                self._news.set()
        self._peer.send_soon()
        while not self.gone and self._unread() > MOST_UNREAD_BYTES:
            self._room.clear()
            await self._room.wait()

    def _unread(self) -> int:
        return self._peer.unacknowledged(self._number)


class _Peer(Http3End):
    """The connection of one client."""

    def __init__(self, quic: QuicConnection, server: Http3Server) -> None:
        super().__init__(quic)
        # aioquic has no setting for it: 128 would leave the rest of 300 users waiting unseen.
        limit = quic._local_max_streams_bidi
        limit.value = limit.sent = MOST_STREAMS
        self._server = server
        self._exchanges: dict[int, _Exchange] = {}
        self._headers: dict[int, int] = {}
        """Bytes that came on streams whose headers are not in yet."""
        self._unwanted: set[int] = set()
        """Streams that were answered before the request was in; the rest of it may be on its way."""

    def in_use(self) -> bool:
        return bool(self._exchanges)

    def happened(self, event: Any) -> None:
        if isinstance(event, HeadersReceived):
            self._headers.pop(event.stream_id, None)
            if event.stream_id in self._exchanges:  # trailers
                if event.stream_ended:
                    self._exchanges[event.stream_id].body(b"", True)
            else:
                self._begin(event)
        elif isinstance(event, DataReceived):
            if exchange := self._exchanges.get(event.stream_id):
                exchange.body(event.data, event.stream_ended)
        elif isinstance(event, (StreamReset, StopSendingReceived)):
            self._headers.pop(event.stream_id, None)
            self._unwanted.discard(event.stream_id)
            if exchange := self._exchanges.get(event.stream_id):
                exchange.leave()
        elif isinstance(event, StreamDataReceived) and event.stream_id % 4 == 0:
            self._bound_headers(event)

    def acknowledged(self) -> None:
        for exchange in self._exchanges.values():
            exchange.look_for_room()

    def lost(self, end: ConnectionTerminated) -> None:
        for exchange in self._exchanges.values():
            exchange.leave()

    def finished(self, number: int) -> None:
        """The application is done with a request."""
        exchange = self._exchanges.pop(number)
        if self.end is not None:
            return
        if not exchange.answered:
            self.give_up(number, ErrorCode.H3_INTERNAL_ERROR)
        if not (exchange.asked or exchange.gone):
            self._unwanted.add(number)
            with contextlib.suppress(ValueError):
                self._quic.stop_stream(number, ErrorCode.H3_NO_ERROR)
            self.send_soon()

    def _bound_headers(self, event: StreamDataReceived) -> None:
        """aioquic would keep what comes of a header without end."""
        number = event.stream_id
        if event.end_stream:
            self._headers.pop(number, None)
            self._unwanted.discard(number)
        elif number not in self._exchanges and number not in self._unwanted:
            size = self._headers[number] = self._headers.get(number, 0) + len(event.data)
            if size > MOST_HEADER_BYTES:
                self.close(ErrorCode.H3_EXCESSIVE_LOAD, "the header is too long")

    def _begin(self, event: HeadersReceived) -> None:
        exchange = _Exchange(self, event.stream_id, _scope(event.headers, self._quic.get_peer_address()))
        self._exchanges[event.stream_id] = exchange
        if event.stream_ended:
            exchange.body(b"", True)
        self._server.run(exchange, partial(self.finished, event.stream_id))


def _scope(headers: Headers, client: Any) -> Scope:
    pseudo = {name: value for name, value in headers if name.startswith(b":")}
    path, _, query = pseudo.get(b":path", b"/").partition(b"?")
    plain = [each for each in headers if not each[0].startswith(b":")]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "3",
        "method": pseudo[b":method"].decode("latin-1").upper(),
        "scheme": "https",
        "path": unquote(path.decode("latin-1")),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": [(b"host", pseudo.get(b":authority", b"")), *plain],
        "client": tuple(client[:2]) if client else None,
        "server": None,
    }


class Http3Server:
    """Answers requests with ``app`` until it is stopped."""

    def __init__(self, app: ASGIApp, udp: socket.socket, tls: Certificate) -> None:
        """``udp`` is bound, and taken over."""
        settings = quic_settings(client=False)
        settings.load_cert_chain(tls.certificate, tls.key)
        self._app = app
        self._running: set[asyncio.Task[None]] = set()
        self._listener = Listener(settings, udp, partial(_Peer, server=self))

    def run(self, exchange: _Exchange, finished: Any) -> None:
        task = asyncio.create_task(self._answer(exchange))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        task.add_done_callback(lambda _: finished())

    async def stop(self, drain_s: float) -> None:
        """Lets running requests end for so long, then says goodbye."""
        if self._running:
            await asyncio.wait(self._running, timeout=drain_s)
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running, timeout=drain_s)
        self._listener.close()

    async def _answer(self, exchange: _Exchange) -> None:
        receive: Receive = exchange.receive
        send: Send = exchange.send
        try:
            await self._app(exchange.scope, receive, send)
        except Exception:
            log.exception("a request over HTTP/3 ended in an error")


async def serve_http3(
    app: ASGIApp,
    udp: socket.socket,
    tcp: socket.socket,
    stop: asyncio.Event,
    access_log: bool,
    tls: Certificate,
    drain_s: float = 3.0,
) -> None:
    """Serves ``app`` on ``udp``, and over HTTP/2 and HTTP/1.1 on ``tcp`` (bound, the latter listening; taken over)
    until ``stop``, then lets running requests end, those over HTTP/3 for ``drain_s``."""
    server = Http3Server(app, udp, tls)
    beside = advertising(app, udp.getsockname()[1])
    try:
        await serve_app(beside, tcp, stop, access_log, "http/2 tls", tls)
    finally:
        await server.stop(drain_s)


def listen_http3(host: str, port: int) -> tuple[socket.socket, socket.socket]:
    """A listening TCP socket and a UDP socket of the same number; port 0 takes one that is free for both. Raises
    UserError when the address cannot be had."""
    for _ in range(TRIES):
        tcp = listen(host, port)
        udp = socket.socket(tcp.family, socket.SOCK_DGRAM)
        try:
            udp.bind(tcp.getsockname())
            return tcp, udp
        except OSError as error:
            tcp.close()
            udp.close()
            if port:
                raise UserError(
                    f"cannot listen on UDP {host}:{port}: {error.strerror}; choose another --port (0: a free one)"
                ) from error
    raise UserError(f"found no port of {host} that is free for both TCP and UDP; choose one: --port")


def advertising(app: ASGIApp, port: int) -> ASGIApp:
    """``app``, whose answers say that HTTP/3 is spoken on ``port`` as well (RFC 7838)."""
    header = (b"alt-svc", f'h3=":{port}"; ma={ADVERTISED_S}'.encode())

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def say(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        await app(scope, receive, say)

    return wrapped
