"""The engine core against transformers, token by token, whatever it does to its requests on the way."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from labkit.core import LabkitCore, is_out_of_memory
from labkit.deployment import Deployment
from labkit.request import SamplingParams, TokenOutput

GREEDY = SamplingParams(max_tokens=64, ignore_eos=True)


def core(tiny_model: Path, **knobs: Any) -> LabkitCore:
    return LabkitCore(Deployment(model=str(tiny_model), device="cpu", **({"batch_window_ms": 0.0} | knobs)))


def finish(engine: LabkitCore) -> dict[int, list[TokenOutput]]:
    outputs: dict[int, list[TokenOutput]] = {}
    while engine.has_work():
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    assert engine.stats().kv_blocks_used == engine.stats().running == engine.stats().waiting == 0
    return outputs


def answers(engine: LabkitCore) -> dict[int, list[int]]:
    return {name: [token for each in outputs for token in each.token_ids] for name, outputs in finish(engine).items()}


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"token_budget": 7},
        {"token_budget": 13, "max_batch": 5},
        {"token_budget": 33, "kv_blocks": 60},
        {"token_budget": 100, "kv_blocks": 200, "kv_block_size": 5},
        {"chunked_prefill": False},
        {"chunked_prefill": False, "kv_blocks": 70, "token_budget": 50},
        {"batching": "static", "max_batch": 8},
        {"batching": "static", "max_batch": 50, "kv_blocks": 60, "token_budget": 33},
        {"batching": "dynamic", "max_batch": 7},
        {"async_scheduling": True},
        {"async_scheduling": True, "token_budget": 33, "kv_blocks": 60},
        {"async_scheduling": True, "chunked_prefill": False, "kv_blocks": 70, "token_budget": 50},
        {"async_scheduling": True, "batching": "static", "max_batch": 8},
        {"async_scheduling": True, "prefix_cache": True, "token_budget": 100, "kv_blocks": 200, "kv_block_size": 5},
    ],
    ids=str,
)
def test_greedy_answers_equal_those_of_transformers(tiny_model: Path, greedy_cases: Any, knobs: dict[str, Any]) -> None:
    engine = core(tiny_model, **knobs)
    for request_id, case in enumerate(greedy_cases):
        engine.add(request_id, case.prompt_ids, GREEDY)
    found = answers(engine)
    assert [found[i] for i in range(50)] == [case.answer_ids for case in greedy_cases]
    assert (engine.stats().preemptions > 0) == ("kv_blocks" in knobs), "preemption is forced where blocks are few"
    assert engine.stats().generated_tokens == 50 * 64
    assert engine.stats().prompt_tokens == sum(len(case.prompt_ids) for case in greedy_cases)


@pytest.mark.parametrize("knobs", [{}, {"async_scheduling": True, "prefix_cache": True}], ids=str)
def test_answers_do_not_depend_on_who_comes_and_goes(
    tiny_model: Path, greedy_cases: Any, knobs: dict[str, Any]
) -> None:
    """Requests arrive and are cancelled at random while others run; those that stay answer as if alone."""
    chance = random.Random(1)
    engine, found, cancelled = core(tiny_model, kv_blocks=64, token_budget=40, max_batch=12, **knobs), {}, set()
    waiting = list(enumerate(greedy_cases))
    while waiting or engine.has_work():
        if waiting and chance.random() < 0.4:
            request_id, case = waiting.pop()
            engine.add(request_id, case.prompt_ids, GREEDY)
            found[request_id] = []
        if found and chance.random() < 0.05:
            cancelled.add(victim := chance.choice(sorted(found)))
            engine.cancel(victim)
        for output in engine.step():
            assert output.request_id not in cancelled, "nothing is said of a cancelled request"
            found[output.request_id] += output.token_ids
    assert engine.stats().kv_blocks_used == 0
    assert engine.stats().preemptions > 0 and len(cancelled) > 5
    for request_id, case in enumerate(greedy_cases):
        if request_id in cancelled:
            assert found[request_id] == case.answer_ids[: len(found[request_id])]
        else:
            assert found[request_id] == case.answer_ids


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_end_of_sequence_ends_an_answer(tiny_model: Path, greedy_cases: Any, asynchronous: bool) -> None:
    engine = core(tiny_model, async_scheduling=asynchronous)
    engine.eos_token_ids = frozenset({2, 300, 301})
    for request_id, case in enumerate(greedy_cases):
        engine.add(request_id, case.prompt_ids, SamplingParams(max_tokens=64))
    stopped = 0
    for request_id, outputs in finish(engine).items():
        expected = greedy_cases[request_id].answer_ids
        end = next((i + 1 for i, token in enumerate(expected) if token in engine.eos_token_ids), None)
        assert [token for each in outputs for token in each.token_ids] == expected[:end]
        assert outputs[-1].finish_reason == ("length" if end is None else "stop")
        assert all(each.finish_reason is None for each in outputs[:-1])
        stopped += end is not None
        engine.add(request_id, greedy_cases[request_id].prompt_ids, GREEDY)
    assert 0 < stopped < 50
    assert answers(engine) == {i: case.answer_ids for i, case in enumerate(greedy_cases)}, "unless it is ignored"


def test_max_tokens_and_the_context_end_an_answer(tiny_model: Path) -> None:
    engine = core(tiny_model, max_context=20)
    engine.add(0, [5, 6], SamplingParams(max_tokens=1, ignore_eos=True))
    engine.add(1, [5] * 19, SamplingParams(max_tokens=100, ignore_eos=True))
    engine.add(2, [5] * 10, SamplingParams(max_tokens=100, ignore_eos=True))
    outputs = finish(engine)
    assert {name: len(each) for name, each in outputs.items()} == {0: 1, 1: 1, 2: 10}
    assert all(each[-1].finish_reason == "length" for each in outputs.values())


def test_seeded_samples_survive_batching_chunks_and_preemption(tiny_model: Path, greedy_cases: Any) -> None:
    sampling = [
        SamplingParams(max_tokens=30, temperature=1.0, top_p=0.95, seed=seed, ignore_eos=True) for seed in range(20)
    ]
    alone: dict[int, list[int]] = {}
    engine = core(tiny_model)
    for i, params in enumerate(sampling):
        engine.add(i, greedy_cases[i].prompt_ids, params)
        alone |= answers(engine)
    together = core(tiny_model, kv_blocks=30, token_budget=60, async_scheduling=True)
    for i, params in enumerate(sampling):
        together.add(i, greedy_cases[i].prompt_ids, params)
    assert answers(together) == alone
    assert together.stats().preemptions > 0
    assert all(alone[i] != greedy_cases[i].answer_ids[:30] for i in alone)


def test_seeds_decide_and_their_absence_varies(tiny_model: Path) -> None:
    engine = core(tiny_model)
    for i, seed in enumerate([1, 1, 2, None, None]):
        engine.add(i, [5, 6, 7], SamplingParams(max_tokens=20, temperature=1.0, seed=seed, ignore_eos=True))
    found = answers(engine)
    assert found[0] == found[1]
    assert len({tuple(found[i]) for i in (0, 2, 3, 4)}) == 4


def test_logprobs_come_with_the_tokens(tiny_model: Path, greedy_cases: Any) -> None:
    from transformers import AutoModelForCausalLM

    case = greedy_cases[3]
    engine = core(tiny_model)
    engine.add(0, case.prompt_ids, SamplingParams(max_tokens=8, logprobs=2, ignore_eos=True))
    engine.add(1, case.prompt_ids, SamplingParams(max_tokens=8, ignore_eos=True))
    outputs = finish(engine)
    assert all(each.logprobs == () for each in outputs[1])
    ids = case.prompt_ids + case.answer_ids[:8]
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(tiny_model)(torch.tensor([ids])).logits[0, -9:-1]
    exact = logits.log_softmax(-1)
    for row, output in enumerate(outputs[0]):
        (logprob,) = output.logprobs
        assert logprob.token_id == output.token_ids[0] == logprob.top[0][0] == case.answer_ids[row]
        assert logprob.logprob == pytest.approx(exact[row].max().item(), abs=1e-4)
        assert [token for token, _ in logprob.top] == exact[row].topk(2).indices.tolist()


@pytest.mark.parametrize(
    "prompt, reason", [([], "empty"), ([5] * 512, "512 tokens"), ([-1], "between"), ([400], "399")]
)
def test_prompts_that_cannot_run_are_refused(tiny_model: Path, prompt: list[int], reason: str) -> None:
    engine = core(tiny_model)
    with pytest.raises(ValueError, match=reason):
        engine.add(0, prompt, GREEDY)
    assert not engine.has_work()


def test_what_can_never_fit_ends_with_an_error_and_holds_nobody_up(tiny_model: Path) -> None:
    engine = core(tiny_model, max_context=512, kv_blocks=4)
    engine.add(0, [5] * 30, SamplingParams(max_tokens=100))
    engine.add(1, [5] * 30, SamplingParams(max_tokens=34, ignore_eos=True))
    assert engine.wait_s() == 0
    outputs = finish(engine)
    assert outputs[0][0].finish_reason == "error" and "the KV cache holds 64" in (outputs[0][0].error or "")
    assert len(outputs[1]) == 34


def test_a_request_id_is_used_once_at_a_time(tiny_model: Path) -> None:
    engine = core(tiny_model)
    engine.add(0, [5], GREEDY)
    with pytest.raises(ValueError, match="exists already"):
        engine.add(0, [6], GREEDY)
    engine.cancel(0)
    engine.cancel(0)
    engine.cancel(77)
    assert not engine.has_work()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes."),
    ],
)
def test_running_out_of_memory_fails_the_prompts_of_the_step_only(
    tiny_model: Path, greedy_cases: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    engine = core(tiny_model)
    engine.add(0, greedy_cases[0].prompt_ids, GREEDY)
    first = engine.step()
    engine.add(1, [5] * 300, GREEDY)
    model = engine.runner.model.forward

    def too_small(token_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(token_ids) > 100:
            raise error
        return model(token_ids, *rest)

    monkeypatch.setattr(engine.runner.model, "forward", too_small)
    (failed,) = engine.step()
    assert (failed.request_id, failed.finish_reason) == (1, "error") and "out of memory" in (failed.error or "")
    rest = finish(engine)
    assert [*first[0].token_ids, *(t for each in rest[0] for t in each.token_ids)] == greedy_cases[0].answer_ids


def test_torch_says_so_when_the_cpu_has_no_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_other_errors_are_not_swallowed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = core(tiny_model)

    def broken(*_: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(engine.runner.model, "forward", broken)
    engine.add(0, [5, 6], GREEDY)
    with pytest.raises(RuntimeError, match="shapes"):
        engine.step()


def test_a_dynamic_batch_waits_for_its_window_on_the_clock(tiny_model: Path) -> None:
    now = [100.0]
    deployment = Deployment(model=str(tiny_model), device="cpu", batching="dynamic", batch_window_ms=50, max_batch=4)
    engine = LabkitCore(deployment, clock=lambda: now[0])
    engine.add(0, [5, 6], SamplingParams(max_tokens=2, ignore_eos=True))
    assert engine.wait_s() == pytest.approx(0.05)
    assert engine.step() == [] and engine.stats().steps == 0
    now[0] = 100.03
    engine.add(1, [5, 6], SamplingParams(max_tokens=2, ignore_eos=True))
    assert engine.wait_s() == pytest.approx(0.02)
    now[0] = 100.051
    assert engine.wait_s() == 0
    assert [output.request_id for output in engine.step()] == [0, 1]


def test_the_next_step_is_launched_before_the_last_one_is_read(tiny_model: Path, greedy_cases: Any) -> None:
    engine = core(tiny_model, async_scheduling=True)
    engine.add(0, greedy_cases[0].prompt_ids, SamplingParams(max_tokens=3, ignore_eos=True))
    assert engine.step() == [], "the prompt's step is under way"
    assert engine.step()[0].token_ids == tuple(greedy_cases[0].answer_ids[:1])
    assert engine.stats().steps == 2
    engine.step()
    (last,) = engine.step()
    assert last.finish_reason == "length" and not engine.has_work()
    assert engine.stats().steps == 3, "whose length is known in advance takes no step too many"


def test_the_prefix_cache_saves_what_prompts_have_in_common(tiny_model: Path, greedy_cases: Any) -> None:
    case = next(each for each in greedy_cases if len(each.prompt_ids) == 400)
    engine = core(tiny_model, prefix_cache=True, async_scheduling=True)
    for request_id in range(3):
        engine.add(request_id, case.prompt_ids, GREEDY)
        assert answers(engine) == {request_id: case.answer_ids}
    assert engine.stats().cached_tokens == 2 * 384, "all full blocks but for the last prompt token"
    assert engine.stats().kv_blocks_used == 0


def test_stats_tell_what_happens(tiny_model: Path) -> None:
    engine = core(tiny_model, max_batch=1)
    engine.add(0, [5] * 20, SamplingParams(max_tokens=2, ignore_eos=True))
    engine.add(1, [5] * 3, SamplingParams(max_tokens=2, ignore_eos=True))
    assert (engine.stats().waiting, engine.stats().running) == (2, 0)
    engine.step()
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.kv_blocks_used, stats.steps) == (1, 1, 2, 1)
    assert (stats.prompt_tokens, stats.generated_tokens) == (20, 1)
    assert stats.busy_s > 0 and stats.kv_use == 2 / stats.kv_blocks_total
