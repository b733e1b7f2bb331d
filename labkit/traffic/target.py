"""Where requests go, and over what."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass, replace
from typing import Literal, get_args
from urllib.parse import urlsplit

from labkit.errors import UserError
from labkit.serving.extras import require_http3

Transport = Literal["http/1.1", "http/1.1 close", "http/2", "http/2 tls", "http/3", "grpc"]
"""http/1.1: connections are kept. http/1.1 close: each request has a connection of its own. http/2: without TLS and
without asking first (prior knowledge). http/2 tls: agreed on by ALPN. http/3: over QUIC. grpc: server streaming without
TLS."""

Connections = int | Literal["each"]
"""How many connections (gRPC: channels) the streams share. ``each``: a connection carries one stream at a time, and
there are as many as there are streams at once."""

TRANSPORTS: tuple[str, ...] = get_args(Transport)
TLS_ALWAYS = ("http/2 tls", "http/3")
"""Those whose server has a certificate."""
FITS = {
    "http": ("http/1.1", "http/1.1 close", "http/2"),
    "https": ("http/2 tls", "http/1.1", "http/1.1 close", "http/3"),
    "h2c": ("http/2",),
    "grpc": ("grpc",),
}
"""The transports of each scheme; ``https`` asks the server (ALPN) over TCP unless told, others take their first."""

NEGOTIATION_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Target:
    """Where requests go. ``base`` is the path before ``/v1``; ``transport`` "alpn" is not decided yet (``settled``
    does); ``connections`` None: each for HTTP/1.1, one for the others; ``cafile`` is trusted besides the system's
    certificates."""

    host: str
    port: int
    tls: bool = False
    base: str = ""
    api_key: str | None = None
    transport: Transport | Literal["alpn"] = "http/1.1"
    connections: Connections | None = None
    cafile: str | None = None

    @classmethod
    def parse(
        cls,
        url: str,
        api_key: str | None = None,
        transport: str | None = None,
        connections: Connections | None = None,
        cafile: str | None = None,
    ) -> Target:
        """Takes ``http://host:port``, also with a path or a trailing ``/v1``, ``https://``, ``h2c://`` and
        ``grpc://``. Raises UserError for anything else, for a transport that does not go with the scheme, and for one
        that needs a package that is not installed."""
        example = "give it as http://127.0.0.1:8000, https://…, h2c://… or grpc://…"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise UserError(f"{url!r} is not an address: {error}; {example}") from error
        if parts.scheme not in FITS or not parts.hostname:
            raise UserError(f"{url!r} is not an address; {example}")
        fits = FITS[parts.scheme]
        if transport is not None and transport not in fits:
            raise UserError(
                f"the transport {transport!r} does not go with {url!r}; a {parts.scheme}:// address takes "
                + " or ".join(map(repr, fits))
            )
        if connections is not None and connections != "each" and (isinstance(connections, bool) or connections < 1):
            raise UserError(f"connections must be a whole number of at least 1, or 'each'; got {connections!r}")
        if transport == "http/3":
            require_http3()
        tls = parts.scheme == "https"
        chosen = transport or ("alpn" if tls else fits[0])
        base = parts.path.rstrip("/").removesuffix("/v1")
        return cls(
            parts.hostname, port or (443 if tls else 80), tls, base, api_key, chosen, connections, cafile  # type: ignore[arg-type]
        )  # fmt: skip

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def shared_by(self) -> Connections:
        """``connections`` with its default in place."""
        return connections_of(self.transport, self.connections)

    def settled(self) -> Target:
        """The same with a transport: where it is to be agreed on, the server is asked which it speaks.

        Raises UserError when the server cannot be reached or its certificate is not trusted.
        """
        if self.transport != "alpn":
            return self
        address = (self.host, self.port)
        try:
            with (
                socket.create_connection(address, NEGOTIATION_TIMEOUT_S) as plain,
                tls_context(self, "h2", "http/1.1").wrap_socket(plain, server_hostname=self.host) as talk,
            ):
                agreed = talk.selected_alpn_protocol()
        except ssl.SSLCertVerificationError as error:
            raise UserError(
                f"the certificate of {self.authority} is not trusted: {error.verify_message}; "
                "give the file of whoever signed it as --cafile"
            ) from error
        except ConnectionRefusedError as error:
            raise UserError(
                f"no server listens at {self.authority}; start one (labkit serve) or mend the address"
            ) from error
        except OSError as error:
            raise UserError(f"no TLS with {self.authority}: {error}; is it an https:// server?") from error
        return replace(self, transport="http/2 tls" if agreed == "h2" else "http/1.1")

    def share(self, number: int, processes: int) -> Target:
        """What of ``connections`` is the part of process ``number`` of ``processes``."""
        if not isinstance(self.shared_by, int):
            return self
        return replace(self, connections=len(range(number, self.shared_by, processes)))


def connections_of(transport: str, connections: Connections | None) -> Connections:
    """None replaced by what is usual over ``transport``."""
    if connections is not None:
        return connections
    return "each" if transport in ("http/1.1", "http/1.1 close", "alpn") else 1


def tls_context(target: Target, *protocols: str) -> ssl.SSLContext:
    """Verifies the server, and offers it ``protocols`` by ALPN. Raises UserError when ``cafile`` is not one."""
    context = ssl.create_default_context()
    if target.cafile is not None:
        try:
            context.load_verify_locations(target.cafile)
        except OSError as error:
            raise UserError(
                f"{target.cafile} is no file of certificates: {error.strerror or error}; labkit serve prints its own"
            ) from error
    context.set_alpn_protocols(list(protocols))
    return context


def parse_connections(text: str | None) -> Connections | None:
    """A number or ``each``. Raises UserError."""
    if text is None or text == "each":
        return "each" if text else None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"connections must be a whole number of at least 1, or 'each'; got {text!r}")
    return int(text)
