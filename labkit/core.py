"""The engine core: queues, policy and runner, one step at a time. It knows tokens only, neither text nor threads."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Protocol

import torch

from labkit.batcher.policies import schedule, wait_s
from labkit.batcher.queues import Queues
from labkit.deployment import Deployment
from labkit.models.loading import open_checkpoint
from labkit.request import EngineStats, FinishReason, SamplingParams, TokenOutput
from labkit.runner.blocks import BlockManager
from labkit.runner.runner import Runner, Sampled
from labkit.runner.sequence import Sequence, Work


class EngineCore(Protocol):
    """What serves requests, be it this engine or the baseline. One thread calls it; nothing in it locks."""

    max_context: int
    """Most tokens of prompt and answer together."""
    eos_token_ids: frozenset[int]

    def check(self, prompt_ids: list[int]) -> None:
        """Raises ValueError for a prompt that is empty, too long or no token ids. Any thread may call this one."""

    def add(self, request_id: int, prompt_ids: list[int], sampling: SamplingParams) -> None:
        """Puts a request in the queue. Raises ValueError as ``check`` does."""

    def cancel(self, request_id: int) -> None:
        """Ends a request, freeing what it holds; nothing more is said of it. Unknown ids are ignored."""

    def has_work(self) -> bool:
        """Whether any request is unfinished."""

    def wait_s(self) -> float:
        """Seconds for which ``step`` has nothing to do although there is work (a batch window is open); mostly 0."""

    def step(self) -> list[TokenOutput]:
        """Does one step of work and returns what it gave each request."""

    def stats(self) -> EngineStats: ...

    def warm_up(self) -> None:
        """Pays for what only happens once. Called before the first request."""


class LabkitCore:
    """The project's engine on one device."""

    def __init__(self, deployment: Deployment, clock: Callable[[], float] = time.monotonic) -> None:
        """Loads the model. Raises UserError for a model or a device that cannot be used."""
        checkpoint = open_checkpoint(deployment.model)
        self.deployment = deployment
        self.eos_token_ids = checkpoint.eos_token_ids
        self.runner = Runner(checkpoint, deployment)
        self.max_context = self.runner.max_context
        self.vocab_size = checkpoint.shape.vocab_size
        self._queues = Queues(BlockManager(self.runner.blocks), deployment.kv_block_size, deployment.max_batch)
        self._sequences: dict[int, Sequence] = {}
        self._refused: list[TokenOutput] = []
        self._clock = clock
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._busy_s = 0.0

    def check(self, prompt_ids: list[int]) -> None:
        check_prompt(prompt_ids, self.max_context, self.vocab_size)

    def add(self, request_id: int, prompt_ids: list[int], sampling: SamplingParams) -> None:
        """See EngineCore. What is valid but could never be held in the KV cache ends with finish reason 'error'."""
        self.check(prompt_ids)
        if request_id in self._sequences:
            raise ValueError(f"request {request_id} exists already")
        limit = min(len(prompt_ids) + sampling.max_tokens, self.max_context)
        if not self._queues.fits(limit):
            capacity = self._queues.blocks.total * self._queues.block_size
            reason = f"prompt and answer may take {limit} tokens, the KV cache holds {capacity}; raise kv_blocks"
            self._refused.append(TokenOutput(request_id, (), finish_reason="error", error=reason))
            return
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        sequence = Sequence(request_id, list(prompt_ids), len(prompt_ids), limit, sampling, seed, self._clock())
        self._sequences[request_id] = sequence
        self._queues.waiting.append(sequence)

    def cancel(self, request_id: int) -> None:
        if request_id in self._sequences:
            self._queues.leave(self._sequences.pop(request_id))

    def has_work(self) -> bool:
        return bool(self._sequences or self._refused)

    def wait_s(self) -> float:
        return 0.0 if self._refused else wait_s(self._queues, self.deployment, self._clock())

    def step(self) -> list[TokenOutput]:
        """One step: what the policy picks is run, and what came out is booked."""
        outputs, self._refused = self._refused, []
        work = schedule(self._queues, self.deployment, self._clock())
        if not work:
            return outputs
        began = time.perf_counter()
        try:
            outputs += self._book(work, self.runner.run(work))
        except (MemoryError, RuntimeError) as error:
            outputs += self._give_up(work, error)
        self._steps += 1
        self._busy_s += time.perf_counter() - began
        return outputs

    def stats(self) -> EngineStats:
        queues = self._queues
        return EngineStats(
            waiting=len(queues.waiting),
            running=len(queues.running),
            kv_blocks_used=queues.blocks.used,
            kv_blocks_total=queues.blocks.total,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=queues.preemptions,
            busy_s=self._busy_s,
        )

    def warm_up(self) -> None:
        self.runner.warm_up()

    def _book(self, work: list[Work], sampled: list[Sampled]) -> list[TokenOutput]:
        for sequence, tokens in work:
            sequence.computed += tokens
        outputs = []
        for sequence, token, logprob in sampled:
            if len(sequence.tokens) == sequence.prompt_len:
                self._prompt_tokens += sequence.prompt_len
            sequence.tokens.append(token)
            self._generated_tokens += 1
            reason = self._finish_reason(sequence)
            if reason:
                self.cancel(sequence.request_id)
            logprobs = (logprob,) if logprob else ()
            outputs.append(TokenOutput(sequence.request_id, (token,), logprobs, reason))
        return outputs

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        if sequence.tokens[-1] in self.eos_token_ids and not sequence.sampling.ignore_eos:
            return "stop"
        return "length" if len(sequence.tokens) >= sequence.limit else None

    def _give_up(self, work: list[Work], error: Exception) -> list[TokenOutput]:
        """Ends the requests that took too much memory: those with prompts in the step, or else all of it.

        The others lose nothing: their step was not booked and is run again. Other errors are raised on.
        """
        if not is_out_of_memory(error):
            raise error
        if self.runner.device.type == "cuda":
            torch.cuda.empty_cache()
        concerned = [share for share in work if share.tokens > 1] or work
        outputs = []
        for sequence, _ in concerned:
            self.cancel(sequence.request_id)
            outputs.append(TokenOutput(sequence.request_id, (), finish_reason="error", error=OUT_OF_MEMORY))
        return outputs


CPU_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory")
OUT_OF_MEMORY = "out of memory; lower token_budget, max_batch or kv_blocks"


def is_out_of_memory(error: Exception) -> bool:
    """Whether numpy, torch or CUDA raised ``error`` for want of memory; for the CPU torch has a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in CPU_OUT_OF_MEMORY)


def check_prompt(prompt_ids: list[int], max_context: int, vocab_size: int) -> None:
    """Raises ValueError for a prompt that is empty, leaves no room for an answer, or holds what is no token."""
    if not prompt_ids:
        raise ValueError("the prompt is empty; give at least one token")
    if len(prompt_ids) >= max_context:
        raise ValueError(f"the prompt has {len(prompt_ids)} tokens; prompt and answer together may have {max_context}")
    if min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
        raise ValueError(f"token ids must be between 0 and {vocab_size - 1}")
