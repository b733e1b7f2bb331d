"""From a request to what the engine takes: chat template, tokens, limits, sampling parameters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from jinja2 import TemplateError

from labkit.request import SamplingParams
from labkit.serving.errors import ApiError, invalid
from labkit.serving.options import StreamingEngine
from labkit.serving.protocol import CHAT_MAX_TOKENS, COMPLETION_MAX_TOKENS, MAX_CHOICES, ChatRequest, CompletionRequest

INLINE_CHARACTERS = 4000
"""Prompts up to this long are tokenised on the event loop (below a millisecond); longer ones in a thread."""

LEAST_TEMPERATURE = 1e-5

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One prompt to be continued once. A request is one or more of them; ``index`` is its number among the choices."""

    index: int
    prompt_ids: list[int]
    sampling: SamplingParams


@dataclass(frozen=True)
class Work:
    """A checked request. ``prompt_tokens`` counts each prompt once; ``opened_think``: it ends inside a ``<think>``."""

    jobs: list[Job]
    prompt_tokens: int
    opened_think: bool = False


async def chat_work(
    request: ChatRequest, engine: StreamingEngine, pool: ThreadPoolExecutor, temperature: float
) -> Work:
    """Raises ApiError 400 for a prompt that the model's template or context does not take."""
    # The model knows one role for instructions; "developer" is the newer name for it.
    messages = [
        {"role": "system" if message.role == "developer" else message.role, "content": message.text()}
        for message in request.messages
    ]
    tokenizer = engine.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise ApiError(400, "this model has no chat template; use /v1/completions", code="no_chat_template")

    def prepare() -> tuple[list[int], bool]:
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise invalid("messages", f"the model's chat template refuses them: {error}") from error
        return token_ids(tokenizer, text), text.rstrip().endswith("<think>")

    characters = sum(len(message["content"]) + 50 for message in messages)
    ids, opened_think = await _apart(prepare, characters, pool)
    asked = request.max_tokens if request.max_tokens is not None else request.max_completion_tokens
    _check_length(ids, engine, "messages")
    top = (request.top_logprobs or 0) if request.logprobs else None
    sampling = _sampling(request, temperature, _max_tokens(ids, asked, CHAT_MAX_TOKENS, engine), top)
    return Work(_jobs([(ids, sampling)], request.n or 1), len(ids), opened_think)


async def completion_work(
    request: CompletionRequest, engine: StreamingEngine, pool: ThreadPoolExecutor, temperature: float
) -> Work:
    """Raises ApiError 400 for a prompt that is empty, too long or holds unknown token ids."""
    prompts = _prompts(request.prompt)
    if len(prompts) * (request.n or 1) > MAX_CHOICES:
        raise invalid(
            "n", f"{len(prompts)} prompts times {request.n} are more than the {MAX_CHOICES} choices a request may have"
        )
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]

    def prepare() -> list[list[int]]:
        return [token_ids(engine.tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

    encoded = await _apart(prepare, sum(map(len, texts)), pool)
    vocabulary = len(engine.tokenizer)
    pairs = []
    for position, ids in enumerate(encoded):
        field = "prompt" if len(encoded) == 1 else f"prompt.{position}"
        if not ids:
            raise invalid(field, "should not be empty")
        # An id beyond the embedding table would take the engine down, not the request.
        if max(ids) >= vocabulary:
            raise invalid(field, f"token ids should be below {vocabulary}; got {max(ids)}")
        _check_length(ids, engine, field)
        limit = _max_tokens(ids, request.max_tokens, COMPLETION_MAX_TOKENS, engine)
        pairs.append((ids, _sampling(request, temperature, limit, request.logprobs)))
    return Work(_jobs(pairs, request.n or 1), sum(map(len, encoded)))


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of ``text`` as it stands, no special tokens added. Safe to call from several threads at once."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.truncation is None and backend.padding is None:
        # Without the detour through transformers, which sets truncation on the shared tokenizer at every call.
        return backend.encode(text, add_special_tokens=False).ids
    return tokenizer(text, add_special_tokens=False)["input_ids"]


async def _apart(work: Callable[[], T], characters: int, pool: ThreadPoolExecutor) -> T:
    if characters <= INLINE_CHARACTERS:
        return work()
    return await asyncio.get_running_loop().run_in_executor(pool, work)


def _prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _check_length(ids: list[int], engine: StreamingEngine, field: str) -> None:
    context = engine.core.max_context
    if len(ids) >= context:
        raise ApiError(
            400,
            f"{field}: the prompt has {len(ids)} tokens; the context of {context} tokens takes at most {context - 1} "
            "and one to answer",
            param=field,
            code="context_length_exceeded",
        )


def _max_tokens(ids: list[int], asked: int | None, default: int, engine: StreamingEngine) -> int:
    room = engine.core.max_context - len(ids)
    if asked is None:
        return min(room, default)
    if asked > room:
        shown = str(asked) if asked < 10**30 else "a number of more than 30 digits"
        raise ApiError(
            400,
            f"max_tokens: should be at most {room}: the context has {engine.core.max_context} tokens and the prompt "
            f"takes {len(ids)}; got {shown}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return asked


def _sampling(
    request: ChatRequest | CompletionRequest, temperature: float, max_tokens: int, logprobs: int | None
) -> SamplingParams:
    asked = request.temperature if request.temperature is not None else temperature
    return SamplingParams(
        max_tokens=max_tokens,
        # Below this the likeliest token is certain, and logits divided by it leave the range of float32.
        temperature=asked if asked >= LEAST_TEMPERATURE else 0.0,
        top_k=request.top_k or 0,
        top_p=request.top_p if request.top_p is not None else 1.0,
        min_p=request.min_p or 0.0,
        seed=request.seed,
        stop=request.stop_strings(),
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
    )


def _jobs(prompts: list[tuple[list[int], SamplingParams]], n: int) -> list[Job]:
    """``n`` jobs for each prompt. With a seed the answers to one prompt still differ: each has the next seed."""
    jobs: list[Job] = []
    for ids, sampling in prompts:
        for copy in range(n):
            seed = None if sampling.seed is None else (sampling.seed + copy) % 2**63
            jobs.append(Job(len(jobs), ids, replace(sampling, seed=seed)))
    return jobs
