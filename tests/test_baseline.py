from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from labkit.baseline import TransformersCore
from labkit.core import LabkitCore
from labkit.deployment import Deployment
from labkit.request import SamplingParams, TokenOutput


@pytest.fixture(scope="module")
def baseline(tiny_model: Path) -> TransformersCore:
    return TransformersCore(Deployment.as_first_deployed(str(tiny_model), device="cpu", max_batch=6))


def finish(engine: Any) -> dict[int, TokenOutput]:
    outputs = {}
    while engine.has_work():
        for output in engine.step():
            assert output.request_id not in outputs, "an answer comes whole"
            outputs[output.request_id] = output
    return outputs


def test_the_deployment_as_first_deployed_is_what_it_says(baseline: TransformersCore) -> None:
    assert baseline.model.config._attn_implementation == "eager"
    assert baseline.model.dtype == torch.float32


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_answers_equal_those_of_the_labkit_engine(tiny_model: Path, greedy_cases: Any, attention: str) -> None:
    """Padded to the longest or not: the same tokens, the same stopping rule, limits of their own for each."""
    deployment = Deployment.as_first_deployed(str(tiny_model), device="cpu", max_batch=6, attention=attention)
    theirs, ours = TransformersCore(deployment), LabkitCore(Deployment(str(tiny_model), device="cpu"))
    theirs.eos_token_ids = ours.eos_token_ids = frozenset({2, 300, 301})
    for request_id, case in enumerate(greedy_cases[:18]):
        sampling = SamplingParams(max_tokens=10 + 3 * request_id)
        theirs.add(request_id, case.prompt_ids, sampling)
        ours.add(request_id, case.prompt_ids, sampling)
    found = finish(theirs)
    expected: dict[int, list[TokenOutput]] = {}
    while ours.has_work():
        for output in ours.step():
            expected.setdefault(output.request_id, []).append(output)
    for request_id, parts in expected.items():
        assert list(found[request_id].token_ids) == [token for part in parts for token in part.token_ids]
        assert found[request_id].finish_reason == parts[-1].finish_reason
    assert {output.finish_reason for output in found.values()} == {"stop", "length"}
    assert theirs.stats().steps == 3
    assert theirs.stats().generated_tokens == ours.stats().generated_tokens
    assert theirs.stats().prompt_tokens == ours.stats().prompt_tokens


def test_requests_with_other_sampling_wait_for_the_next_batch(baseline: TransformersCore) -> None:
    greedy, warm = SamplingParams(max_tokens=2), SamplingParams(max_tokens=2, temperature=0.7)
    for request_id, sampling in enumerate([greedy, warm, greedy, warm, SamplingParams(max_tokens=5, stop=("x",))]):
        baseline.add(request_id, [5, 6, request_id + 7], sampling)
    batches = []
    while baseline.has_work():
        batches.append(sorted(output.request_id for output in baseline.step()))
    assert batches == [[0, 2, 4], [1, 3]]


def test_seeded_requests_run_alone_and_again_alike(baseline: TransformersCore) -> None:
    seeded = SamplingParams(max_tokens=20, temperature=1.0, seed=5, ignore_eos=True)
    for request_id in range(2):
        baseline.add(request_id, [5, 6, 7], seeded)
    baseline.add(2, [5, 6, 7], SamplingParams(max_tokens=20, temperature=1.0, seed=6, ignore_eos=True))
    assert len(baseline.step()) == 1
    found = finish(baseline)
    baseline.add(0, [5, 6, 7], seeded)
    assert baseline.step()[0].token_ids == found[1].token_ids != found[2].token_ids


def test_sampling_filters_reach_generate(baseline: TransformersCore, greedy_cases: Any) -> None:
    case = greedy_cases[0]
    for request_id, filters in enumerate([{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {}]):
        baseline.add(
            request_id, case.prompt_ids, SamplingParams(max_tokens=30, temperature=2.0, ignore_eos=True, **filters)
        )
    found = finish(baseline)
    assert [list(found[i].token_ids) == case.answer_ids[:30] for i in range(4)] == [True, True, True, False]


def test_logprobs_equal_those_of_the_labkit_engine(tiny_model: Path, baseline: TransformersCore) -> None:
    ours = LabkitCore(Deployment(str(tiny_model), device="cpu"))
    sampling = SamplingParams(max_tokens=6, logprobs=3, ignore_eos=True)
    for engine in (baseline, ours):
        engine.add(0, [5, 6, 7, 8], sampling)
        engine.add(1, [9], sampling)
    found = finish(baseline)
    while ours.has_work():
        for output in ours.step():
            position = len(output.token_ids) - 1
            theirs = found[output.request_id].logprobs[0]
            found[output.request_id] = TokenOutput(output.request_id, (), found[output.request_id].logprobs[1:])
            assert theirs.token_id == output.token_ids[position]
            assert theirs.logprob == pytest.approx(output.logprobs[0].logprob, abs=1e-4)
            assert [token for token, _ in theirs.top] == [token for token, _ in output.logprobs[0].top]


def test_cancelled_while_waiting_it_is_never_run(baseline: TransformersCore) -> None:
    before = baseline.stats().generated_tokens
    baseline.add(0, [5], SamplingParams(max_tokens=3, ignore_eos=True))
    baseline.add(1, [5], SamplingParams(max_tokens=3, ignore_eos=True))
    assert baseline.stats().waiting == 2
    baseline.cancel(0)
    assert list(finish(baseline)) == [1]
    assert baseline.stats().generated_tokens == before + 3


def test_out_of_memory_reaches_each_request_and_the_next_batch_runs(
    baseline: TransformersCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(**_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(baseline.model, "generate", too_large)
        baseline.add(0, [5], SamplingParams(max_tokens=3))
        baseline.add(1, [6], SamplingParams(max_tokens=3))
        assert [(each.finish_reason, each.token_ids) for each in baseline.step()] == [("error", ())] * 2
    baseline.add(0, [5], SamplingParams(max_tokens=3, ignore_eos=True))
    assert len(baseline.step()[0].token_ids) == 3


def test_prompt_and_context_limits_are_those_of_the_labkit_engine(tiny_model: Path) -> None:
    engine = TransformersCore(Deployment.as_first_deployed(str(tiny_model), device="cpu", max_context=20))
    with pytest.raises(ValueError, match="20 tokens"):
        engine.add(0, [5] * 20, SamplingParams())
    with pytest.raises(ValueError, match="empty"):
        engine.add(0, [], SamplingParams())
    engine.add(0, [5] * 19, SamplingParams(max_tokens=50, ignore_eos=True))
    engine.add(1, [5] * 15, SamplingParams(max_tokens=50, ignore_eos=True))
    assert {name: len(output.token_ids) for name, output in finish(engine).items()} == {0: 1, 1: 5}
