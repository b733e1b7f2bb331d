"""Text from tokens as they come: never half a character, never part of a stop string."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from typing import Any


class TextStream:
    """The text of one answer. What might yet turn out to begin a stop string is held back."""

    def __init__(self, decode: Callable[[int], str], stop: Sequence[str] = ()) -> None:
        """``decode`` makes text of the next token, see ``token_decoder``; one of them serves one answer."""
        self._decode = decode
        self._stop = stop
        self._held = ""
        self.stopped = False
        """Whether a stop string has come; from then on there is no more text."""

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token. It ends before the first stop string."""
        pending, self._held = self._held + self._decode(token_id), ""
        begins = [at for at in (pending.find(stop) for stop in self._stop) if at >= 0]
        if begins:
            self.stopped = True
            return pending[: min(begins)]
        hold = max((_overlap(pending, stop) for stop in self._stop), default=0)
        certain = len(pending) - hold
        self._held = pending[certain:]
        return pending[:certain]

    def flush(self) -> str:
        """What was held back, once it is known that no more tokens come. An unfinished character is dropped."""
        held, self._held = self._held, ""
        return held


def token_decoder(tokenizer: Any) -> Callable[[], Callable[[int], str]]:
    """For a ``transformers`` tokenizer: a maker of decoders, each turning one answer's tokens into text one by one.

    Special tokens give no text. A character that spans tokens comes with the last of them.
    """
    special = frozenset(tokenizer.all_special_ids)
    if _is_byte_level(tokenizer):
        pieces = _token_bytes(tokenizer, special)
        return lambda: _byte_level(pieces)
    return lambda: _windowed(tokenizer)


def _byte_level(pieces: list[bytes]) -> Callable[[int], str]:
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return lambda token_id: characters.decode(pieces[token_id]) if token_id < len(pieces) else ""


def _windowed(tokenizer: Any) -> Callable[[int], str]:
    """For tokenizers whose pieces depend on their neighbours: what a token adds to the text of the few before it."""
    window: list[int] = []
    shown = 0

    def decode(token_id: int) -> str:
        nonlocal shown
        window.append(token_id)
        text = tokenizer.decode(window, skip_special_tokens=True)
        if text.endswith("\ufffd") and len(window) < 16:
            return ""
        added, shown = text[shown:], len(text)
        if len(window) > 8:
            del window[:-4]
            shown = len(tokenizer.decode(window, skip_special_tokens=True))
        return added

    return decode


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and (json.loads(backend.to_str()).get("decoder") or {}).get("type") == "ByteLevel"


def _token_bytes(tokenizer: Any, special: frozenset[int]) -> list[bytes]:
    """The bytes of every token: added ones stand for themselves, the others are spelled in the byte alphabet."""
    alphabet = _byte_alphabet()
    added = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = tokenizer.get_vocab()
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        if token_id in special:
            continue
        if token_id in added or any(character not in alphabet for character in token):
            pieces[token_id] = added.get(token_id, token).encode()
        else:
            pieces[token_id] = bytes(alphabet[character] for character in token)
    return pieces


def _byte_alphabet() -> dict[str, int]:
    """The character by which byte-level BPE writes each byte: itself where it is printable, else one from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` with which ``stop`` begins."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
