"""An engine that computes nothing: its tokens come on a fixed schedule, so that what is measured is the wire."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from labkit.deployment import Deployment
from labkit.request import Delta, EngineStats, QueueFull, SamplingParams
from labkit.serving.light_tokenizer import light_tokenizer
from labkit.serving.schedule import Schedule

MAX_CONTEXT = 1 << 20
STEP_S = 0.002
"""Tokens that are due within so long come together, at its end, as an engine's come a step at a time."""


class ScheduleEngine:
    """Serves every request at once, on its schedule; a running request counts as one KV block."""

    def __init__(self, deployment: Deployment, schedule: Schedule) -> None:
        """Loads the tokenizer only. Raises UserError for a model that is not there."""
        self.deployment, self.schedule = deployment, schedule
        self.tokenizer = light_tokenizer(deployment.model)
        self.core: Any = SimpleNamespace(max_context=deployment.max_context or MAX_CONTEXT)
        self.ready = False
        self.failed: str | None = None
        self._running = self._prompt_tokens = self._generated_tokens = 0
        self._steps: dict[int, list[asyncio.Future[None]]] = {}

    def start(self) -> None:
        self.ready = True

    def stop(self) -> None:
        self.ready = False

    async def stream(self, prompt_ids: list[int], sampling: SamplingParams) -> AsyncIterator[Delta]:
        """The tokens, each when it is due or as soon after as it is asked for. Raises QueueFull beyond what runs at
        once and waits under the deployment's ``max_queue``; nothing waits here, so the two add up."""
        limit = self.deployment.max_queue
        if limit is not None and self._running >= self.deployment.max_batch + limit:
            raise QueueFull(f"{self._running} requests run already")
        schedule, count = self.schedule, min(sampling.max_tokens, self.schedule.tokens)
        self._running += 1
        self._prompt_tokens += len(prompt_ids)
        start = time.monotonic()
        try:
            for index in range(count):
                await self._step_after(start + schedule.due_s(index))
                self._generated_tokens += 1
                reason = None
                if index == count - 1:
                    reason = "length" if count == sampling.max_tokens else "stop"
                yield Delta(schedule.text(index, start), (index,), (), reason)  # type: ignore[arg-type]
        finally:
            self._running -= 1

    async def _step_after(self, due: float) -> None:
        if due <= time.monotonic():
            return
        step, loop = math.ceil(due / STEP_S), asyncio.get_running_loop()
        if step not in self._steps:
            self._steps[step] = []
            loop.call_at(loop.time() + step * STEP_S - time.monotonic(), self._end_step, step)
        waiter = loop.create_future()
        self._steps[step].append(waiter)
        await waiter

    def _end_step(self, step: int) -> None:
        for waiter in self._steps.pop(step):
            if not waiter.done():  # a request that was cancelled
                waiter.set_result(None)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=self._running,
            kv_blocks_used=self._running,
            kv_blocks_total=max(self._running, self.deployment.max_batch),
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
        )
