"""Parts of labkit that work only where more is installed."""

from __future__ import annotations

from importlib.util import find_spec

from labkit.errors import UserError


def require_http3() -> None:
    """Raises UserError where the library for HTTP/3 is not installed."""
    if find_spec("aioquic") is None:
        raise UserError("the transport 'http/3' needs the package aioquic; run: pip install 'labkit[http3]'")
