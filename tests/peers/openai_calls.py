"""Run by test_openai.py with the client's own Python: makes every call once and prints what came back as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import openai

url, prompt = sys.argv[1], sys.argv[2]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="right", max_retries=0, timeout=120)
model = client.models.list().data[0].id
asked: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 400}
asked["temperature"] = 0
said: dict[str, Any] = {"version": openai.__version__, "models": client.models.list().model_dump()["data"]}


def refusal(**changes: Any) -> dict[str, Any]:
    """How a wrong request is refused: the client's class for it, status, field and message."""
    try:
        client.chat.completions.create(**{**asked, **changes})
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        return {
            "class": type(error).__name__,
            "status": error.status_code,
            "param": body.get("param"),
            "message": str(error),
        }
    return {"class": "none"}


said["chat"] = client.chat.completions.create(**asked).model_dump()
said["chat_stream"] = [
    chunk.model_dump()
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
]
said["chat_stream_bare"] = [chunk.model_dump() for chunk in client.chat.completions.create(**asked, stream=True)]
said["two"] = client.chat.completions.create(**asked, n=2).model_dump()
said["logprobs"] = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).model_dump()

said["seeds"] = [
    client.chat.completions.create(**{**asked, "temperature": 2.0, "max_tokens": 60, "seed": seed})
    .choices[0]
    .model_dump()
    for seed in (7, 7, 8, 9, 10)
]

text = {"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0}
said["text"] = client.completions.create(**text).model_dump()
said["text_stream"] = [
    chunk.model_dump()
    for chunk in client.completions.create(**text, stream=True, stream_options={"include_usage": True})
]
whole = said["text"]["choices"][0]["text"]
said["stop_string"] = whole[len(whole) // 2 :][:2]
said["stopped"] = client.completions.create(**text, stop=[said["stop_string"]]).model_dump()

said["refusals"] = {
    "temperature": refusal(temperature=-1),
    "max_tokens": refusal(max_tokens=-1),
    "messages": refusal(messages=[]),
    "tools": refusal(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]),
    "penalty": refusal(frequency_penalty=1.0),
    "n": refusal(n=10_000),
    "unknown": refusal(extra_body={"no_such_field": 1}),
    "too_long": refusal(messages=[{"role": "user", "content": "many words " * 20_000}]),
    "model": refusal(model="no-such-model"),
}
client.api_key = "wrong"
said["refusals"]["key"] = refusal()
print(json.dumps(said))
