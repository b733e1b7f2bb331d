"""The requests of the OpenAI API that this server takes, field by field.

What would change the answer and is not implemented is refused unless it has the value that changes nothing; what cannot
change the answer (``user``, ``metadata``, …) is accepted. ``null`` is the same as absent.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

MAX_CHOICES = 128
"""Most answers one request may ask for (prompts times ``n``)."""
MAX_STOP_CHARACTERS = 1000
COMPLETION_MAX_TOKENS = 16
CHAT_MAX_TOKENS = 1024


class Only:
    """Marks a field that clients send out of habit and that may only have a value that changes nothing."""

    def __init__(self, *allowed: Any, why: str) -> None:
        self.allowed, self.why = allowed, why

    def check(self, value: Any) -> Any:
        # bool is an int and 0 == 0.0: compare the kind as well, but take 0.0 for 0.
        for each in (None, *self.allowed):
            if value == each and isinstance(value, bool) == isinstance(each, bool):
                return value
        allowed = " or ".join([*(json.dumps(each) for each in self.allowed), "absent"])
        raise ValueError(f"should be {allowed}: {self.why}")

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [*self.allowed, None]}


def _not_empty(text: str) -> str:
    if not text:
        raise ValueError("should not be empty")
    return text


StopString = Annotated[str, AfterValidator(_not_empty), Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class _Strict(BaseModel):
    # A number in a string is a mistake that somebody wants to know about.
    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


class StreamOptions(_Strict):
    include_usage: bool | None = None
    """True: a last chunk with ``usage`` and no choices. False: none. Absent: ``usage`` in the chunk that finishes."""
    continuous_usage_stats: bool | None = None
    """True: ``usage`` so far in every chunk."""


class _Request(_Strict):
    """``temperature`` absent: 1, as OpenAI has it, or 0 where the model's own configuration says not to sample."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    seed: Seed | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    frequency_penalty: Annotated[Any, Only(0, why="penalties are not implemented")] = None
    presence_penalty: Annotated[Any, Only(0, why="penalties are not implemented")] = None
    repetition_penalty: Annotated[Any, Only(1, why="penalties are not implemented")] = None
    logit_bias: Annotated[Any, Only({}, why="biases are not implemented")] = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options may only be given when stream is true")
        return self

    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


def _text_only(kind: str) -> str:
    if kind != "text":
        raise ValueError("should be 'text': the model reads text only")
    return kind


def _part(value: Any) -> Any:
    """Names the kind of a part before its other fields are found unknown."""
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        _text_only(value["type"])
    return value


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart, BeforeValidator(_part)]] | None = None
    reasoning_content: str | None = None
    """Accepted, so that an answer can be sent back as it came, and left out of the prompt."""
    refusal: Annotated[Any, Only("", why="it cannot be sent back")] = None
    annotations: Annotated[Any, Only([], why="it cannot be sent back")] = None
    audio: Annotated[Any, Only(why="the model reads text only")] = None
    tool_calls: Annotated[Any, Only([], why="tools are not implemented")] = None
    function_call: Annotated[Any, Only(why="tools are not implemented")] = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role!r} needs a content")
        return self

    def text(self) -> str:
        """The parts joined; empty for no content."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(_Request):
    """POST /v1/chat/completions. ``max_tokens`` absent: what the context leaves, but at most 1024."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    store: Annotated[Any, Only(False, why="nothing is stored")] = None
    tools: Annotated[Any, Only([], why="tools are not implemented")] = None
    tool_choice: Annotated[Any, Only("none", "auto", why="tools are not implemented")] = None
    parallel_tool_calls: bool | None = None
    response_format: Annotated[Any, Only({"type": "text"}, why="structured output is not implemented")] = None
    modalities: Annotated[Any, Only(["text"], why="the model writes text only")] = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs may only be given when logprobs is true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens mean the same; give one")
        return self


class CompletionRequest(_Request):
    """POST /v1/completions. ``max_tokens`` absent: 16, as OpenAI has it."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    best_of: Annotated[Any, Only(1, why="it is not implemented")] = None
    echo: Annotated[Any, Only(False, why="it is not implemented")] = None
    suffix: Annotated[Any, Only("", why="it is not implemented")] = None
