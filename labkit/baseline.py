"""The deployment as first deployed: ``transformers`` ``generate`` over static batches padded to the longest.

An honest baseline: one batch at a time, but the same prompts, stopping rule and answers as this project's engine.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from labkit.core import OUT_OF_MEMORY, check_prompt, is_out_of_memory
from labkit.deployment import Deployment
from labkit.models.loading import load_model_for_generate, open_checkpoint
from labkit.request import EngineStats, FinishReason, SamplingParams, TokenLogprob, TokenOutput
from labkit.runner.runner import DTYPES, torch_device
from labkit.runner.sampling import token_logprobs


@dataclass(eq=False)
class _Request:
    request_id: int
    prompt_ids: list[int]
    sampling: SamplingParams
    most: int
    """Tokens to generate at most; the context may allow fewer than ``max_tokens``."""


class TransformersCore:
    """Batches of what waits, through ``AutoModelForCausalLM.generate``. One step is one whole batch."""

    def __init__(self, deployment: Deployment) -> None:
        """Loads the model. Raises UserError for a model or a device that cannot be used."""
        checkpoint = open_checkpoint(deployment.model)
        self.deployment = deployment
        self.device = torch_device(deployment.device)
        dtype = DTYPES[deployment.dtype]
        self.model = load_model_for_generate(
            checkpoint, self.device, dtype, deployment.attention, deployment.random_weights
        )
        self.eos_token_ids = checkpoint.eos_token_ids
        self.vocab_size = checkpoint.shape.vocab_size
        self.max_context = min(checkpoint.shape.max_positions, deployment.max_context or checkpoint.shape.max_positions)
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._busy_s = 0.0

    def check(self, prompt_ids: list[int]) -> None:
        check_prompt(prompt_ids, self.max_context, self.vocab_size)

    def add(self, request_id: int, prompt_ids: list[int], sampling: SamplingParams) -> None:
        """See EngineCore."""
        self.check(prompt_ids)
        most = min(sampling.max_tokens, self.max_context - len(prompt_ids))
        self._waiting.append(_Request(request_id, list(prompt_ids), sampling, most))

    def cancel(self, request_id: int) -> None:
        """Takes a request out of the queue. A running one goes on: ``generate`` cannot be stopped."""
        self._waiting = deque(each for each in self._waiting if each.request_id != request_id)

    def has_work(self) -> bool:
        return bool(self._waiting)

    def wait_s(self) -> float:
        return 0.0

    def step(self) -> list[TokenOutput]:
        """Runs one batch to its end and returns all its answers."""
        self._running = batch = self._next_batch()
        if not batch:
            return []
        began = time.perf_counter()
        try:
            outputs = self._generate(batch)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            outputs = [TokenOutput(each.request_id, (), finish_reason="error", error=OUT_OF_MEMORY) for each in batch]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._steps += 1
        self._prompt_tokens += sum(len(each.prompt_ids) for each in batch)
        self._generated_tokens += sum(len(each.token_ids) for each in outputs)
        self._busy_s += time.perf_counter() - began
        self._running = []
        return outputs

    def stats(self) -> EngineStats:
        return EngineStats(
            waiting=len(self._waiting),
            running=len(self._running),
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            busy_s=self._busy_s,
        )

    def warm_up(self) -> None:
        self._generate([_Request(-1, [0], SamplingParams(max_tokens=2), 2)])

    def _next_batch(self) -> list[_Request]:
        """The head of the queue and those behind it that can share its ``generate`` call, up to ``max_batch``."""
        batch: list[_Request] = []
        others: deque[_Request] = deque()
        for each in self._waiting:
            if len(batch) < self.deployment.max_batch and (not batch or _share_a_call(batch[0], each)):
                batch.append(each)
            else:
                others.append(each)
        self._waiting = others
        return batch

    @torch.inference_mode()
    def _generate(self, batch: list[_Request]) -> list[TokenOutput]:
        sampling = batch[0].sampling
        longest = max(len(each.prompt_ids) for each in batch)
        padding = [longest - len(each.prompt_ids) for each in batch]
        ids = [[0] * pad + each.prompt_ids for pad, each in zip(padding, batch, strict=True)]
        mask = [[0] * pad + [1] * len(each.prompt_ids) for pad, each in zip(padding, batch, strict=True)]
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        generated = self.model.generate(
            input_ids=torch.tensor(ids, device=self.device),
            attention_mask=torch.tensor(mask, device=self.device),
            max_new_tokens=max(each.most for each in batch),
            return_dict_in_generate=True,
            output_logits=sampling.logprobs is not None,
            **self._options(sampling),
        )
        answers = generated.sequences[:, longest:].tolist()
        logits = torch.stack(generated.logits, 1).float() if sampling.logprobs is not None else None
        return [
            self._output(each, answer, logits, row)
            for row, (each, answer) in enumerate(zip(batch, answers, strict=True))
        ]

    def _options(self, sampling: SamplingParams) -> dict[str, Any]:
        eos = None if sampling.ignore_eos else sorted(self.eos_token_ids) or None
        if sampling.temperature == 0:
            return {"do_sample": False, "eos_token_id": eos}
        return {
            "do_sample": True,
            "eos_token_id": eos,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p or None,
        }

    def _output(self, request: _Request, answer: list[int], logits: Tensor | None, row: int) -> TokenOutput:
        """The row's own part of what the batch generated: up to its end of sequence or its own limit."""
        answer = answer[: request.most]
        reason: FinishReason = "length"
        if not request.sampling.ignore_eos:
            end = next((at for at, token in enumerate(answer) if token in self.eos_token_ids), None)
            if end is not None:
                answer, reason = answer[: end + 1], "stop"
        return TokenOutput(request.request_id, tuple(answer), _logprobs(request, answer, logits, row), reason)


def _logprobs(request: _Request, answer: list[int], logits: Tensor | None, row: int) -> tuple[TokenLogprob, ...]:
    if logits is None:
        return ()
    tokens = torch.tensor(answer, device=logits.device)
    found = token_logprobs(logits[row, : len(answer)], tokens, [request.sampling] * len(answer))
    return tuple(each for each in found if each is not None)


def _share_a_call(first: _Request, other: _Request) -> bool:
    """Whether one ``generate`` call can serve both: it takes one set of options, and one seed for all its rows."""
    if first.sampling.seed is not None and first.sampling.temperature > 0:
        return False
    alike = replace(other.sampling, max_tokens=first.sampling.max_tokens, stop=first.sampling.stop)
    return alike == first.sampling
