"""From the engine's deltas to the pieces of an answer: reasoning apart from the rest, several choices in one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from labkit.request import Delta, TokenLogprob
from labkit.serving.options import StreamingEngine
from labkit.serving.prompts import Job

OPEN, CLOSE = "<think>", "</think>"
MERGED = 64
"""Deltas of a request with several choices that may wait to be sent."""
LEAST_LOGPROB = -9999.0
"""JSON has no infinity."""


class ReasoningSplitter:
    """Tells the ``<think>`` part of a text that comes in pieces from the rest; the tags and the newlines after them go.

    Only a text that begins with ``<think>``, or whose prompt ended with it (``opened``), has a reasoning part.
    """

    def __init__(self, opened: bool = False) -> None:
        self.state = "reasoning" if opened else "start"
        self.reasoned = opened
        self._held = ""
        self._fresh = True

    def feed(self, text: str) -> tuple[str, str]:
        """(reasoning, content) that ``text`` adds. What may be the beginning of a tag is held back."""
        text = self._held + text
        self._held = ""
        if self.state == "start":
            stripped = text.lstrip()
            if stripped.startswith(OPEN):
                self.state, self.reasoned, text = "reasoning", True, stripped[len(OPEN) :]
            elif OPEN.startswith(stripped):
                self._held = text
                return "", ""
            else:
                self.state, self._fresh = "answer", False
        if self.state == "answer":
            return "", self._trim(text)
        end = text.find(CLOSE)
        if end < 0:
            kept = _tail_that_begins(text, CLOSE)
            self._held = text[len(text) - kept :]
            return self._trim(text[: len(text) - kept]), ""
        thought = self._trim(text[:end])
        self.state, self._fresh = "answer", True
        return thought, self._trim(text[end + len(CLOSE) :])

    def finish(self) -> tuple[str, str]:
        """(reasoning, content) that was held back, once no more text comes."""
        held, self._held = self._held, ""
        if self.state == "reasoning":
            return self._trim(held), ""
        return "", held

    def _trim(self, text: str) -> str:
        if self._fresh:
            text = text.lstrip("\n")
            self._fresh = not text
        return text


def _tail_that_begins(text: str, tag: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``tag``."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


class Choice:
    """One answer as it grows. ``think_end`` is the token id of ``</think>`` where the tokenizer has one."""

    def __init__(self, index: int, splitter: ReasoningSplitter | None, think_end: int | None = None) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self.tokens = 0
        self.logprobs: list[TokenLogprob] = []
        self._splitter = splitter
        self._think_end = think_end
        self._thought_tokens = 0
        self._reasoning: list[str] = []
        self._text: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    @property
    def reasoning_tokens(self) -> int:
        """Tokens up to ``</think>``, the tags included; 0 for an answer without reasoning."""
        return self._thought_tokens if self._splitter is not None and self._splitter.reasoned else 0

    def add(self, delta: Delta) -> tuple[str, str]:
        """(reasoning, text) that ``delta`` adds."""
        thinking = self._splitter is not None and self._splitter.state != "answer"
        reasoning, text = self._splitter.feed(delta.text) if self._splitter is not None else ("", delta.text)
        self.tokens += len(delta.token_ids)
        if thinking:
            ids = delta.token_ids
            self._thought_tokens += ids.index(self._think_end) + 1 if self._think_end in ids else len(ids)
        self.logprobs += delta.logprobs or ()
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            if self._splitter is not None:
                more_reasoning, more_text = self._splitter.finish()
                reasoning, text = reasoning + more_reasoning, text + more_text
        self._reasoning.append(reasoning)
        self._text.append(text)
        return reasoning, text


async def deltas(engine: StreamingEngine, jobs: list[Job]) -> AsyncIterator[tuple[int, Delta]]:
    """(choice, delta) of all jobs as they come. Closing it cancels them all; the first error ends them all.

    Raises what ``engine.stream`` raises.
    """
    if len(jobs) == 1:
        async with aclosing(engine.stream(jobs[0].prompt_ids, jobs[0].sampling)) as stream:
            async for delta in stream:
                yield 0, delta
        return
    merged: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue(MERGED)

    async def pump(job: Job) -> None:
        try:
            async with aclosing(engine.stream(job.prompt_ids, job.sampling)) as stream:
                async for delta in stream:
                    await merged.put((job.index, delta))
            await merged.put((job.index, None))
        except Exception as error:
            await merged.put((job.index, error))

    tasks = [asyncio.create_task(pump(job)) for job in jobs]
    try:
        left = len(tasks)
        while left:
            index, item = await merged.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def chat_logprobs(tokenizer: Any, logprobs: list[TokenLogprob]) -> dict[str, Any]:
    """OpenAI's shape for chat: every token with its bytes and its rivals."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        token = tokenizer.decode([token_id])
        return {"token": token, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(token.encode())}

    return {
        "content": [
            {**entry(each.token_id, each.logprob), "top_logprobs": [entry(*rival) for rival in each.top]}
            for each in logprobs
        ],
        "refusal": None,
    }


def completion_logprobs(tokenizer: Any, logprobs: list[TokenLogprob], offset: int) -> dict[str, Any]:
    """OpenAI's shape for completions; ``offset`` is the characters of the answer before these tokens."""
    tokens = [tokenizer.decode([each.token_id]) for each in logprobs]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [max(each.logprob, LEAST_LOGPROB) for each in logprobs],
        "top_logprobs": [
            {tokenizer.decode([rival]): max(logprob, LEAST_LOGPROB) for rival, logprob in each.top} for each in logprobs
        ],
        "text_offset": offsets,
    }
