"""When the tokens of a stream are due, and how late they came: the part of a schedule that a client knows too."""

from __future__ import annotations

from dataclasses import dataclass, fields

from labkit.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Token ``i`` of a stream is due ``ttft_ms + i * itl_ms`` after its start; it has ``tokens`` at most."""

    ttft_ms: float = 50.0
    itl_ms: float = 20.0
    tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("ttft_ms", "itl_ms"):
            if not 0 <= getattr(self, name) <= 3_600_000:
                raise ValueError(f"{name} must be between 0 and 3600000; got {getattr(self, name)!r}")
        if not isinstance(self.tokens, int) or self.tokens < 1:
            raise ValueError(f"tokens must be a whole number of at least 1; got {self.tokens!r}")

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """From ``ttft_ms=50,itl_ms=20,tokens=256``, each of which may be left out. Raises UserError."""
        kinds = {field.name: int if field.name == "tokens" else float for field in fields(cls)}
        try:
            given = {name: value for name, _, value in (part.partition("=") for part in text.split(",") if part)}
            if unknown := set(given) - set(kinds):
                raise ValueError(f"no such setting: {', '.join(sorted(unknown))}")
            return cls(**{name: _number(name, value, kinds[name]) for name, value in given.items()})  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f"a schedule is written ttft_ms=50,itl_ms=20,tokens=256; got {text!r}: {error}") from error

    def __str__(self) -> str:
        """What ``parse`` reads."""
        return ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))

    def due_s(self, index: int) -> float:
        """Seconds from a stream's start to token ``index``."""
        return (self.ttft_ms + index * self.itl_ms) / 1000

    @staticmethod
    def text(index: int, start: float) -> str:
        """Token 0 says when its stream started (s, CLOCK_MONOTONIC), the others which they are."""
        return f"@{start:.6f} " if index == 0 else f"{index} "


def lateness_s(schedule: Schedule, chunks: list[tuple[float, str]]) -> list[float]:
    """Of each token, seconds from when it was due to when it came.

    ``chunks`` are (time of arrival in s, CLOCK_MONOTONIC of the server's machine; text) in the order in which they
    came, cut anywhere. Raises ValueError for a text that is not the whole beginning of a stream of ``schedule``.
    """
    late: list[float] = []
    start, rest = 0.0, ""
    for arrived, text in chunks:
        *words, rest = (rest + text).split(" ")
        for word in words:
            index = len(late)
            if index == 0 and word.startswith("@"):
                start = float(word[1:])
            elif index == 0 or word != str(index):
                raise ValueError(f"token {index} was expected, {word!r} came")
            late.append(arrived - start - schedule.due_s(index))
    if rest:
        raise ValueError(f"the stream ends within a token: {rest!r}")
    return late


def _number(name: str, text: str, kind: type[int | float]) -> int | float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name} must be a {'whole ' if kind is int else ''}number; got {text!r}") from None
