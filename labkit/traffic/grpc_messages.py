"""gRPC's messages in a stream of HTTP/2, for the client and the golden server: PROTOCOL-HTTP2.md, uncompressed."""

from __future__ import annotations

from collections.abc import Iterator

METHOD = "/labkit.v1.Generation/Generate"

PREFIX_BYTES = 5
"""Before each message: a byte that is 1 if it is compressed, and four for its length."""
MOST_MESSAGE_BYTES = 2**24
"""What claims to be larger than any prompt or chunk of tokens is garbage, and would be waited for in vain."""


def framed(message: bytes) -> bytes:
    """A message as it goes into a stream, uncompressed."""
    return b"\0" + len(message).to_bytes(PREFIX_BYTES - 1, "big") + message


def take_messages(buffer: bytearray) -> Iterator[bytes]:
    """The whole messages at the beginning of ``buffer``, which are taken from it. Raises ValueError for one that is
    compressed (nothing but identity is offered) or larger than MOST_MESSAGE_BYTES, at once."""
    start = 0
    try:
        while len(buffer) - start >= PREFIX_BYTES:
            if buffer[start]:
                raise ValueError(f"a compressed message (flag {buffer[start]}), and no compression was offered")
            body = start + PREFIX_BYTES
            length = int.from_bytes(buffer[start + 1 : body], "big")
            if length > MOST_MESSAGE_BYTES:
                raise ValueError(f"a message of {length} bytes; at most {MOST_MESSAGE_BYTES} are taken")
            if len(buffer) < body + length:
                return
            start = body + length
            yield bytes(buffer[body:start])
    finally:
        del buffer[:start]
