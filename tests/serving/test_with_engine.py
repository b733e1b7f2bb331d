"""The server in front of the real engine, on the tiny model: right answers, and whatever a client may send."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from labkit.deployment import Deployment
from labkit.engine import AsyncEngine
from labkit.serving.options import ServerOptions

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HOSTILE_REQUESTS = 2_000
REQUEST_TIMEOUT_S = 20.0


@pytest.fixture(scope="module")
def served(helpers: Any, tiny_model: Path) -> Any:
    engine = AsyncEngine(Deployment(model=str(tiny_model), max_batch=16, kv_blocks=256))
    engine.start()
    assert helpers.eventually(lambda: engine.ready or engine.failed is not None, 60) and engine.failed is None
    with helpers.running(engine, ServerOptions(model_name="tiny", max_body_bytes=200_000)) as url:
        with httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S) as client:
            yield client
    engine.stop()


def blocks_used(client: httpx.Client) -> int:
    stats = client.get("/stats").json()
    return stats["kv_blocks_used"] + stats["running"] + stats["waiting"]


def test_the_answers_are_the_models(served: httpx.Client, helpers: Any, tiny_model: Path, tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for content in ("hello", "Which account paid the largest fee?", "1 + 2 = " * 20):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        expected = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
        text = tokenizer.decode(expected, skip_special_tokens=True)
        body = helpers.chat(content, max_tokens=24, temperature=0)
        answer = served.post(CHAT, json=body).json()
        message = answer["choices"][0]["message"]
        assert message["content"] == text
        assert answer["usage"]["completion_tokens"] == len(expected)
        got = helpers.events(served.post(CHAT, json={**body, "stream": True}))
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in got[:-1]) == text
        assert got[-2]["usage"] == answer["usage"]
        completion = served.post(TEXT, json={"prompt": prompt, "max_tokens": 24, "temperature": 0}).json()
        assert completion["choices"][0]["text"] == text


def test_the_answers_stay_right_side_by_side(served: httpx.Client, helpers: Any) -> None:
    prompts = [f"question {number}" for number in range(12)]
    single = [
        served.post(TEXT, json={"prompt": each, "temperature": 0}).json()["choices"][0]["text"] for each in prompts
    ]
    together = served.post(TEXT, json={"prompt": prompts, "temperature": 0}).json()["choices"]
    assert [choice["text"] for choice in together] == single


def test_stop_strings_seed_and_logprobs(served: httpx.Client, helpers: Any) -> None:
    body = helpers.chat("a", max_tokens=30, temperature=0, ignore_eos=True)
    text = served.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
    stop = text[10:13]
    stopped = served.post(CHAT, json={**body, "stop": [stop]}).json()["choices"][0]
    assert stopped["message"]["content"] == text[: text.index(stop)] and stopped["finish_reason"] == "stop"
    sampled = [served.post(CHAT, json={**body, "temperature": 1, "seed": seed}).json() for seed in (1, 1, 2)]
    first, again, other = (each["choices"][0]["message"]["content"] for each in sampled)
    assert first == again != other
    logprobs = served.post(CHAT, json={**body, "logprobs": True, "top_logprobs": 3}).json()["choices"][0]["logprobs"]
    assert len(logprobs["content"]) == 30
    for entry in logprobs["content"]:
        assert entry["logprob"] == max(rival["logprob"] for rival in entry["top_logprobs"]) <= 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(served: httpx.Client, helpers: Any, stream: bool) -> None:
    body = helpers.chat(max_tokens=480, ignore_eos=True, n=16, stream=stream)
    connection = helpers.connect(str(served.base_url).rstrip("/"))
    connection.sendall(helpers.raw_post(CHAT, json.dumps(body).encode()))
    assert helpers.eventually(lambda: served.get("/stats").json()["kv_blocks_used"] > 16)
    generated = served.get("/stats").json()["generated_tokens"]
    connection.close()
    assert helpers.eventually(lambda: blocks_used(served) == 0)
    assert served.get("/stats").json()["generated_tokens"] - generated < 16 * 400, "it ran to its end"


def test_a_full_queue_is_a_429(helpers: Any, tiny_model: Path) -> None:
    engine = AsyncEngine(Deployment(model=str(tiny_model), max_batch=1, max_queue=1, kv_blocks=64))
    engine.start()
    assert helpers.eventually(lambda: engine.ready, 60)
    with helpers.running(engine) as url:
        body = json.dumps(helpers.chat(max_tokens=400, ignore_eos=True)).encode()
        connections = [helpers.connect(url) for _ in range(2)]
        for position, connection in enumerate(connections):
            connection.sendall(helpers.raw_post(CHAT, body))
            assert helpers.eventually(lambda: sum(_waiting_and_running(url)) == position + 1)  # noqa: B023
        refused = httpx.post(url + CHAT, json=helpers.chat())
        assert refused.status_code == 429 and refused.headers["retry-after"]
        for connection in connections:
            connection.close()
        assert helpers.eventually(lambda: httpx.post(url + CHAT, json=helpers.chat(max_tokens=2)).status_code == 200)
    engine.stop()


def _waiting_and_running(url: str) -> tuple[int, int]:
    stats = httpx.get(url + "/stats").json()
    return stats["waiting"], stats["running"]


# Whatever a client may send -------------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["", "\x00", "\U0010ffff", "<|im_end|>", "<think>", "</think>", "é" * 30, "a" * 3000, "{{ x }}"]),
)
NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 3, 16, 2**31, 2**63, -(2**63), 10**40, 1e308, 5e-324, 1e-300, -0.0, 0.5, 1.5]),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    st.integers(),
    st.floats(),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, st.just("\ud800"))
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
VALID_FIELDS: dict[str, Any] = {
    "max_tokens": st.integers(1, 4),
    "temperature": st.sampled_from([0, 1e-300, 1e-6, 0.5, 1, 2]),
    "top_p": st.sampled_from([5e-324, 1e-9, 0.5, 1]),
    "top_k": st.sampled_from([0, 1, 5, 400, 2**31 - 1]),
    "min_p": st.sampled_from([0, 1e-9, 0.5, 1]),
    "seed": st.sampled_from([0, 1, 2**63 - 1]),
    "stop": st.one_of(st.text(min_size=1, max_size=5), st.lists(st.text(min_size=1, max_size=3), max_size=16)),
    "n": st.integers(1, 3),
    "ignore_eos": st.booleans(),
    "user": TEXTS,
    "metadata": st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2),
}
STREAMED = st.sampled_from(
    [
        {},
        {"stream": False},
        {"stream": True},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"include_usage": False, "continuous_usage_stats": True}},
    ]
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "developer"]),
            "content": st.one_of(
                TEXTS, st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}), max_size=3)
            ),
        }
    ),
    min_size=1,
    max_size=4,
)
PROMPTS = st.one_of(
    TEXTS,
    st.lists(TEXTS, min_size=1, max_size=3),
    st.lists(st.integers(0, 399), min_size=1, max_size=8),
    st.lists(st.lists(st.integers(0, 450), min_size=1, max_size=3), min_size=1, max_size=3),
)


@st.composite
def hostile_requests(draw: Any) -> tuple[str, str, bytes, dict[str, str]]:
    """(method, path, body, headers): a valid request in which some things were exchanged for anything at all."""
    path = draw(st.sampled_from([CHAT, TEXT]))
    names = draw(st.lists(st.sampled_from(sorted(VALID_FIELDS)), max_size=5, unique=True))
    body: Any = {name: draw(VALID_FIELDS[name]) for name in names}
    body.setdefault("max_tokens", 2)
    body.update(draw(STREAMED))
    if path == CHAT:
        body["messages"] = draw(MESSAGES)
        body.update(draw(st.sampled_from([{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 20}])))
    else:
        body["prompt"] = draw(PROMPTS)
        body.update(draw(st.sampled_from([{}, {"logprobs": 0}, {"logprobs": 20}])))
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        target = body
        if (
            path == CHAT
            and draw(st.integers(0, 3)) == 0
            and isinstance(body.get("messages"), list)
            and body["messages"]
        ):
            target = body["messages"][0]
        if isinstance(target, dict):
            name = draw(
                st.sampled_from([*sorted(target), "model", "tools", "n", "logit_bias", draw(st.text(max_size=6))])
            )
            if draw(st.booleans()):
                target[name] = draw(ANYTHING)
            else:
                target.pop(name, None)
    if draw(st.integers(0, 19)) == 7:
        body = draw(ANYTHING)
    encoded = json.dumps(body).encode()
    match draw(st.integers(0, 24)):
        case 7:
            encoded = draw(st.binary(max_size=60))
        case 11:
            encoded = encoded[: draw(st.integers(0, len(encoded)))]
        case 13:
            depth = draw(st.sampled_from([50, 190, 250, 20_000]))
            encoded = b'{"messages": [{"role": "user", "content": ' + b"[" * depth + b"]" * depth + b"}]}"
        case 17:
            encoded = b" " * draw(st.sampled_from([199_000, 201_000])) + encoded
        case 19:
            position = draw(st.integers(0, len(encoded)))
            encoded = encoded[:position] + draw(st.binary(min_size=1, max_size=3)) + encoded[position:]
    headers = {"content-type": "application/json"}
    method = "POST"
    match draw(st.integers(0, 29)):
        case 7:
            headers["content-type"] = draw(
                st.sampled_from(["text/plain", "", "application/json; charset=x", "multipart/form-data"])
            )
        case 11:
            method = draw(st.sampled_from(["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]))
        case 13:
            path = draw(
                st.sampled_from(["/", "/v1", "/v1/", path + "/", "/v1/chat", "/v1/models", "/health", "/stats", "/%00"])
            )
        case 17:
            headers["x-odd"] = draw(st.sampled_from(["a" * 60_000, "é"]))
    return method, path, encoded, headers


def test_two_thousand_hostile_requests(served: httpx.Client, helpers: Any) -> None:
    seen: Counter[int] = Counter()
    slowest = 0.0

    @settings(
        max_examples=HOSTILE_REQUESTS,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(hostile_requests())
    def send(request: tuple[str, str, bytes, dict[str, str]]) -> None:
        nonlocal slowest
        method, path, body, headers = request
        began = time.monotonic()
        encoded_headers = {name: value.encode() for name, value in headers.items()}
        response = served.request(method, path, content=body, headers=encoded_headers)
        slowest = max(slowest, time.monotonic() - began)
        seen[response.status_code] += 1
        assert response.status_code < 500, (request, response.text)
        if response.status_code >= 400 and method != "HEAD":
            assert response.json()["error"]["message"], response.text
        elif response.headers["content-type"].startswith("text/event-stream"):
            assert helpers.events(response)[-1] == "[DONE]"

    send()
    assert sum(seen.values()) >= HOSTILE_REQUESTS
    # The requests must have reached every part of the server, the engine included.
    assert seen[200] > HOSTILE_REQUESTS / 4 and seen[400] > HOSTILE_REQUESTS / 4, seen
    assert {404, 405, 413, 415} <= set(seen), seen
    assert helpers.eventually(lambda: blocks_used(served) == 0)
    assert served.get("/health").status_code == 200
    assert slowest < REQUEST_TIMEOUT_S / 2


def test_hostile_requests_from_clients_that_leave(served: httpx.Client, helpers: Any) -> None:
    """Connections that end at any point of a request or its answer leave nothing behind."""
    generator = random.Random(0)
    url = str(served.base_url).rstrip("/")
    body = json.dumps(helpers.chat("hello", max_tokens=200, ignore_eos=True, stream=True)).encode()
    whole = helpers.raw_post(CHAT, body)
    for _ in range(60):
        connection = helpers.connect(url)
        connection.sendall(whole[: generator.choice([len(whole), generator.randrange(1, len(whole))])])
        time.sleep(generator.choice([0, 0.002, 0.02]))
        connection.close()
    assert helpers.eventually(lambda: blocks_used(served) == 0)
    assert served.post(CHAT, json=helpers.chat(max_tokens=1)).status_code == 200
