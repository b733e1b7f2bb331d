from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from labkit.core import LabkitCore
from labkit.deployment import Deployment
from labkit.engine import AsyncEngine, Delta, Engine, EngineFailed, QueueFull
from labkit.errors import UserError
from labkit.request import SamplingParams

GREEDY = SamplingParams(max_tokens=64, ignore_eos=True)
PATIENCE_S = 30


def deployment(tiny_model: Path, **knobs: Any) -> Deployment:
    return Deployment(model=str(tiny_model), device="cpu", **knobs)


async def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it never came true"
        await asyncio.sleep(0.002)


@asynccontextmanager
async def serving(deployed: Deployment, core: Any = None) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(deployed, core)
    engine.start()
    try:
        await until(lambda: engine.ready or engine.failed)
        yield engine
    finally:
        engine.stop()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 2 * PATIENCE_S))


async def ask(
    engine: AsyncEngine, prompt: list[int], sampling: SamplingParams = GREEDY
) -> tuple[str, list[int], Delta]:
    text, tokens = "", []
    async for delta in engine.stream(prompt, sampling):
        text += delta.text
        tokens += delta.token_ids
    return text, tokens, delta


class SlowCore(LabkitCore):
    """Steps that take a while, so that a test can act while requests run."""

    def step(self) -> Any:
        time.sleep(0.005)
        return super().step()


def test_generate_answers_in_order_and_decodes(tiny_model: Path, greedy_cases: Any) -> None:
    engine = Engine(deployment(tiny_model))
    found = engine.generate([case.prompt_ids for case in greedy_cases[:10]], GREEDY)
    for completion, case in zip(found, greedy_cases, strict=False):
        assert list(completion.token_ids) == case.answer_ids
        assert list(completion.prompt_ids) == case.prompt_ids
        whole = engine.tokenizer.decode(case.answer_ids, skip_special_tokens=True)
        assert whole.startswith(completion.text) and len(whole) - len(completion.text) <= 1
    assert engine.generate(["The trade"], GREEDY)[0].prompt_ids == tuple(engine.tokenizer.encode("The trade"))


def test_generate_waits_for_a_batch_window(tiny_model: Path) -> None:
    engine = Engine(deployment(tiny_model, batching="dynamic", batch_window_ms=30))
    began = time.monotonic()
    assert len(engine.generate([[5, 6]], GREEDY)[0].token_ids) == 64
    assert time.monotonic() - began >= 0.03


def test_a_refused_prompt_leaves_nothing_behind(tiny_model: Path, greedy_cases: Any) -> None:
    engine = Engine(deployment(tiny_model))
    with pytest.raises(ValueError, match="empty"):
        engine.generate([[5, 6], []], GREEDY)
    assert not engine.core.has_work()
    assert list(engine.generate([greedy_cases[0].prompt_ids], GREEDY)[0].token_ids) == greedy_cases[0].answer_ids


@pytest.mark.parametrize("first_deployed", [False, True])
def test_stop_strings_cut_the_text_and_the_tokens(tiny_model: Path, greedy_cases: Any, first_deployed: bool) -> None:
    transformers: dict[str, Any] = {"engine": "transformers", "attention": "sdpa", "batching": "static"}
    engine = Engine(deployment(tiny_model, **(transformers if first_deployed else {})))
    prompt = greedy_cases[4].prompt_ids
    whole = engine.generate([prompt], GREEDY)[0]
    middle = len(whole.text) // 2
    stop = next(piece for at in range(middle, len(whole.text)) if "\ufffd" not in (piece := whole.text[at : at + 3]))
    found = engine.generate([prompt], SamplingParams(max_tokens=64, ignore_eos=True, stop=("not there", stop)))[0]
    assert found.text == whole.text[: whole.text.index(stop)]
    assert found.finish_reason == "stop"
    assert 0 < len(found.token_ids) < 64 and found.token_ids == whole.token_ids[: len(found.token_ids)]
    assert stop in engine.tokenizer.decode(found.token_ids)
    assert stop not in engine.tokenizer.decode(found.token_ids[:-1])
    assert not engine.core.has_work() and engine.core.stats().kv_blocks_used == 0


