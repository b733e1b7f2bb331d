"""Other programs on the same requests: ``transformers`` in static batches and in continuous ones, and vLLM.

Each is a context that loads and warms up on entry and stops on exit; call ``free`` afterwards. All generate greedily
and ignore the end of sequence.
"""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from labkit.bench.workloads import Request
from labkit.errors import UserError

STATIC_BATCH = 32
SILENT_S = 900.0
"""How long ``transformers`` may bring no answer before it is taken to have failed."""


@dataclass(frozen=True)
class Target:
    """The model that a peer is to serve, and where."""

    directory: Path
    device: torch.device
    dtype: torch.dtype
    random_weights: bool
    max_context: int


Answer = Callable[[Sequence[Request]], tuple[float, list[list[int]]]]
"""Requests -> seconds, and the tokens generated to each."""


@dataclass(frozen=True)
class Peer:
    """``slow`` ones get fewer requests and one repeat."""

    name: str
    package: str
    slow: bool
    serving: Callable[[Target], AbstractContextManager[Answer]]

    @property
    def installed(self) -> bool:
        return find_spec(self.package) is not None


@contextmanager
def transformers_static(target: Target) -> Iterator[Answer]:
    """``generate`` over batches of 32 in the order of the requests, padded to the longest, fused attention."""
    with _transformers_model(target) as model:

        def answer(requests: Sequence[Request]) -> tuple[float, list[list[int]]]:
            began = time.perf_counter()
            found: list[list[int]] = []
            for first in range(0, len(requests), STATIC_BATCH):
                found += _generate(model, requests[first : first + STATIC_BATCH], target.device)
            return time.perf_counter() - began, found

        answer([Request([0] * 16, 2)])
        yield answer


@contextmanager
def transformers_continuous(target: Target) -> Iterator[Answer]:
    """The continuous batching of ``transformers`` with its own defaults, prefix sharing aside."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    generation = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=-1, max_new_tokens=1024)
    batching = ContinuousBatchingConfig(allow_block_sharing=False)
    with (
        _transformers_model(target) as model,
        model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=batching, warmup=True
        ) as manager,
    ):

        def answer(requests: Sequence[Request]) -> tuple[float, list[list[int]]]:
            began = time.perf_counter()
            names = [
                manager.add_request(input_ids=each.prompt_ids, max_new_tokens=each.new_tokens) for each in requests
            ]
            found: dict[str, list[int]] = {}
            last = began
            while len(found) < len(names):
                if (result := manager.get_result(timeout=1.0)) is not None and result.is_finished():
                    if result.error:
                        raise UserError(f"transformers failed: {result.error}")
                    found[result.request_id] = list(result.generated_tokens)
                    last = time.perf_counter()
                elif not manager.is_running() or time.perf_counter() - last > SILENT_S:
                    raise UserError("transformers' continuous batching ended before all was answered")
            return last - began, [found[name] for name in names]

        answer([Request([0] * 16, 2)])
        yield answer


@contextmanager
def vllm(target: Target) -> Iterator[Answer]:
    """``LLM.generate`` with vLLM's own defaults, prefix cache aside."""
    package: Any = importlib.import_module("vllm")
    llm = package.LLM(
        model=str(target.directory),
        dtype=str(target.dtype).removeprefix("torch."),
        load_format="dummy" if target.random_weights else "auto",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=target.max_context,
    )

    def answer(requests: Sequence[Request]) -> tuple[float, list[list[int]]]:
        prompts = [{"prompt_token_ids": each.prompt_ids} for each in requests]
        sampling = [
            package.SamplingParams(temperature=0.0, max_tokens=each.new_tokens, ignore_eos=True, detokenize=False)
            for each in requests
        ]
        began = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - began, [list(each.outputs[0].token_ids) for each in outputs]

    answer([Request([0] * 16, 2)])
    yield answer


PEERS = (
    Peer("transformers-static", "transformers", True, transformers_static),
    Peer("transformers-continuous", "transformers", True, transformers_continuous),
    Peer("vllm", "vllm", False, vllm),
)


def choose(names: str) -> list[Peer]:
    """``all`` (those installed), ``none``, or names separated by commas. Raises UserError for one that is unknown or
    not installed."""
    if names in ("all", "none", ""):
        return [peer for peer in PEERS if peer.installed] if names == "all" else []
    by_name = {peer.name: peer for peer in PEERS}
    chosen = []
    for name in (name.strip() for name in names.split(",")):
        if name not in by_name:
            raise UserError(f"no peer {name!r}; there are {', '.join(by_name)}, all and none")
        if not by_name[name].installed:
            raise UserError(f"{name} needs the package {by_name[name].package}, which is not installed")
        chosen.append(by_name[name])
    return chosen


def free() -> None:
    """Gives memory that nothing refers to any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _transformers_model(target: Target) -> Iterator[Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    if target.random_weights:
        config = AutoConfig.from_pretrained(target.directory)
        with target.device:
            model: Any = AutoModelForCausalLM.from_config(config, dtype=target.dtype, attn_implementation="sdpa")
    else:
        model = AutoModelForCausalLM.from_pretrained(
            target.directory, dtype=target.dtype, attn_implementation="sdpa", use_safetensors=True
        )
    # Else the checkpoint's own temperature and end of sequence would apply.
    model.generation_config = GenerationConfig(pad_token_id=0)
    model = model.to(target.device).requires_grad_(False).eval()
    yield model


@torch.inference_mode()
def _generate(model: Any, batch: Sequence[Request], device: torch.device) -> list[list[int]]:
    longest = max(len(each.prompt_ids) for each in batch)
    padding = [longest - len(each.prompt_ids) for each in batch]
    ids = [[0] * pad + each.prompt_ids for pad, each in zip(padding, batch, strict=True)]
    mask = [[0] * pad + [1] * len(each.prompt_ids) for pad, each in zip(padding, batch, strict=True)]
    generated = model.generate(
        input_ids=torch.tensor(ids, device=device),
        attention_mask=torch.tensor(mask, device=device),
        max_new_tokens=max(each.new_tokens for each in batch),
        do_sample=False,
        eos_token_id=None,
    )[:, longest:].tolist()
    return [answer[: each.new_tokens] for answer, each in zip(generated, batch, strict=True)]
