"""The pieces of an answer in the order in which they are sent, and how many tokens are sent together."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from labkit.request import EngineFailed, FinishReason, TokenLogprob
from labkit.serving.intake import Service
from labkit.serving.prompts import Work
from labkit.serving.streams import MERGED, Choice, ReasoningSplitter, deltas


@dataclass(slots=True)
class Piece:
    """What tokens of one choice add to its answer. ``offset`` is the characters of the answer before them."""

    choice: Choice
    reasoning: str
    text: str
    tokens: int
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    offset: int

    def join(self, later: Piece) -> None:
        self.reasoning += later.reasoning
        self.text += later.text
        self.tokens += later.tokens
        self.logprobs += later.logprobs
        self.finish_reason = later.finish_reason


class Progress:
    """One request while it runs on the engine. ``choices`` hold what came so far."""

    def __init__(self, service: Service, work: Work, received: float, chat: bool) -> None:
        self._service, self._work, self._received = service, work, received
        think_end = _single_token(service.engine.tokenizer, "</think>") if chat else None
        self.choices = [
            Choice(job.index, ReasoningSplitter(work.opened_think) if chat else None, think_end) for job in work.jobs
        ]
        self.last = received
        """When the last token came from the engine."""

    @property
    def tokens(self) -> int:
        return sum(choice.tokens for choice in self.choices)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """One for each delta of the engine, timed as it comes. Raises EngineFailed for a request that it gave up."""
        metrics, choices = self._service.metrics, self.choices
        times = [0.0] * len(choices)
        async with aclosing(deltas(self._service.engine, self._work.jobs)) as stream:  # type: ignore[type-var]
            async for index, delta in stream:
                self.last = now = time.monotonic()
                if times[index]:
                    metrics.itl.observe(now - times[index])
                else:
                    metrics.ttft.observe(now - self._received)
                times[index] = now
                if delta.finish_reason in ("error", "cancelled"):
                    raise EngineFailed("the engine gave this request up")
                choice = choices[index]
                offset = len(choice.text) if delta.logprobs else 0
                reasoning, text = choice.add(delta)
                yield Piece(choice, reasoning, text, len(delta.token_ids), delta.logprobs, delta.finish_reason, offset)
        if any(choice.finish_reason is None for choice in choices):
            raise EngineFailed("the engine ended this request without a reason")

    def chunks(self) -> AsyncGenerator[Piece, None]:
        """The pieces, joined as the deployment says (``chunk_tokens``, ``chunk_ms``)."""
        deployment = self._service.engine.deployment
        if deployment.chunk_tokens == 1:
            return self.pieces()
        return coalesced(self.pieces(), deployment.chunk_tokens, deployment.chunk_ms / 1000)


async def coalesced(pieces: AsyncGenerator[Piece, None], tokens: int, seconds: float) -> AsyncGenerator[Piece]:
    """Joins pieces of a choice until ``tokens`` are together, ``seconds`` went by since its first (0: no limit), or it
    has ended. Closing it closes ``pieces``; what ``pieces`` raises comes after what was there before.
    """
    waiting: dict[int, tuple[Piece, float]] = {}
    following: asyncio.Task[Piece] | None = None
    loop = asyncio.get_running_loop()
    try:
        while True:
            following = following or asyncio.ensure_future(_next(pieces))
            wait_s = None
            if seconds and waiting:
                wait_s = max(0.0, min(due for _, due in waiting.values()) - loop.time())
            await asyncio.wait((following,), timeout=wait_s)
            for index in [index for index, (_, due) in waiting.items() if seconds and due <= loop.time()]:
                yield waiting.pop(index)[0]
            if not following.done():
                continue
            try:
                piece = following.result()
            except Exception as error:
                for held, _ in waiting.values():
                    yield held
                if isinstance(error, StopAsyncIteration):
                    return
                raise
            finally:
                following = None
            index = piece.choice.index
            if index in waiting:
                waiting[index][0].join(piece)
            else:
                waiting[index] = (piece, loop.time() + seconds)
            if waiting[index][0].tokens >= tokens or piece.finish_reason:
                yield waiting.pop(index)[0]
    finally:
        if following is not None:
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
                await following
        await pieces.aclose()


async def joined_while_busy(pieces: AsyncGenerator[Piece, None], most: int = MERGED) -> AsyncGenerator[Piece, None]:
    """The pieces of a request with one choice; those that come while whoever takes them is busy with one are joined,
    up to ``most`` tokens. Closing it closes ``pieces``; what ``pieces`` raises comes after what was there before.
    """
    held: list[Piece] = []
    news, room = asyncio.Event(), asyncio.Event()

    async def read() -> None:
        async with aclosing(pieces):
            async for piece in pieces:
                if held:
                    held[0].join(piece)
                else:
                    held.append(piece)
                news.set()
                while held and held[0].tokens >= most:
                    room.clear()
                    await room.wait()

    reading = asyncio.create_task(read())
    reading.add_done_callback(lambda _: news.set())
    try:
        while held or not reading.done():
            await news.wait()
            news.clear()
            if held:
                room.set()
                yield held.pop()
        reading.result()
    finally:
        if not reading.done():
            reading.cancel()
            await asyncio.wait((reading,))


async def _next(pieces: AsyncGenerator[Piece, None]) -> Piece:
    return await anext(pieces)


def _single_token(tokenizer: Any, text: str) -> int | None:
    token = tokenizer.convert_tokens_to_ids(text)
    return token if isinstance(token, int) and token != tokenizer.unk_token_id else None