def test_the_end_of_sequence_token_has_no_text(tiny_model: Path, greedy_cases: Any) -> None:
    engine = Engine(deployment(tiny_model))
    case = greedy_cases[0]
    ending = next(token for token in case.answer_ids[5:] if engine.tokenizer.decode([token]).isalnum())
    engine.core.eos_token_ids = frozenset({ending})
    found = engine.generate([case.prompt_ids], SamplingParams(max_tokens=64))[0]
    assert found.token_ids[-1] == ending and found.finish_reason == "stop"
    assert found.text == "".join(
        engine.generate([case.prompt_ids], SamplingParams(max_tokens=len(found.token_ids) - 1))[0].text
    )


def test_fifty_streams_at_once_answer_as_if_alone(tiny_model: Path, greedy_cases: Any) -> None:
    async def test() -> None:
        async with serving(deployment(tiny_model, kv_blocks=80, token_budget=64, max_batch=16)) as engine:
            found = await asyncio.gather(*[ask(engine, case.prompt_ids) for case in greedy_cases])
            assert [tokens for _, tokens, _ in found] == [case.answer_ids for case in greedy_cases]
            assert all(last.finish_reason == "length" for _, _, last in found)
            stats = engine.stats()
            assert (stats.waiting, stats.running, stats.kv_blocks_used) == (0, 0, 0)
            assert stats.generated_tokens == 50 * 64 and stats.busy_s > 0

    run(test())


def test_tokens_come_while_the_answer_is_made(tiny_model: Path) -> None:
    async def test() -> None:
        deployed = deployment(tiny_model)
        async with serving(deployed, SlowCore(deployed)) as engine:
            seen = 0
            async for delta in engine.stream([5, 6], GREEDY):
                seen += len(delta.token_ids)
                if seen == 3:
                    assert engine.stats().running == 1
                    assert engine.stats().generated_tokens < 64
            assert seen == 64

    run(test())


def test_closing_a_stream_frees_its_blocks(tiny_model: Path) -> None:
    async def test() -> None:
        deployed = deployment(tiny_model)
        async with serving(deployed, SlowCore(deployed)) as engine:
            stream = engine.stream([5] * 100, GREEDY)
            await anext(stream)
            assert engine.stats().kv_blocks_used > 0
            await stream.aclose()
            await until(lambda: engine.stats().kv_blocks_used == 0)
            steps = engine.stats().steps
            assert steps < 60, "it was cancelled, not finished"
            waiting = asyncio.create_task(ask(engine, [5] * 100))
            await until(lambda: engine.stats().running == 1)
            waiting.cancel()
            await until(lambda: engine.stats().kv_blocks_used == engine.stats().running == 0)
            assert engine.stats().steps - steps < 60

    run(test())


def test_a_full_queue_refuses_and_an_idle_engine_does_not(tiny_model: Path) -> None:
    async def test() -> None:
        deployed = deployment(tiny_model, max_batch=2, max_queue=1)
        async with serving(deployed, SlowCore(deployed)) as engine:
            tasks = [asyncio.create_task(ask(engine, [5, 6])) for _ in range(3)]
            await until(lambda: (engine.stats().running, engine.stats().waiting) == (2, 1))
            with pytest.raises(QueueFull, match="1 requests wait"):
                await ask(engine, [5, 6])
            with pytest.raises(QueueFull):
                engine.check([5, 6])
            assert all(len(tokens) == 64 for _, tokens, _ in await asyncio.gather(*tasks))
            await ask(engine, [5, 6])
        async with serving(deployment(tiny_model, max_queue=0)) as engine:
            await ask(engine, [5, 6])

    run(test())


def test_bad_prompts_are_refused_before_anything_runs(tiny_model: Path) -> None:
    async def test() -> None:
        async with serving(deployment(tiny_model)) as engine:
            for prompt, reason in [([], "empty"), ([5] * 512, "512"), ([9999], "399")]:
                with pytest.raises(ValueError, match=reason):
                    engine.check(prompt)
                with pytest.raises(ValueError, match=reason):
                    await ask(engine, prompt)
            assert engine.stats().steps == 0

    run(test())


