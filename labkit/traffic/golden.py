"""The golden server: a chat server whose every send is scripted, happens on an absolute schedule, and is written down.

What a client reports about it can be checked exactly, and how much time a client adds can be told from the server's.
``python -m labkit.traffic.golden --port 0`` runs it in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import ssl
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from labkit.serving.tls import Certificate, own_certificate
from labkit.traffic.golden_http1 import Http1Peer
from labkit.traffic.golden_play import FAULTS, Answered, Play, Script, Voice
from labkit.traffic.target import TLS_ALWAYS, TRANSPORTS, Transport

if TYPE_CHECKING:
    from labkit.serving.quic import Listener

__all__ = ["FAULTS", "Answered", "Golden", "Script"]

MOST_STREAMS = 1000
"""Streams that a client may open at once on a connection of HTTP/2."""


class Golden:
    """The server in a thread of its own: ``with Golden(scripts) as golden: … golden.url``.

    Request with ``X-Request-Id: n`` (or else the n-th request) is played script ``n % len(scripts)``. ``certificate``
    is needed for ``http/2 tls`` and ``http/3``; given for HTTP/1.1, that has TLS as well.
    """

    def __init__(
        self,
        scripts: Sequence[Script] = (Script(),),
        port: int = 0,
        transport: Transport = "http/1.1",
        certificate: Certificate | None = None,
        most_streams: int = MOST_STREAMS,
    ) -> None:
        self.scripts = tuple(scripts)
        self.answered: list[Answered] = []
        self.connections = 0
        self.port = port
        self.transport = transport
        self._most_streams = most_streams
        self._certificate = certificate
        if transport in TLS_ALWAYS and certificate is None:
            raise ValueError(f"{transport} needs a certificate")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="golden", daemon=True)

    def script_for(self, request_id: str) -> Script:
        number = int(request_id) if request_id.isdigit() else len(self.answered)
        return self.scripts[number % len(self.scripts)]

    @property
    def url(self) -> str:
        """The address, its scheme that of the transport."""
        scheme = {"http/2": "h2c", "grpc": "grpc"}.get(self.transport, "http" if self._certificate is None else "https")
        return f"{scheme}://127.0.0.1:{self.port}"

    def __enter__(self) -> Golden:
        self._thread.start()
        self._server, self.port = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def write_log(self, out: TextIO) -> None:
        """One line of JSON for every request answered."""
        for answered in self.answered:
            out.write(json.dumps(asdict(answered)) + "\n")

    async def _listen(self) -> tuple[asyncio.Server | Listener, int]:
        if self.transport == "http/3":
            from labkit.traffic.golden_http3 import serve_golden

            assert self._certificate is not None
            return await serve_golden(
                self.port, self._certificate, self._begin, self._most_streams, self._count_connection
            )
        tls = None if self._certificate is None else _tls(self.transport, self._certificate)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(self._peer, "127.0.0.1", self.port, backlog=4096, ssl=tls)
        return server, server.sockets[0].getsockname()[1]

    def _count_connection(self) -> None:
        self.connections += 1

    def _peer(self) -> asyncio.Protocol:
        self._count_connection()
        if self.transport in ("http/1.1", "http/1.1 close"):
            return Http1Peer(self._begin)
        from labkit.traffic.golden_http2 import Http2Peer

        return Http2Peer(self._begin, self._most_streams)

    def _begin(self, request_id: str, now: float, voice: Voice) -> Play:
        script = self.script_for(request_id)
        if script.fault == "goaway" and any(one.request_id == request_id for one in self.answered):
            script = replace(script, fault="")
        answered = Answered(request_id, now, script.fault)
        self.answered.append(answered)
        return Play(script, answered, voice)


def _tls(transport: Transport, certificate: Certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate, certificate.key)
    context.set_alpn_protocols(["h2"] if transport == "http/2 tls" else ["http/1.1"])
    return context


def main() -> None:
    parser = argparse.ArgumentParser(description="A chat server whose every send is scripted and written down.")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument(
        "--script", default="[{}]", help="JSON list of scripts: ttft_s, itl_s, tokens, reasoning, fault …"
    )
    parser.add_argument("--log", type=Path, help="where to write what was sent when, as JSONL, on end of input")
    parser.add_argument("--transport", choices=TRANSPORTS, default="http/1.1")
    options = parser.parse_args()
    try:
        scripts = [Script(**script) for script in json.loads(options.script)]
    except (ValueError, TypeError) as error:
        parser.error(f"--script: {error}")
    certificate = own_certificate() if options.transport in TLS_ALWAYS else None
    gc.disable()
    with Golden(scripts, options.port, options.transport, certificate) as golden:
        trust = f" (certificate: {certificate.certificate})" if certificate else ""
        print(f"ready on {golden.url}{trust}", flush=True)
        sys.stdin.read()
        if options.log:
            with open(options.log, "w") as out:
                golden.write_log(out)


if __name__ == "__main__":
    main()
