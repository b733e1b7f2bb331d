"""The API as a client sees it, over a real socket, with scripted answers."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from prometheus_client.parser import text_string_to_metric_families

from labkit.engine import Delta, EngineFailed, QueueFull
from labkit.request import TokenLogprob
from labkit.serving.options import ServerOptions


def test_a_chat_answer_in_one_piece(helpers: Any, url: str, engine: Any) -> None:
    answer = httpx.post(url + "/v1/chat/completions", json=helpers.chat("hello")).json()
    expected = engine.tokenizer("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    assert engine.seen[0][0] == expected["input_ids"]
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-") and answer["model"] == "tiny"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello world!"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt = len(expected["input_ids"])
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 3,
        "total_tokens": prompt + 3,
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_a_chat_answer_in_a_stream_keeps_reasoning_apart(helpers: Any, url: str, engine: Any) -> None:
    engine.pieces = ("<think>", "add", " them", "</think>", "\n", "42")
    got = helpers.events(httpx.post(url + "/v1/chat/completions", json=helpers.chat(stream=True)))
    assert got[-1] == "[DONE]"
    deltas = [event["choices"][0]["delta"] for event in got[:-1]]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "add"},
        {"reasoning_content": " them"},
        {"content": "42"},
    ]
    assert [event["choices"][0]["finish_reason"] for event in got[:-1]] == [None, None, None, "stop"]
    assert [("usage" in event) for event in got[:-1]] == [False, False, False, True]
    assert got[-2]["usage"]["completion_tokens"] == 6
    assert got[-2]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}
    assert len({event["id"] for event in got[:-1]}) == 1 and got[0]["object"] == "chat.completion.chunk"


def test_usage_in_a_stream_is_where_the_client_asks_for_it(helpers: Any, url: str) -> None:
    def usages(options: dict[str, bool] | None) -> list[Any]:
        body = helpers.chat(stream=True, stream_options=options)
        return helpers.events(httpx.post(url + "/v1/chat/completions", json=body))[:-1]

    asked = usages({"include_usage": True})
    assert asked[-1]["choices"] == [] and asked[-1]["usage"]["completion_tokens"] == 3
    assert all("usage" not in event for event in asked[:-1])
    assert all("usage" not in event for event in usages({"include_usage": False}))
    assert ["usage" in event for event in usages(None)] == [False, False, True]
    continuous = usages({"include_usage": True, "continuous_usage_stats": True})
    assert [event["usage"]["completion_tokens"] for event in continuous] == [1, 2, 3, 3]


def test_an_answer_in_one_step_is_one_chunk(helpers: Any, url: str, engine: Any) -> None:
    think_end = engine.tokenizer.convert_tokens_to_ids("</think>")
    ids = (9, 9, think_end, 9, 9, 9)
    engine.script = lambda *_: [Delta(text="<think>why</think>\nbecause", token_ids=ids, finish_reason="stop")]
    got = helpers.events(httpx.post(url + "/v1/chat/completions", json=helpers.chat(stream=True)))
    assert len(got) == 2
    assert got[0]["choices"][0]["delta"] == {"role": "assistant", "reasoning_content": "why", "content": "because"}
    assert got[0]["usage"]["completion_tokens_details"]["reasoning_tokens"] == 3
    whole = httpx.post(url + "/v1/chat/completions", json=helpers.chat()).json()
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "because", "reasoning_content": "why"}


def test_completions_take_text_and_token_ids(url: str, engine: Any) -> None:
    def ask(prompt: Any, **fields: Any) -> dict[str, Any]:
        return httpx.post(url + "/v1/completions", json={"prompt": prompt, **fields}).json()

    encode = lambda text: engine.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    answer = ask("one")
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "Hello world!", "logprobs": None, "finish_reason": "stop"}]
    assert engine.seen[-1][0] == encode("one") and engine.seen[-1][1].max_tokens == 16
    assert ask([5, 6, 7])["usage"]["prompt_tokens"] == 3
    assert engine.seen[-1][0] == [5, 6, 7]
    answer = ask(["one", "two"], n=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [prompt for prompt, _ in engine.seen[-4:]] == [encode("one")] * 2 + [encode("two")] * 2
    assert answer["usage"]["completion_tokens"] == 12
    assert [prompt for prompt, _ in engine.seen[-2:]] and ask([[1, 2], [3]])["choices"][1]["text"] == "Hello world!"


def test_several_choices_share_a_stream(helpers: Any, url: str, engine: Any) -> None:
    engine.gap_s = 0.005
    got = helpers.events(httpx.post(url + "/v1/chat/completions", json=helpers.chat(stream=True, n=3, seed=5)))
    assert got[-1] == "[DONE]"
    for index in range(3):
        pieces = [event["choices"][0] for event in got[:-1] if event["choices"][0]["index"] == index]
        assert "".join(piece["delta"].get("content", "") for piece in pieces) == "Hello world!"
        assert pieces[-1]["finish_reason"] == "stop"
    assert [sampling.seed for _, sampling in engine.seen] == [5, 6, 7]
    assert sum("usage" in event for event in got[:-1]) == 1 and got[-2]["usage"]["completion_tokens"] == 9


def test_sampling_parameters_reach_the_engine(helpers: Any, url: str, engine: Any) -> None:
    body = helpers.chat(
        max_completion_tokens=9, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=3, stop="END", ignore_eos=True
    )
    assert httpx.post(url + "/v1/chat/completions", json=body).status_code == 200
    sampling = engine.seen[-1][1]
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (9, 0.5, 0.9, 7)
    assert (sampling.min_p, sampling.seed, sampling.stop, sampling.ignore_eos) == (0.1, 3, ("END",), True)
    assert sampling.logprobs is None
    httpx.post(url + "/v1/chat/completions", json=helpers.chat())
    prompt, sampling = engine.seen[-1]
    assert sampling.temperature == 1.0 and sampling.max_tokens == 512 - len(prompt) and sampling.stop == ()


def test_the_models_own_default_temperature(helpers: Any, engine: Any) -> None:
    with helpers.running(engine, ServerOptions(default_temperature=0.0)) as url:
        httpx.post(url + "/v1/chat/completions", json=helpers.chat())
        httpx.post(url + "/v1/chat/completions", json=helpers.chat(temperature=0.7))
    assert [sampling.temperature for _, sampling in engine.seen] == [0.0, 0.7]


def test_logprobs_in_both_shapes(helpers: Any, url: str, engine: Any) -> None:
    a, b = engine.tokenizer("AB", add_special_tokens=False)["input_ids"]
    one = TokenLogprob(a, -0.5, ((a, -0.5), (b, float("-inf"))))
    two = TokenLogprob(b, -0.25, ((b, -0.25), (a, -2.0)))
    engine.script = lambda *_: [
        Delta(text="A", token_ids=(a,), logprobs=(one,), finish_reason=None),
        Delta(text="B", token_ids=(b,), logprobs=(two,), finish_reason="length"),
    ]
    answer = httpx.post(url + "/v1/chat/completions", json=helpers.chat(logprobs=True, top_logprobs=2)).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert content[0] == {
        "token": "A",
        "logprob": -0.5,
        "bytes": [65],
        "top_logprobs": [
            {"token": "A", "logprob": -0.5, "bytes": [65]},
            {"token": "B", "logprob": -9999.0, "bytes": [66]},
        ],
    }
    assert engine.seen[-1][1].logprobs == 2
    body = {"prompt": "x", "logprobs": 2, "stream": True}
    got = helpers.events(httpx.post(url + "/v1/completions", json=body))
    assert got[1]["choices"][0]["logprobs"] == {
        "tokens": ["B"],
        "token_logprobs": [-0.25],
        "top_logprobs": [{"B": -0.25, "A": -2.0}],
        "text_offset": [1],
    }


MESSAGE = {"role": "user", "content": "x"}
WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    # (path, fields, param of the error, what the message must say)
    ("chat/completions", {}, "messages", "required"),
    ("chat/completions", {"messages": []}, "messages", "at least 1"),
    ("chat/completions", {"messages": "hi"}, "messages", "array"),
    ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'assistant'"),
    ("chat/completions", {"messages": [{"role": "user", "content": None}]}, "messages.0", "needs a content"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content.0",
        "text only",
    ),
    ("chat/completions", {"messages": [MESSAGE], "max_tokens": -1}, "max_tokens", "greater than or equal to 1"),
    ("chat/completions", {"messages": [MESSAGE], "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ("chat/completions", {"messages": [MESSAGE], "max_tokens": 10**18}, "max_tokens", "512 tokens"),
    ("chat/completions", {"messages": [MESSAGE], "max_tokens": 10**40}, "max_tokens", "512 tokens"),
    ("chat/completions", {"messages": [MESSAGE], "max_tokens": "7"}, "max_tokens", "integer"),
    ("chat/completions", {"messages": [MESSAGE], "temperature": 2.5}, "temperature", "2"),
    ("chat/completions", {"messages": [MESSAGE], "temperature": float("nan")}, "temperature", "finite"),
    ("chat/completions", {"messages": [MESSAGE], "top_p": 0}, "top_p", "greater than 0"),
    ("chat/completions", {"messages": [MESSAGE], "n": 1000}, "n", "128"),
    ("chat/completions", {"messages": [MESSAGE], "stop": [""]}, "stop.0", "empty"),
    ("chat/completions", {"messages": [MESSAGE], "stop": ["x"] * 17}, "stop", "16"),
    ("chat/completions", {"messages": [MESSAGE], "colour": "red"}, "colour", "no such field"),
    ("chat/completions", {"messages": [MESSAGE], "frequency_penalty": 0.5}, "frequency_penalty", "not implemented"),
    ("chat/completions", {"messages": [MESSAGE], "tools": [{"type": "function"}]}, "tools", "not implemented"),
    ("chat/completions", {"messages": [MESSAGE], "top_logprobs": 2}, "", "logprobs is true"),
    ("chat/completions", {"messages": [{"role": "user", "content": "word " * 600}]}, "messages", "512 tokens"),
    ("completions", {"prompt": ""}, "prompt", "empty"),
    ("completions", {"prompt": []}, "prompt", "at least 1"),
    ("completions", {"prompt": [[1], []]}, "prompt.0", "integer"),
    ("completions", {"prompt": [1, 399_999]}, "prompt", "below 400"),
    ("completions", {"prompt": [1] * 512}, "prompt", "at most 511"),
    ("completions", {"prompt": ["a"] * 65, "n": 2}, "n", "128"),
    ("completions", {"prompt": "a", "echo": True}, "echo", "not implemented"),
]


@pytest.fixture(scope="module")
def shared_url(helpers: Any, tokenizer: Any) -> Any:
    with helpers.running(helpers.ScriptedEngine(tokenizer)) as address, httpx.Client(base_url=address) as client:
        yield client


@pytest.mark.parametrize(("path", "fields", "param", "says"), WRONG)
def test_wrong_input_is_refused_by_name(
    shared_url: httpx.Client, path: str, fields: dict[str, Any], param: str, says: str
) -> None:
    body = json.dumps(fields).encode()
    response = shared_url.post(f"/v1/{path}", content=body, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == (param or None)
    assert says in error["message"] and param in error["message"]


HARMLESS = {
    "user": "someone",
    "store": False,
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "n": 1,
    "logit_bias": {},
    "parallel_tool_calls": True,
    "tools": None,
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "stop": None,
    "seed": None,
    "max_tokens": None,
    "stream": None,
    "logprobs": False,
}


@pytest.mark.parametrize("field", HARMLESS)
def test_fields_that_change_nothing_are_accepted(helpers: Any, shared_url: httpx.Client, field: str) -> None:
    response = shared_url.post("/v1/chat/completions", json=helpers.chat(**{field: HARMLESS[field]}))
    assert response.status_code == 200, response.text


def test_an_answer_can_be_sent_back_and_text_parts_are_joined(helpers: Any, url: str, engine: Any) -> None:
    first = httpx.post(url + "/v1/chat/completions", json=helpers.chat("a")).json()["choices"][0]["message"]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {**first, "reasoning_content": "hm", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "c"},
    ]
    response = httpx.post(url + "/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 200, response.text
    assert engine.tokenizer.decode(engine.seen[-1][0]) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\nHello world!"
        "<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_prompt_that_opens_the_reasoning_itself(helpers: Any, url: str, engine: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(engine.tokenizer, "chat_template", engine.tokenizer.chat_template + "{{ '<think>\n' }}")
    engine.pieces = ("\nso", "</think>", "\n\n", "yes")
    message = httpx.post(url + "/v1/chat/completions", json=helpers.chat()).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "reasoning_content": "so", "content": "yes"}


def test_a_template_that_refuses_the_messages(helpers: Any, url: str, engine: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(engine.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    response = httpx.post(url + "/v1/chat/completions", json=helpers.chat())
    assert response.status_code == 400 and "roles must alternate" in response.json()["error"]["message"]


def test_wrong_addresses_methods_and_models(helpers: Any, url: str) -> None:
    def error(response: httpx.Response) -> tuple[int, str]:
        return response.status_code, response.json()["error"]["message"]

    assert error(httpx.get(url + "/nowhere"))[0] == 404
    status, message = error(httpx.get(url + "/v1/chat/completions"))
    assert status == 405 and "POST" in message
    status, message = error(httpx.post(url + "/v1/chat/completions", json=helpers.chat(model="gpt-4")))
    assert status == 404 and "'tiny'" in message
    assert httpx.post(url + "/v1/chat/completions", json=helpers.chat(model="tiny")).status_code == 200
    wrong_type = httpx.post(url + "/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert error(wrong_type)[0] == 415
    for body in (
        b"",
        b"{",
        b"\xff\xfe",
        b"nul",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b"[" * 9999,
    ):
        response = httpx.post(
            url + "/v1/chat/completions", content=body, headers={"content-type": "application/json; charset=utf-8"}
        )
        status, message = error(response)
        assert status == 400 and "JSON" in message


def test_a_body_over_the_limit(helpers: Any, engine: Any) -> None:
    with helpers.running(engine, ServerOptions(max_body_bytes=10_000)) as url:
        fits = json.dumps(helpers.chat("x", user="u" * 9_000))
        declared = httpx.post(url + "/v1/chat/completions", json=helpers.chat("x" * 20_000))
        endless = (b" " * 1000 for _ in range(1000))
        chunked = httpx.post(
            url + "/v1/chat/completions", content=endless, headers={"content-type": "application/json"}
        )
        assert httpx.post(
            url + "/v1/chat/completions", content=fits, headers={"content-type": "application/json"}
        ).is_success
    for response in (declared, chunked):
        assert response.status_code == 413
        assert "10000 bytes" in response.json()["error"]["message"]


def test_the_api_key(helpers: Any, engine: Any) -> None:
    with helpers.running(engine, ServerOptions(model_name="tiny", api_key="sécret")) as url:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "sécret".encode()}):
            refused = httpx.post(url + "/v1/chat/completions", json=helpers.chat(), headers=headers)
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
            assert httpx.get(url + "/v1/models", headers=headers).status_code == 401
        key = {"authorization": "Bearer sécret".encode()}
        assert httpx.post(url + "/v1/chat/completions", json=helpers.chat(), headers=key).status_code == 200
        assert httpx.get(url + "/v1/models", headers=key).json()["data"][0]["id"] == "tiny"
        assert httpx.get(url + "/health").status_code == 200


def test_health_follows_the_engine(helpers: Any, url: str, engine: Any) -> None:
    assert httpx.get(url + "/health").json() == {"status": "ok"}
    engine.ready = False
    health, refused = httpx.get(url + "/health"), httpx.post(url + "/v1/chat/completions", json=helpers.chat())
    assert (health.status_code, health.json()) == (503, {"status": "loading"})
    assert refused.status_code == 503 and "loading" in refused.json()["error"]["message"]
    assert health.headers["retry-after"] and refused.headers["retry-after"]
    engine.failed = "no memory left"
    health, refused = httpx.get(url + "/health"), httpx.post(url + "/v1/chat/completions", json=helpers.chat())
    assert (health.status_code, health.json()) == (503, {"status": "failed", "reason": "no memory left"})
    assert refused.status_code == 503 and "no memory left" in refused.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_has_a_status(helpers: Any, url: str, engine: Any, stream: bool) -> None:
    def ask(error: Exception) -> httpx.Response:
        engine.refusal = error
        return httpx.post(url + "/v1/chat/completions", json=helpers.chat(stream=stream))

    full = ask(QueueFull("8 requests wait already"))
    assert full.status_code == 429 and full.headers["retry-after"] and "8 requests" in full.json()["error"]["message"]
    assert full.json()["error"]["type"] == "rate_limit_error"
    assert ask(ValueError("too long")).status_code == 400
    assert ask(EngineFailed("gone")).status_code == 503
    broken = ask(RuntimeError("secret detail"))
    assert broken.status_code == 500 and "secret" not in broken.text


def test_an_error_in_mid_stream_is_an_event_and_no_done(helpers: Any, url: str, engine: Any) -> None:
    engine.fail_after = 2
    for failure in (EngineFailed("lost"), RuntimeError("unforeseen")):
        engine.failure = failure
        got = helpers.events(httpx.post(url + "/v1/chat/completions", json=helpers.chat(stream=True)))
        assert [event["choices"][0]["delta"].get("content") for event in got[:2]] == ["Hello", " world"]
        assert set(got[2]) == {"error"} and len(got) == 3
    assert httpx.post(url + "/v1/chat/completions", json=helpers.chat()).status_code == 500
    engine.failure, engine.finish_reason = None, "error"
    assert helpers.events(httpx.post(url + "/v1/completions", json={"prompt": "a", "stream": True}))[-1]["error"]


def test_metrics_and_stats_count_what_happened(helpers: Any, url: str, engine: Any) -> None:
    httpx.post(url + "/v1/chat/completions", json=helpers.chat())
    helpers.events(httpx.post(url + "/v1/chat/completions", json=helpers.chat(stream=True)))
    httpx.post(url + "/v1/chat/completions", json={})
    engine.refusal = QueueFull("full")
    httpx.post(url + "/v1/completions", json={"prompt": "a"})
    text = httpx.get(url + "/metrics").text
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["labkit_requests_total", "completed"] == 2
    assert samples["labkit_requests_total", "refused"] == 2
    assert samples["labkit_failures_total", "invalid"] == samples["labkit_failures_total", "queue_full"] == 1
    assert samples["labkit_time_to_first_token_seconds_count",] == 2
    assert samples["labkit_inter_token_latency_seconds_count",] == 4
    assert samples["labkit_kv_blocks",] == 100 and samples["labkit_requests_running",] == 0
    stats = httpx.get(url + "/stats").json()
    assert stats["kv_blocks_total"] == 100 and stats["kv_use"] == 0


def test_the_openapi_document_says_what_is_taken(helpers: Any, url: str) -> None:
    document = httpx.get(url + "/openapi.json").json()
    chat = document["components"]["schemas"]["ChatRequest"]
    assert chat["additionalProperties"] is False and chat["required"] == ["messages"]
    assert {"messages", "max_tokens", "stop", "stream_options", "top_logprobs"} <= set(chat["properties"])
    for name in ("ChatRequest", "CompletionRequest"):
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        Draft202012Validator.check_schema(document["components"]["schemas"][name])
        validator = Draft202012Validator(schema)
        taken = helpers.chat(**HARMLESS) if name == "ChatRequest" else {"prompt": [[1], [2]], "n": 2, "stop": "x"}
        assert not list(validator.iter_errors(taken))
        assert list(validator.iter_errors({**taken, "max_tokens": -1}))
        assert list(validator.iter_errors({**taken, "colour": "red"}))
    responses = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert {"200", "400", "404", "413", "415", "429", "503"} <= set(responses)