def test_a_broken_step_reaches_everyone_and_those_who_come_later(tiny_model: Path) -> None:
    class Breaking(SlowCore):
        def step(self) -> Any:
            if self.stats().generated_tokens > 10:
                raise RuntimeError("a bug")
            return super().step()

    async def test() -> None:
        deployed = deployment(tiny_model)
        async with serving(deployed, Breaking(deployed)) as engine:
            found = await asyncio.gather(*[ask(engine, [5, 6]) for _ in range(4)], return_exceptions=True)
            assert [type(each) for each in found] == [EngineFailed] * 4
            assert "a bug" in str(found[0])
            assert engine.failed == "RuntimeError: a bug" and not engine.ready
            with pytest.raises(EngineFailed, match="a bug"):
                await ask(engine, [5, 6])

    run(test())


def test_running_out_of_memory_ends_a_request_not_the_engine(tiny_model: Path, greedy_cases: Any) -> None:
    async def test() -> None:
        deployed = deployment(tiny_model)
        core = LabkitCore(deployed)
        forward = core.runner.model.forward

        def limited(token_ids: Any, *rest: Any) -> Any:
            if len(token_ids) > 450:
                raise MemoryError
            return forward(token_ids, *rest)

        core.runner.model.forward = limited  # type: ignore[method-assign]
        async with serving(deployed, core) as engine:
            _, _, last = await ask(engine, [5] * 460)
            assert last.finish_reason == "error" and last.error is not None and "out of memory" in last.error
            assert (await ask(engine, greedy_cases[0].prompt_ids))[1] == greedy_cases[0].answer_ids

    run(test())


def test_a_stopped_engine_leaves_nobody_waiting(tiny_model: Path) -> None:
    async def test() -> None:
        deployed = deployment(tiny_model)
        async with serving(deployed, SlowCore(deployed)) as engine:
            waiting = asyncio.create_task(ask(engine, [5, 6], SamplingParams(max_tokens=500, ignore_eos=True)))
            await until(lambda: engine.stats().running)
            await asyncio.to_thread(engine.stop)
            with pytest.raises(EngineFailed, match="stopped"):
                await waiting
        assert not any(thread.name == "engine" for thread in threading.enumerate())

    run(test())


def test_it_loads_in_its_thread_and_says_when_it_cannot(tiny_model: Path, tmp_path: Path) -> None:
    async def test() -> None:
        engine = AsyncEngine(deployment(tiny_model, max_context=100))
        assert not engine.ready
        with pytest.raises(EngineFailed, match="loading"):
            await ask(engine, [5])
        for file in tiny_model.iterdir():
            if file.name != "model.safetensors":
                (tmp_path / file.name).write_bytes(file.read_bytes())
        async with serving(deployment(tmp_path)) as broken:
            assert broken.failed is not None and "no model.safetensors" in broken.failed

    run(test())
    with pytest.raises(UserError, match="no model directory"):
        AsyncEngine(deployment(tmp_path / "nowhere"))


def test_a_dynamic_batch_fires_without_a_new_arrival(tiny_model: Path) -> None:
    async def test() -> None:
        async with serving(deployment(tiny_model, batching="dynamic", batch_window_ms=150, max_batch=8)) as engine:
            began = time.monotonic()
            first = asyncio.create_task(ask(engine, [5, 6]))
            await asyncio.sleep(0.05)
            await asyncio.gather(first, ask(engine, [5, 6, 7]))
            assert 0.15 <= time.monotonic() - began < 5
            assert engine.stats().steps == 64, "both ran in one batch"

    run(test())


def test_the_baseline_behind_the_same_interface(tiny_model: Path, greedy_cases: Any) -> None:
    async def test() -> None:
        deployed = Deployment.as_first_deployed(str(tiny_model), device="cpu", max_batch=4)
        async with serving(deployed) as engine:
            found = await asyncio.gather(*[ask(engine, case.prompt_ids) for case in greedy_cases[:8]])
            assert [tokens for _, tokens, _ in found] == [case.answer_ids for case in greedy_cases[:8]]

    run(test())
