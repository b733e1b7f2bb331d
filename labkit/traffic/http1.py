"""Reading HTTP/1.1 responses and server-sent events from a byte stream that may be cut anywhere."""

from __future__ import annotations

MAX_HEADER_BYTES = 64 * 1024


class ProtocolError(Exception):
    """The bytes are not an HTTP/1.1 response."""


class ResponseParser:
    """One response. ``feed`` takes bytes as they come and returns the body bytes they complete; state is in the
    attributes.

    ``status`` is 0 until the status line and headers are in; ``done`` is True once the body is whole; ``rest`` holds
    bytes after it. ``keep_alive`` says whether the connection may carry another request.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.keep_alive = True
        self.done = False
        self.rest = b""
        self._buffer = bytearray()
        self._left = 0
        self._mode = "head"

    def feed(self, data: bytes) -> bytes:
        """Raises ProtocolError for anything that is not HTTP/1.1."""
        if self.done:
            self.rest += data
            return b""
        self._buffer += data
        body = bytearray()
        while self._advance(body):
            pass
        if self.done and self._buffer:
            self.rest = bytes(self._buffer)
            self._buffer.clear()
        return bytes(body)

    def eof(self) -> bool:
        """The peer closed. True when that ends the response properly (a body of no declared length)."""
        if self._mode == "to eof":
            self.done = True
        return self.done

    def _advance(self, body: bytearray) -> bool:
        """Does one step; False when more bytes are needed or the response is whole."""
        buffer = self._buffer
        if self.done or not buffer:
            return False
        if self._mode == "head":
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(buffer) > MAX_HEADER_BYTES:
                    raise ProtocolError(f"headers over {MAX_HEADER_BYTES} bytes")
                if not b"HTTP/1.1 ".startswith(buffer[:9]) and not b"HTTP/1.0 ".startswith(buffer[:9]):
                    raise ProtocolError(f"not an HTTP/1.1 status line: {bytes(buffer[:40])!r}")
                return False
            self._head(bytes(buffer[:end]))
            del buffer[: end + 4]
            return True
        if self._mode in ("length", "chunk"):
            taken = bytes(buffer[: self._left])
            del buffer[: len(taken)]
            body += taken
            self._left -= len(taken)
            if self._left == 0:
                if self._mode == "length":
                    self.done = True
                else:
                    self._mode = "chunk end"
            return True
        if self._mode == "to eof":
            body += buffer
            buffer.clear()
            return False
        line_end = buffer.find(b"\r\n")
        if line_end < 0:
            if len(buffer) > MAX_HEADER_BYTES:
                raise ProtocolError("a chunk header without end")
            return False
        line = bytes(buffer[:line_end])
        del buffer[: line_end + 2]
        if self._mode == "chunk end":
            if line:
                raise ProtocolError(f"a chunk longer than it said: {line[:40]!r}")
            self._mode = "chunk size"
        elif self._mode == "chunk size":
            digits = line.split(b";", 1)[0].strip()
            if not digits or digits.strip(b"0123456789abcdefABCDEF"):
                raise ProtocolError(f"not a chunk size: {line[:40]!r}")
            self._left = int(digits, 16)
            self._mode = "chunk" if self._left else "trailer"
        elif not line:  # the empty line after the last chunk's trailers
            self.done = True
        return True

    def _head(self, head: bytes) -> None:
        status_line, *lines = head.decode("latin-1").split("\r\n")
        version, _, rest = status_line.partition(" ")
        code = rest[:3]
        if version not in ("HTTP/1.1", "HTTP/1.0") or len(code) != 3 or not code.isdigit() or not code.isascii():
            raise ProtocolError(f"not an HTTP/1.1 status line: {status_line[:40]!r}")
        headers: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip():
                raise ProtocolError(f"not a header: {line[:40]!r}")
            headers[name.lower()] = value.strip()
        status = int(code)
        if 100 <= status < 200:  # an interim response; the real one follows
            return
        self.status, self.headers = status, headers
        connection = headers.get("connection", "").lower()
        self.keep_alive = "close" not in connection and (version == "HTTP/1.1" or "keep-alive" in connection)
        if status in (204, 304):
            self.done = True
        elif "chunked" in headers.get("transfer-encoding", "").lower():
            self._mode = "chunk size"
        elif "content-length" in headers:
            length = headers["content-length"]
            if not (length.isdigit() and length.isascii()):
                raise ProtocolError(f"not a content length: {length[:40]!r}")
            self._left = int(length)
            self._mode = "length"
            self.done = self._left == 0
        else:
            self._mode = "to eof"
            self.keep_alive = False


class SseParser:
    """``data:`` payloads of a server-sent event stream; comments and other fields are skipped."""

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[bytes] = []

    def feed(self, body: bytes) -> list[bytes]:
        """The payloads of the events that ``body`` completes, several ``data:`` lines joined by newlines."""
        if not body:
            return []
        self._buffer += body
        *lines, self._buffer = self._buffer.split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events
