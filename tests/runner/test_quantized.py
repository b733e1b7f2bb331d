"""The engine with rounded weights and with GPTQ checkpoints, against transformers with the weights multiplied out."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from labkit.core import LabkitCore
from labkit.deployment import Deployment
from labkit.errors import UserError
from labkit.request import SamplingParams
from labkit.serving.knobs import deployment_from

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GREEDY = SamplingParams(max_tokens=64, ignore_eos=True)
CROWDED: dict[str, Any] = {"token_budget": 33, "kv_blocks": 60, "async_scheduling": True}


def answers(model: Path, prompts: list[list[int]], **knobs: Any) -> list[list[int]]:
    """64 greedy tokens each, asked all at once."""
    core = LabkitCore(Deployment(model=str(model), device=DEVICE, **knobs))  # type: ignore[arg-type]
    core.warm_up()
    found: list[list[int]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        core.add(i, prompt, GREEDY)
    while core.has_work():
        for output in core.step():
            found[output.request_id] += output.token_ids
    return found


@pytest.fixture(scope="module")
def prompts(greedy_cases: Any) -> list[list[int]]:
    return [case.prompt_ids for case in greedy_cases[:12]]


def expected(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        fixed = {"max_new_tokens": 64, "min_new_tokens": 64, "eos_token_id": -1, "do_sample": False}
        found.append(model.generate(ids, attention_mask=torch.ones_like(ids), **fixed)[0, len(prompt) :].tolist())
    return found


@pytest.fixture(scope="module")
def gptq() -> ModuleType:
    path = Path(__file__).parents[1] / "models" / "gptq.py"
    spec = importlib.util.spec_from_file_location("labkit_tests_gptq", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def written(tiny_model: Path, gptq: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """tiny_model in GPTQ format, and the same multiplied out."""
    found: tuple[Path, Path] = gptq.quantized_copies(tiny_model, tmp_path_factory.mktemp("written"))
    return found


def test_a_gptq_checkpoint_answers_as_its_weights_multiplied_out(
    written: tuple[Path, Path], prompts: list[list[int]], greedy_cases: Any
) -> None:
    """In chunks, with preemption, and launched ahead."""
    found = answers(written[0], prompts, **CROWDED)
    assert found == expected(written[1], prompts)
    assert found != [case.answer_ids for case in greedy_cases[:12]]


def test_a_group_that_two_processes_would_share_is_refused(written: tuple[Path, Path]) -> None:
    """160 inputs are five groups."""
    with pytest.raises(UserError, match=r"down_proj.weight cannot be split over this many processes"):
        answers(written[0], [[5]], tensor_parallel=2)


def test_a_gptq_checkpoint_split_over_two_processes(
    tiny_model: Path, gptq: ModuleType, prompts: list[list[int]], tmp_path: Path
) -> None:
    quantized, plain = gptq.quantized_copies(tiny_model, tmp_path, group_size=-1)
    assert answers(quantized, prompts[:4], tensor_parallel=2) == expected(plain, prompts[:4])


def test_weights_that_are_rounded_answer_as_those_rounded_by_hand(
    tiny_model: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    """64 inputs are one group, 160 are five."""
    plain = Path(shutil.copytree(tiny_model, tmp_path / "plain"))
    tensors = load_file(plain / "model.safetensors")
    for name, weight in tensors.items():
        if "_proj.weight" in name:
            grouped = weight.reshape(len(weight), -1, {64: 64, 160: 32}[weight.shape[1]])
            scales = (np.abs(grouped).max(axis=2, keepdims=True) * np.float32(2 / 15)).astype(np.float16)
            steps = np.clip(np.rint(grouped / scales.astype(np.float32)), -8, 7)
            tensors[name] = (steps * scales.astype(np.float32)).reshape(weight.shape)
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    assert answers(tiny_model, prompts, quantization="int4") == expected(plain, prompts)


def test_a_head_of_8_bits_mostly_answers_alike(greedy_cases: Any, tiny_model: Path, prompts: list[list[int]]) -> None:
    found = answers(tiny_model, prompts, int8_head=True)
    exact = [case.answer_ids for case in greedy_cases[:12]]
    assert sum(ours[:8] == theirs[:8] for ours, theirs in zip(found, exact, strict=True)) >= 9


def test_random_weights_are_rounded_too(tiny_model: Path, prompts: list[list[int]]) -> None:
    rounded = answers(tiny_model, prompts[:2], random_weights=True, quantization="int4", int8_head=True)
    assert [len(answer) for answer in rounded] == [64, 64]


def test_the_knobs_are_set_like_all_others_and_belong_to_this_engine(written: tuple[Path, Path]) -> None:
    deployment = deployment_from(None, knobs=["quantization=int4", "int8_head=true"])
    assert (deployment.quantization, deployment.int8_head) == ("int4", True)
    assert Deployment.from_json(deployment.to_json()) == deployment
    with pytest.raises(ValueError, match="quantization must be one of none, int4"):
        Deployment(quantization="int3")  # type: ignore[arg-type]
    for knobs in ({"quantization": "int4"}, {"int8_head": True}):
        with pytest.raises(ValueError, match="belong to the labkit engine"):
            Deployment.as_first_deployed(**knobs)
    with pytest.raises(UserError, match="is quantised already"):
        answers(written[0], [[5]], quantization="int4")
