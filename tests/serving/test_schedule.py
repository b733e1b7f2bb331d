"""The engine that keeps a schedule: its tokens, their times, and how late they are found to be."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import pytest

from labkit.deployment import Deployment
from labkit.engine import QueueFull
from labkit.errors import UserError
from labkit.request import SamplingParams
from labkit.serving.schedule import Schedule, lateness_s
from labkit.serving.schedule_engine import STEP_S, ScheduleEngine


def engine(model: Path, **knobs: Any) -> ScheduleEngine:
    made = ScheduleEngine(Deployment(model=str(model), **knobs), Schedule(ttft_ms=60, itl_ms=25, tokens=8))
    made.start()
    return made


async def collect(engine: ScheduleEngine, tokens: int) -> list[tuple[float, Any]]:
    return [(time.monotonic(), delta) async for delta in engine.stream([1, 2], SamplingParams(max_tokens=tokens))]


@pytest.mark.clock
@pytest.mark.parametrize(("asked", "tokens", "reason"), [(100, 8, "stop"), (5, 5, "length")])
def test_tokens_come_when_they_are_due(tiny_model: Path, asked: int, tokens: int, reason: str) -> None:
    made = engine(tiny_model)
    for stream in asyncio.run(_several(made, asked)):
        assert [delta.finish_reason for _, delta in stream] == [None] * (tokens - 1) + [reason]
        late = lateness_s(made.schedule, [(at, delta.text) for at, delta in stream])
        assert len(late) == tokens and all(-1e-3 <= each <= STEP_S + 0.05 for each in late)
    assert (made.stats().running, made.stats().generated_tokens) == (0, 20 * tokens)


async def _several(made: ScheduleEngine, asked: int) -> list[list[tuple[float, Any]]]:
    return await asyncio.gather(*(collect(made, asked) for _ in range(20)))


def test_a_stream_that_is_given_up_leaves_the_others_alone(tiny_model: Path) -> None:
    made = engine(tiny_model)

    async def main() -> list[tuple[float, Any]]:
        left, stays = asyncio.create_task(collect(made, 8)), asyncio.create_task(collect(made, 8))
        await asyncio.sleep(0.08)
        assert made.stats().kv_blocks_used == 2
        left.cancel()
        await asyncio.wait((left,))
        assert made.stats().kv_blocks_used == 1
        return await stays

    assert len(asyncio.run(main())) == 8


def test_no_more_are_taken_than_the_deployment_admits(tiny_model: Path) -> None:
    made = engine(tiny_model, max_batch=2, max_queue=1)

    async def main() -> list[Any]:
        return await asyncio.gather(*(collect(made, 2) for _ in range(5)), return_exceptions=True)

    results = asyncio.run(main())
    assert sum(isinstance(each, QueueFull) for each in results) == 2


def test_lateness_is_found_however_the_text_was_cut() -> None:
    schedule = Schedule(ttft_ms=100, itl_ms=10, tokens=50)
    start = 1234.5
    whole = "".join(schedule.text(index, start) for index in range(50))
    random_ = random.Random(0)
    for _ in range(20):
        chunks, at, position = [], start + 0.1, 0
        while position < len(whole):
            length = random_.randint(1, 12)
            at += 0.004
            chunks.append((at, whole[position : position + length]))
            position += length
        late = lateness_s(schedule, chunks)
        ends = [len("".join(schedule.text(i, start) for i in range(n + 1))) for n in range(50)]
        came, passed = [], 0
        for when, text in chunks:
            passed += len(text)
            came += [when] * (sum(end <= passed for end in ends) - len(came))
        assert late == pytest.approx([when - start - 0.1 - 0.01 * i for i, when in enumerate(came)])


@pytest.mark.parametrize("text", ["1 2 ", "@5.0 2 ", "@5.0 1 1 ", "@5.0 1", "@5.0 x "])
def test_a_stream_with_a_hole_is_no_measurement(text: str) -> None:
    with pytest.raises(ValueError, match="expected|ends within"):
        lateness_s(Schedule(), [(5.0, text)])


def test_a_schedule_from_the_command_line() -> None:
    assert Schedule.parse("ttft_ms=5,itl_ms=2.5,tokens=7") == Schedule(5.0, 2.5, 7)
    assert Schedule.parse(str(Schedule(5.0, 2.5, 7))) == Schedule(5.0, 2.5, 7)
    assert Schedule.parse("tokens=7") == Schedule(tokens=7) and Schedule.parse("") == Schedule()
    for text in ("tokens=0", "ttft_ms=-1", "ttft=5", "tokens", "itl_ms=fast", "itl_ms=nan"):
        with pytest.raises(UserError, match=r"a schedule is written ttft_ms=.*(no such|must be)"):
            Schedule.parse(text)
