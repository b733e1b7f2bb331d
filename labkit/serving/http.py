"""HTTP on a listening socket: granian in this process, set up for the transport of the deployment."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings, HTTP2Settings
from granian.log import LogLevels
from granian.net import SocketHolder
from granian.server.embed import Server
from starlette.types import ASGIApp

from labkit.errors import UserError
from labkit.serving.tls import Certificate

BACKLOG = 4096
MOST_CONNECTIONS = 16_384
MOST_STREAMS = 4096
"""Streams that one HTTP/2 connection may have open at once; granian's 200 would queue the rest of 300 users unseen."""
IDLE_CONNECTION_MS = 120_000
PING_MS = 30_000
"""An HTTP/2 peer that is gone without a word shows by not answering a ping."""
PING_TIMEOUT_S = 20
MOST_HEADER_BYTES = 64 * 1024


class _SocketServer(Server):
    """granian in this process, on a socket that is bound already.

    granian binds its own sockets with SO_REUSEPORT, so that a second server on a port in use would take half of the
    first one's connections instead of failing; and it cannot tell which port it got for port 0.
    """

    def __init__(
        self, app: ASGIApp, listener: socket.socket, access_log: bool, transport: str, tls: Certificate | None
    ) -> None:
        host, port = listener.getsockname()[:2]
        super().__init__(
            app,
            address=host,
            port=port,
            interface=Interfaces.ASGI,
            # On a port for HTTP/2, HTTP/1.1 is answered as well, for what reads /health and /metrics.
            http=HTTPModes.auto if transport.startswith("http/2") else HTTPModes.http1,
            websockets=False,
            backlog=BACKLOG,
            backpressure=MOST_CONNECTIONS,
            http1_settings=HTTP1Settings(
                header_read_timeout=IDLE_CONNECTION_MS, keep_alive=transport != "http/1.1 close"
            ),
            http2_settings=HTTP2Settings(
                max_concurrent_streams=MOST_STREAMS,
                max_headers_size=MOST_HEADER_BYTES,
                keep_alive_interval=PING_MS,
                keep_alive_timeout=PING_TIMEOUT_S,
            ),
            log_level=LogLevels.error,
            log_access=access_log,
            ssl_cert=tls.certificate if tls else None,
            ssl_key=tls.key if tls else None,
        )
        self._listener = listener

    def _init_shared_socket(self) -> None:
        # granian closes the descriptor when it is done.
        self._shd: Any = SocketHolder(self._listener.detach(), False, BACKLOG)  # type: ignore[call-arg]


async def serve_app(
    app: ASGIApp,
    listener: socket.socket,
    stop: asyncio.Event,
    access_log: bool = False,
    transport: str = "http/1.1",
    tls: Certificate | None = None,
) -> None:
    """Serves ``app`` on ``listener`` (bound, listening; taken over) until ``stop``, then lets running requests end.

    ``transport`` is one of the deployment's that are HTTP; ``tls`` belongs to ``http/2 tls``.
    """
    server = _SocketServer(app, listener, access_log, transport, tls)
    serving = asyncio.create_task(server.serve())
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
        server.stop()
        await serving
    finally:
        stopped.cancel()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises UserError when the address cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}; give --host an address of this machine") from error
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it. Without it a token waits for the acknowledgement of the one before: over HTTP/2, where
        # streams share a connection, for up to the 40 ms by which a peer may delay that.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --port (0: a free one)"
        ) from error
    return listener
