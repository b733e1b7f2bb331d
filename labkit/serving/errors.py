"""Answers other than 200: one exception, and the words for what a request got wrong."""

from __future__ import annotations

import json
import logging
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from labkit.request import EngineFailed, QueueFull

logger = logging.getLogger(__name__)
RETRY_AFTER_S = "1"
SHOWN = 80


class ApiError(Exception):
    """Becomes an answer with ``status`` and OpenAI's error body. ``kind`` is the label under which it is counted."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        names = {401: "authentication_error", 429: "rate_limit_error"}
        name = names.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": name, "param": self.param, "code": self.code}}


def invalid(param: str, message: str) -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, f"{param}: {message}", param=param)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about an error; the details of one that nobody foresaw go to the log only."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        message = str(error) or "the queue is full; try again later"
        return ApiError(429, message, kind="queue_full", code="queue_full", headers={"retry-after": RETRY_AFTER_S})
    if isinstance(error, EngineFailed):
        return ApiError(503, f"the engine failed: {error}", kind="engine", code="engine_failed")
    if isinstance(error, ValueError):
        return ApiError(400, str(error))
    logger.error("a request failed in a way nobody foresaw", exc_info=error)
    return ApiError(500, "an internal error; the server's log has the details", kind="internal", code="internal_error")


def from_validation(error: ValidationError, body: bytes) -> ApiError:
    """The first mistake in a request body, as a 400 with the field, what it may be, and what it was."""
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    if first["type"] == "json_invalid":
        detail = first["msg"].removeprefix("Invalid JSON: ")
        return ApiError(400, f"the body is not JSON in UTF-8: {detail}", code="json_invalid")
    raw = from_json(body)
    placed = [(_place(problem["loc"], raw, problem["type"] == "missing"), problem) for problem in problems]
    # A field of several types reports one problem for each: the deepest one is about the type that was meant.
    same_field = [item for item in placed if item[0][:1] == placed[0][0][:1]]
    deepest = max(same_field, key=lambda item: len(item[0]))[0]
    here = [problem for place, problem in placed if place == deepest]
    param = ".".join(str(part) for part in deepest)
    if here[0]["type"] == "extra_forbidden":
        return ApiError(
            400, f"{param}: this server knows no such field; leave it out", param=param, code="unknown_field"
        )
    if here[0]["type"] == "missing":
        return ApiError(400, f"{param}: this field is required", param=param, code="missing_field")
    # Of several types that a field may have, the one that the value is of knows best what is wrong with it.
    nearest = [problem for problem in here if not problem["type"].endswith("_type")] or here
    messages = list(dict.fromkeys(_message(problem["msg"]) for problem in nearest))
    shown = _shown(here[0]["input"])
    text = ", or ".join(messages) + (f"; got {shown}" if shown else "")
    return ApiError(
        400, f"{param}: {text}" if param else f"the body: {text}", param=param or None, code="invalid_value"
    )


def _place(location: tuple[int | str, ...], raw: Any, missing: bool) -> tuple[int | str, ...]:
    """A problem's location without the labels of union members, which are no part of what the client sent."""
    place: list[int | str] = []
    for position, part in enumerate(location):
        if isinstance(raw, dict) and part in raw:
            raw = raw[part]
        elif isinstance(raw, list) and isinstance(part, int) and part < len(raw):
            raw = raw[part]
        elif not (missing and position == len(location) - 1):
            continue
        place.append(part)
    return tuple(place)


def _message(text: str) -> str:
    text = text.removeprefix("Value error, ").replace(" after validation", "")
    return text.removeprefix("Input ").replace("List should", "the array should")


def _shown(value: Any) -> str:
    """The value itself where it is short enough to help; nothing for objects and lists."""
    if isinstance(value, (dict, list)):
        return ""
    if isinstance(value, int) and abs(value) > 10**30:  # Python refuses to print the longest
        return "a number of more than 30 digits"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
