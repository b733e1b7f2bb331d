"""The counters of the engine, over HTTP or from a callable in this process."""

from __future__ import annotations

import dataclasses
import http.client
import json
import ssl
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from labkit.request import EngineStats


class EngineProbe:
    """Reads ``EngineStats`` (waiting, running, kv_blocks_used, …) and ``answered``: 1, or 0 when no answer came.

    A server that is not up yet, hangs or is gone leaves a gap, marked by ``answered`` 0, and is asked again next time.
    """

    name = "engine"

    def __init__(
        self,
        source: str | Callable[[], EngineStats | Mapping[str, Any]],
        timeout_s: float = 1.0,
        api_key: str | None = None,
        cafile: str | None = None,
    ) -> None:
        """``source``: the server's address (http://host:port, https://…) or a callable. ``cafile`` is trusted besides
        the system's certificates. Raises ValueError for another scheme."""
        self._callable = source if callable(source) else None
        self._timeout_s = timeout_s
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._connection: http.client.HTTPConnection | None = None
        self._tls: ssl.SSLContext | None = None
        self._host, self._port, self._path = "", 80, "/stats"
        if isinstance(source, str):
            address = urlsplit(source)
            if address.scheme not in ("http", "https") or not address.hostname:
                raise ValueError(f"the engine's address must look like http://127.0.0.1:8000, got {source!r}")
            tls = address.scheme == "https"
            self._host, self._port = address.hostname, address.port or (443 if tls else 80)
            if tls:
                self._tls = ssl.create_default_context()
                if cafile is not None:
                    self._tls.load_verify_locations(cafile)
            self._path = address.path.rstrip("/") + "/stats"
            self.description = f"GET {address.scheme}://{self._host}:{self._port}{self._path}"
        else:
            self.description = "counters of an engine in this process"

    def read(self) -> Mapping[str, float]:
        try:
            stats = self._callable() if self._callable is not None else self._ask()
        except (OSError, http.client.HTTPException, ValueError):
            self._close()
            return {"answered": 0.0}
        fields = dataclasses.asdict(stats) if isinstance(stats, EngineStats) else stats
        numbers = {
            name: float(value)
            for name, value in fields.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        return {"answered": 1.0, **numbers}

    def _ask(self) -> Mapping[str, Any]:
        if self._connection is None and self._tls is not None:
            self._connection = http.client.HTTPSConnection(
                self._host, self._port, timeout=self._timeout_s, context=self._tls
            )
        elif self._connection is None:
            self._connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        self._connection.request("GET", self._path, headers=self._headers)
        response = self._connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise ValueError(f"the server answered {response.status}")
        stats = json.loads(body)
        if not isinstance(stats, dict):
            raise ValueError("the counters are no JSON object")
        return stats

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
