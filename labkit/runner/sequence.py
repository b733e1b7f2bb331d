"""One request as the engine sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from labkit.request import SamplingParams

PLACEHOLDER = -1
"""A token that the device knows and the host does not yet."""


@dataclass(eq=False)
class Sequence:
    """A request's tokens and how far they are computed: ``computed < len(tokens) <= limit`` while it runs.

    A token that a step in flight is to sample is in ``tokens`` already, as ``PLACEHOLDER``: its place is known before
    its value is.
    """

    request_id: int
    tokens: list[int]
    """Prompt, then what has been generated."""
    prompt_len: int
    limit: int
    """Tokens at which the request ends, whatever it says."""
    sampling: SamplingParams
    seed: int
    """With a token's position it gives the token's random number, so that a recomputed request goes on alike."""
    arrived_s: float
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    blocks: list[int] = field(default_factory=list)
    row: int = -1
    """The sequence's place in the runner's tables while it runs."""
    copied: int = 0
    """How many of ``blocks`` the runner's tables have."""
    known: int = 0
    """How many of ``tokens`` the host knows; the rest, one or two, are placeholders."""
    ended: bool = False
    """Nothing more is said of it; a step that is still in flight may hold it."""

    def __post_init__(self) -> None:
        self.known = len(self.tokens)

    @property
    def pending(self) -> int:
        """Tokens that the model has yet to see before the next one can be sampled."""
        return len(self.tokens) - self.computed


class Work(NamedTuple):
    """One sequence's share of a step: its next ``tokens`` pending tokens."""

    sequence: Sequence
    tokens: int

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's end, so that its next token is sampled."""
        return self.tokens == self.sequence.pending
