"""Ctrl-C in a command that has something to say about it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

EXIT_CODE = 130
"""128 + SIGINT, as shells count."""


@contextmanager
def told_on_interrupt(what: str) -> Iterator[None]:
    """On Ctrl-C prints ``labkit: interrupted; <what>`` to stderr and raises ``typer.Exit`` with code 130.

    Also when the KeyboardInterrupt was made into another error on its way up: ``torch.asarray``, with which safetensors
    reads, gives a ValueError about the shape of its storage for it. A process that ignores Ctrl-C still does.
    """
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    hears = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if hears:
        signal.signal(signal.SIGINT, note)
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if not came and not isinstance(error, KeyboardInterrupt):
            raise
        print(f"labkit: interrupted; {what}", file=sys.stderr)
        raise typer.Exit(EXIT_CODE) from None
    finally:
        if hears:
            signal.signal(signal.SIGINT, signal.default_int_handler)
