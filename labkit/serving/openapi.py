"""The OpenAPI document of the server, from the same models that check the requests."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from labkit import __version__
from labkit.serving.options import ServerOptions
from labkit.serving.protocol import ChatRequest, CompletionRequest

ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
USAGE_SCHEMA = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {name: {"type": "integer"} for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
}
REFUSALS = {
    "400": "A field is missing, unknown, of the wrong type or outside its limits; the message names it.",
    "404": "Another model than the one that is served.",
    "408": "The body did not come in time.",
    "413": "The body is over the size limit.",
    "415": "The body is not declared as application/json.",
    "429": "The queue is full.",
    "500": "An internal error.",
    "503": "The model is loading, the engine failed, or the server is stopping.",
}


def document(options: ServerOptions) -> dict[str, Any]:
    """OpenAPI 3.1."""
    _, definitions = models_json_schema(
        [(ChatRequest, "validation"), (CompletionRequest, "validation")], ref_template="#/components/schemas/{model}"
    )
    schemas = {**definitions.get("$defs", {}), "Error": ERROR_SCHEMA, "Usage": USAGE_SCHEMA}
    paths: dict[str, Any] = {
        "/v1/chat/completions": {"post": _completions("ChatRequest", "Continue a conversation.", options)},
        "/v1/completions": {"post": _completions("CompletionRequest", "Continue a text.", options)},
        "/v1/models": {"get": _reading("The model that is served.", guarded=bool(options.api_key))},
        "/health": {"get": _reading("200 once the model is loaded and warm.", unready=True)},
        "/stats": {"get": _reading("The engine's counters.")},
        "/metrics": {"get": _reading("The same and latency histograms, for Prometheus.", media="text/plain")},
        "/openapi.json": {"get": _reading("This document.")},
    }
    components: dict[str, Any] = {"schemas": schemas}
    if options.api_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "labkit", "version": __version__},
        "paths": paths,
        "components": components,
    }


def _completions(schema: str, summary: str, options: ServerOptions) -> dict[str, Any]:
    answer = {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {"choices": {"type": "array"}, "usage": {"$ref": "#/components/schemas/Usage"}},
    }
    content = {"application/json": {"schema": answer}, "text/event-stream": {"schema": {"type": "string"}}}
    refusals = dict(REFUSALS, **({"401": "No valid API key."} if options.api_key else {}))
    operation: dict[str, Any] = {
        "summary": summary,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
        },
        "responses": {
            "200": {"description": "The answer: an object, or events when stream is true.", "content": content},
            **{status: _refusal(text) for status, text in sorted(refusals.items())},
        },
    }
    if options.api_key:
        operation["security"] = [{"key": []}]
    return operation


def _reading(
    summary: str, *, media: str = "application/json", guarded: bool = False, unready: bool = False
) -> dict[str, Any]:
    schema = {"type": "object"} if media == "application/json" else {"type": "string"}
    responses: dict[str, Any] = {"200": {"description": summary, "content": {media: {"schema": schema}}}}
    if guarded:
        responses["401"] = _refusal("No valid API key.")
    if unready:
        responses["503"] = {"description": "Loading, or failed.", "content": {media: {"schema": schema}}}
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if guarded:
        operation["security"] = [{"key": []}]
    return operation


def _refusal(description: str) -> dict[str, Any]:
    return {
        "description": description,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
