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
from labkit.runner.runner import Launched, build_runner
from labkit.runner.sequence import PLACEHOLDER, Sequence, Work


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
    """The project's engine, on one device or on several that share each layer."""

    def __init__(self, deployment: Deployment, clock: Callable[[], float] = time.monotonic) -> None:
        """Loads the model. Raises UserError for a model or a device that cannot be used."""
        checkpoint = open_checkpoint(deployment.model)
        self.deployment = deployment
        self.eos_token_ids = checkpoint.eos_token_ids
        self.runner = build_runner(checkpoint, deployment)
        self.max_context = self.runner.max_context
        self.vocab_size = checkpoint.shape.vocab_size
        self._queues = Queues(
            BlockManager(self.runner.blocks), deployment.kv_block_size, deployment.max_batch, deployment.prefix_cache
        )
        self._sequences: dict[int, Sequence] = {}
        self._refused: list[TokenOutput] = []
        self._clock = clock
        self._in_flight: Launched | None = None
        asynchronous = deployment.async_scheduling
        self._asynchronous = self.runner.device.type == "cuda" if asynchronous is None else asynchronous
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
            sequence = self._sequences.pop(request_id)
            # A step in flight may yet write to its blocks; whoever gets them next writes later, for steps run in order.
            sequence.ended = True
            self._queues.leave(sequence)

    def has_work(self) -> bool:
        return bool(self._sequences or self._refused or self._in_flight)

    def wait_s(self) -> float:
        return 0.0 if self._refused or self._in_flight else wait_s(self._queues, self.deployment, self._clock())

    def step(self) -> list[TokenOutput]:
        """One step: what the policy picks is launched, and what came out of the step before is booked.

        Without asynchronous scheduling a step is booked in the call that launches it.
        """
        began = time.perf_counter()
        outputs, self._refused = self._refused, []
        before, self._in_flight = self._in_flight, None
        work = schedule(self._queues, self.deployment, self._clock())
        if work:
            try:
                self._in_flight = self._launch(work)
            except (MemoryError, RuntimeError) as error:
                outputs += self._give_up(work, error)
            self._steps += 1
        if before is not None:
            outputs += self._book(before)
        if self._in_flight is not None and not self._asynchronous:
            outputs += self._book(self._in_flight)
            self._in_flight = None
        if work or before is not None:
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
            cached_tokens=queues.cached_tokens,
            busy_s=self._busy_s,
        )

    def warm_up(self) -> None:
        self.runner.warm_up()

    def _launch(self, work: list[Work]) -> Launched:
        """Launches a step and counts it as done, so that the next can be scheduled before its tokens are known."""
        launched = self.runner.launch(work)
        for sequence, tokens in work:
            sequence.computed += tokens
        for sequence in launched.sampled.values():
            if len(sequence.tokens) == sequence.prompt_len:
                self._prompt_tokens += sequence.prompt_len
            sequence.tokens.append(PLACEHOLDER)
        return launched

    def _book(self, launched: Launched) -> list[TokenOutput]:
        """Puts a step's tokens where their placeholders are, and ends who is to end."""
        outputs = []
        for sequence, token, logprob in launched.wait():
            if sequence.ended:
                continue
            place = sequence.known
            sequence.tokens[place] = token
            sequence.known += 1
            self._generated_tokens += 1
            reason = self._finish_reason(sequence, place)
            if reason:
                self.cancel(sequence.request_id)
            logprobs = (logprob,) if logprob else ()
            outputs.append(TokenOutput(sequence.request_id, (token,), logprobs, reason))
        return outputs

    def _finish_reason(self, sequence: Sequence, last: int) -> FinishReason | None:
        if sequence.tokens[last] in self.eos_token_ids and not sequence.sampling.ignore_eos:
            return "stop"
        return "length" if last + 1 >= sequence.limit else None

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
