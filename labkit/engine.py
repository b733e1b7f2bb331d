"""The engine as its callers see it: prompts in, text out, in process or as an asynchronous stream."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from labkit.core import EngineCore, LabkitCore
from labkit.deployment import Deployment
from labkit.detokenize import TextStream, token_decoder
from labkit.errors import UserError
from labkit.models.loading import load_tokenizer
from labkit.request import (
    Delta,
    EngineFailed,
    EngineStats,
    FinishReason,
    QueueFull,
    SamplingParams,
    TokenLogprob,
    TokenOutput,
)

__all__ = [
    "AsyncEngine",
    "Completion",
    "Delta",
    "Engine",
    "EngineCore",
    "EngineFailed",
    "LabkitCore",
    "QueueFull",
    "build_core",
]


@dataclass(frozen=True)
class Completion:
    """One whole answer. ``token_ids`` holds the end-of-sequence token if there was one, ``text`` does not."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    error: str | None = None


def build_core(deployment: Deployment) -> EngineCore:
    """Loads the model into the engine that the deployment names. Raises UserError if it cannot be."""
    if deployment.engine == "labkit":
        return LabkitCore(deployment)
    from labkit.baseline import TransformersCore

    return TransformersCore(deployment)


class Engine:
    """Answers in the caller's thread."""

    def __init__(self, deployment: Deployment, core: EngineCore | None = None) -> None:
        """Loads and warms up. Raises UserError for a model that cannot be used."""
        self.deployment = deployment
        self.tokenizer = load_tokenizer(deployment.model)
        self.core = core or build_core(deployment)
        self.core.warm_up()
        self._decoder = token_decoder(self.tokenizer)

    def generate(self, prompts: Sequence[str] | Sequence[list[int]], sampling: SamplingParams) -> list[Completion]:
        """Completions in the order of the prompts, which run together. Raises ValueError for one that cannot run."""
        ids = [self.tokenizer.encode(each) if isinstance(each, str) else list(each) for each in prompts]
        answers = [_Answer(self._decoder, sampling, self.core.eos_token_ids) for _ in ids]
        deltas: list[list[Delta]] = [[] for _ in ids]
        try:
            for request_id, prompt_ids in enumerate(ids):
                self.core.add(request_id, prompt_ids, sampling)
            while self.core.has_work():
                time.sleep(self.core.wait_s())
                for output in self.core.step():
                    delta = answers[output.request_id].take(output)
                    deltas[output.request_id].append(delta)
                    if delta.finish_reason and not output.finish_reason:
                        self.core.cancel(output.request_id)
        finally:
            for request_id in range(len(ids)):
                self.core.cancel(request_id)
        return [_completion(prompt_ids, parts) for prompt_ids, parts in zip(ids, deltas, strict=True)]


class _Answer:
    """Turns the core's outputs for one request into deltas."""

    def __init__(self, decoder: Any, sampling: SamplingParams, eos_token_ids: frozenset[int]) -> None:
        self._text = TextStream(decoder(), sampling.stop)
        self._eos = frozenset() if sampling.ignore_eos else eos_token_ids

    def take(self, output: TokenOutput) -> Delta:
        text = ""
        for count, token_id in enumerate(output.token_ids, 1):
            # The token that ends an answer is no part of its text, even where the tokenizer does not call it special.
            text += "" if token_id in self._eos else self._text.push(token_id)
            if self._text.stopped:
                return Delta(text, output.token_ids[:count], output.logprobs[:count], "stop")
        if output.finish_reason:
            text += self._text.flush()
        return Delta(text, output.token_ids, output.logprobs, output.finish_reason, output.error)


def _completion(prompt_ids: list[int], parts: list[Delta]) -> Completion:
    token_ids = tuple(itertools.chain.from_iterable(part.token_ids for part in parts))
    logprobs = tuple(itertools.chain.from_iterable(part.logprobs for part in parts))
    last = parts[-1]
    assert last.finish_reason is not None, "the core has no work left, so every request has ended"
    text = "".join(part.text for part in parts)
    return Completion(tuple(prompt_ids), token_ids, text, last.finish_reason, logprobs, last.error)


@dataclass(eq=False)
class _Stream:
    """Where one request's outputs go: a queue that belongs to its caller's event loop."""

    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue[TokenOutput | EngineFailed] = field(default_factory=asyncio.Queue)


