"""Tokens sent together: when a chunk goes out, and that nothing else changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from labkit.deployment import Deployment
from labkit.serving.pieces import Piece, coalesced, joined_while_busy
from labkit.serving.streams import Choice

CHAT = "/v1/chat/completions"
CHOICES = [Choice(0, None), Choice(1, None)]


def piece(text: str, choice: int = 0, finish: Any = None) -> Piece:
    return Piece(CHOICES[choice], "", text, 1, (), finish, 0)


async def said(plan: list[Any], closed: list[bool] | None = None) -> AsyncGenerator[Piece, None]:
    """Pieces; a number is a pause, an exception is raised."""
    try:
        for each in plan:
            if isinstance(each, Exception):
                raise each
            if isinstance(each, float):
                await asyncio.sleep(each)
            else:
                yield each
    finally:
        if closed is not None:
            closed.append(True)


def chunks(plan: list[Any], tokens: int, seconds: float = 0.0) -> list[tuple[str, int, float]]:
    """(text, tokens, seconds since the beginning) of each chunk."""

    async def main() -> list[tuple[str, int, float]]:
        began, got = time.monotonic(), []
        async for each in coalesced(said(plan), tokens, seconds):
            got.append((each.text, each.tokens, time.monotonic() - began))
        return got

    return asyncio.run(main())


def test_a_chunk_goes_out_when_its_tokens_are_there_or_the_answer_ends() -> None:
    plan = [piece(each) for each in "abcdefg"] + [piece("h", finish="stop")]
    assert [each[:2] for each in chunks(plan, 3)] == [("abc", 3), ("def", 3), ("gh", 2)]


@pytest.mark.clock
def test_a_chunk_goes_out_when_its_first_token_has_waited() -> None:
    plan = [piece("a"), 0.02, piece("b"), 0.5, piece("c"), piece("d", finish="stop")]
    (first, _, at), (second, _, later) = chunks(plan, 100, 0.1)
    assert (first, second) == ("ab", "cd")
    assert 0.09 < at < 0.3 and 0.5 < later < 0.7


def test_without_a_limit_of_time_a_chunk_waits_for_its_tokens() -> None:
    plan = [piece("a"), 0.2, piece("b"), piece("c", finish="length")]
    ((text, _, at), _) = chunks(plan, 2)
    assert text == "ab" and at > 0.19


def test_the_choices_of_an_answer_are_joined_apart() -> None:
    plan = [piece("a"), piece("1", 1), piece("b"), piece("2", 1, "stop"), piece("c", finish="stop")]
    assert [each[0] for each in chunks(plan, 2)] == ["ab", "12", "c"]


def test_what_was_there_comes_before_an_error() -> None:
    got = []

    async def main() -> None:
        async for each in coalesced(said([piece("a"), piece("b"), OSError("gone")]), 9, 0.0):
            got.append(each.text)

    with pytest.raises(OSError, match="gone"):
        asyncio.run(main())
    assert got == ["ab"]


def test_closing_it_closes_what_it_reads_from() -> None:
    closed: list[bool] = []

    async def main() -> None:
        stream = coalesced(said([piece("a"), piece("b"), 30.0, piece("c")], closed), 2, 0.0)
        assert (await anext(stream)).text == "ab"
        waiting = asyncio.create_task(anext(stream))  # type: ignore[arg-type]
        await asyncio.sleep(0.02)
        waiting.cancel()
        await asyncio.wait((waiting,))
        await stream.aclose()

    asyncio.run(main())
    assert closed == [True]


def test_only_the_number_of_chunks_changes(helpers: Any, engine: Any) -> None:
    engine.pieces = ("<think>", "add", " them", "</think>", "\n", "4", "2", "!", " Yes", ".")
    seen = {}
    for tokens in (1, 4, 100):
        engine.deployment = Deployment(chunk_tokens=tokens)
        with helpers.running(engine) as url:
            events = helpers.events(httpx.post(url + CHAT, json=helpers.chat(stream=True)))
            itls = httpx.get(url + "/metrics").text
        deltas = [each["choices"][0]["delta"] for each in events[:-1]]
        assert f"labkit_inter_token_latency_seconds_count {len(engine.pieces) - 1}.0" in itls
        seen[tokens] = (
            "".join(each.get("reasoning_content", "") for each in deltas),
            "".join(each.get("content", "") for each in deltas),
            events[-2]["choices"][0]["finish_reason"],
            events[-2]["usage"],
        )
        assert len(deltas) == {1: 8, 4: 3, 100: 1}[tokens]
    assert seen[1] == seen[4] == seen[100]
    assert seen[1][:3] == ("add them", "42! Yes.", "stop")


@pytest.mark.parametrize("knobs", [{"chunk_tokens": 0}, {"chunk_ms": -1.0}, {"chunk_tokens": 1.5}])
def test_a_knob_out_of_range_is_refused(knobs: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(knobs))):
        Deployment(**knobs)


def test_what_comes_while_a_piece_is_written_goes_out_with_the_next() -> None:
    async def main(plan: list[Any], write_s: float, most: int = 64) -> tuple[list[tuple[str, int]], str]:
        got, error = [], ""
        try:
            async for each in joined_while_busy(said(plan), most):
                got.append((each.text, each.tokens))
                await asyncio.sleep(write_s)
        except ValueError as raised:
            error = str(raised)
        return got, error

    slow = [each for letter in "abcdef" for each in (piece(letter), 0.02)]
    assert asyncio.run(main(slow, 0.0)) == ([(letter, 1) for letter in "abcdef"], "")
    got, _ = asyncio.run(main(slow, 0.05))
    assert "".join(text for text, _ in got) == "abcdef" and 2 <= len(got) <= 4
    assert all(tokens == len(text) for text, tokens in got)
    at_once = [piece(letter) for letter in "abcdefgh"]
    got, error = asyncio.run(main([*at_once, ValueError("gone")], 0.01, most=3))
    assert "".join(text for text, _ in got) == "abcdefgh" and max(tokens for _, tokens in got) == 3
    assert error == "gone"


def test_giving_up_on_what_is_joined_closes_the_pieces() -> None:
    closed: list[bool] = []

    async def main() -> None:
        pieces = joined_while_busy(said([piece("a"), 30.0, piece("b")], closed))
        assert (await anext(pieces)).text == "a"
        await pieces.aclose()

    asyncio.run(main())
    assert closed == [True]