class AsyncEngine:
    """The core in a thread of its own, so that nothing else holds up a step. Callers live in event loops.

    Commands go to the thread through one queue; each step's outputs come back to a loop in one call.
    """

    def __init__(self, deployment: Deployment, core: EngineCore | None = None) -> None:
        """Loads the tokenizer; the model is loaded by ``start``. Raises UserError for a model that is not there."""
        self.deployment = deployment
        self.tokenizer = load_tokenizer(deployment.model)
        self.core = core
        self.ready = False
        """Whether the model is loaded and warm."""
        self.failed: str | None = None
        """Why the engine can no longer serve."""
        self._decoder = token_decoder(self.tokenizer)
        self._commands: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._streams: dict[int, _Stream] = {}
        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._on_the_way = 0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread, which loads, warms up and serves; look at ``ready`` and ``failed``."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the thread after the step it is in; requests that are still running raise EngineFailed.

        A step of the baseline can outlast ``timeout_s``; the thread is then left behind and dies with the process.
        """
        self._commands.put(("stop",))
        if self._thread is not None:
            self._thread.join(timeout_s)
        self._fail("the engine was stopped")

    def check(self, prompt_ids: list[int]) -> None:
        """Raises what ``stream`` would raise at once, so that a caller knows before it begins its reply."""
        self._serving_core().check(prompt_ids)
        self._check_queue()

    async def stream(self, prompt_ids: list[int], sampling: SamplingParams) -> AsyncIterator[Delta]:
        """The answer as it comes. Closing the iterator early cancels the request and frees what it holds.

        Raises ValueError for a prompt that cannot run, QueueFull beyond ``max_queue``, EngineFailed if the engine dies.
        """
        core = self._serving_core()
        core.check(prompt_ids)
        answer = _Answer(self._decoder, sampling, core.eos_token_ids)
        request_id, stream = self._admit(list(prompt_ids), sampling)
        ended = False
        try:
            while not ended:
                output = await stream.outputs.get()
                if isinstance(output, EngineFailed):
                    ended = True
                    raise output
                ended = output.finish_reason is not None
                delta = answer.take(output)
                if delta.finish_reason and not ended:
                    self._cancel(request_id)
                    ended = True
                yield delta
        finally:
            if not ended:
                self._cancel(request_id)

    def stats(self) -> EngineStats:
        """The core's counters; requests on their way to it count as waiting."""
        if self.core is None:
            return EngineStats()
        stats = self.core.stats()
        return replace(stats, waiting=stats.waiting + self._on_the_way)

    def _serving_core(self) -> EngineCore:
        if self.failed is not None:
            raise EngineFailed(self.failed)
        if self.core is None or not self.ready:
            raise EngineFailed("the engine is still loading")
        return self.core

    def _admit(self, prompt_ids: list[int], sampling: SamplingParams) -> tuple[int, _Stream]:
        self._check_queue()
        request_id, stream = next(self._ids), _Stream(asyncio.get_running_loop())
        with self._lock:
            if self.failed is not None:
                raise EngineFailed(self.failed)
            self._streams[request_id] = stream
            self._on_the_way += 1
        self._commands.put(("add", request_id, prompt_ids, sampling))
        return request_id, stream

    def _check_queue(self) -> None:
        if self.deployment.max_queue is None:
            return
        stats = self.stats()
        if stats.waiting >= self.deployment.max_queue + self._open_places(stats):
            raise QueueFull(f"{stats.waiting} requests wait already; at most {self.deployment.max_queue} may")

    def _open_places(self, stats: EngineStats) -> int:
        """How many of those who wait will run at the next step, and so are not counted as waiting."""
        if self.deployment.batching != "continuous" and stats.running:
            return 0
        return max(0, self.deployment.max_batch - stats.running)

    def _cancel(self, request_id: int) -> None:
        with self._lock:
            self._streams.pop(request_id, None)
        self._commands.put(("cancel", request_id))

    def _run(self) -> None:
        """The thread: loads, then serves until told to stop or until something breaks."""
        try:
            if self.core is None:
                self.core = build_core(self.deployment)
            self.core.warm_up()
            self.ready = True
            while self._obey(self.core):
                self._deliver(self.core.step())
        except UserError as error:
            self._fail(str(error))
        except BaseException as error:  # whatever it is, nobody may be left waiting for it
            logging.getLogger(__name__).exception("the engine failed")
            self._fail(f"{type(error).__name__}: {error}")

    def _obey(self, core: EngineCore) -> bool:
        """Takes all commands that are there, waiting for one while there is no step to do. False means stop."""
        while True:
            wait_s = core.wait_s() if core.has_work() else None
            try:
                command = self._commands.get(block=wait_s != 0, timeout=wait_s or None)
            except queue.Empty:
                return True
            match command:
                case ("stop",):
                    return False
                case ("add", request_id, prompt_ids, sampling):
                    with self._lock:
                        self._on_the_way -= 1
                    core.add(request_id, prompt_ids, sampling)
                case ("cancel", request_id):
                    core.cancel(request_id)

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        """Hands a step's outputs to the callers' loops, one call a loop."""
        parcels: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, TokenOutput | EngineFailed]]] = defaultdict(list)
        with self._lock:
            for output in outputs:
                stream = self._streams.get(output.request_id)
                if stream is not None:
                    parcels[stream.loop].append((stream, output))
                    if output.finish_reason:
                        del self._streams[output.request_id]
        _send(parcels)

    def _fail(self, reason: str) -> None:
        with self._lock:
            self.ready = False
            self.failed = self.failed or reason
            streams, self._streams = list(self._streams.values()), {}
        parcels: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, TokenOutput | EngineFailed]]] = defaultdict(list)
        for stream in streams:
            parcels[stream.loop].append((stream, EngineFailed(self.failed)))
        _send(parcels)


def _send(parcels: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, TokenOutput | EngineFailed]]]) -> None:
    for loop, parcel in parcels.items():
        try:
            loop.call_soon_threadsafe(_put_all, parcel)
        except RuntimeError:  # the loop is closed, and with it everyone who waited there
            continue


def _put_all(parcel: list[tuple[_Stream, TokenOutput | EngineFailed]]) -> None:
    for stream, output in parcel:
        stream.outputs.put_nowait(output)
