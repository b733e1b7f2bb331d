"""The official OpenAI client against ``labkit serve``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from labkit.training.ledger import is_correct, make_problem

pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parents[1] / "data" / "models" / "ledger-r1"
PROBLEM = make_problem(seed=5, index=3, bucket="short", family="lookup")


@pytest.fixture(scope="module")
def said(peer, serve, output_of) -> dict[str, Any]:
    """What the client got for every call of openai_calls.py."""
    python = peer("openai") / "python"
    with serve(SHIPPED, "--api-key", "right") as url:
        return json.loads(output_of([python, HERE / "openai_calls.py", url, PROBLEM.prompt], timeout_s=300))


def streamed(chunks: list[dict[str, Any]], part: str) -> str:
    return "".join(choice["delta"].get(part) or "" for chunk in chunks for choice in chunk["choices"])


def test_the_client_is_the_pinned_one(said):
    lock = (HERE.parents[1] / "peers" / "openai.lock").read_text().split()
    assert f"openai=={said['version']}" in lock


def test_models_are_listed(said):
    assert [each["id"] for each in said["models"]] == ["ledger-r1"]


def test_a_chat_answers_with_its_reasoning_apart(said):
    message, usage = said["chat"]["choices"][0]["message"], said["chat"]["usage"]
    assert message["reasoning_content"].strip()
    assert "<think>" not in message["content"] and "</think>" not in message["content"]
    assert is_correct(PROBLEM.answer, message["content"])
    assert said["chat"]["choices"][0]["finish_reason"] == "stop"
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]


def test_a_streamed_chat_says_the_same_and_ends_with_usage(said):
    message = said["chat"]["choices"][0]["message"]
    for chunks in (said["chat_stream"], said["chat_stream_bare"]):
        assert streamed(chunks, "content") == message["content"]
        assert streamed(chunks, "reasoning_content") == message["reasoning_content"]
        assert [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]] == ["stop"]
        assert len({chunk["id"] for chunk in chunks}) == 1
    last = said["chat_stream"][-1]
    assert last["choices"] == [] and last["usage"] == said["chat"]["usage"]
    assert [chunk["usage"] for chunk in said["chat_stream"][:-1]] == [None] * (len(said["chat_stream"]) - 1)


def test_completions_streamed_or_not_say_the_same(said):
    whole = said["text"]["choices"][0]
    chunks = said["text_stream"]
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == whole["text"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == said["text"]["usage"]
    assert said["text"]["usage"]["completion_tokens"] <= 24


def test_a_stop_string_ends_the_text_before_itself(said):
    whole, stop = said["text"]["choices"][0]["text"], said["stop_string"]
    stopped = said["stopped"]["choices"][0]
    assert stopped["text"] == whole[: whole.index(stop)]
    assert stopped["finish_reason"] == "stop"


def test_a_seed_decides_what_is_sampled(said):
    first, same, *others = (each["message"] for each in said["seeds"])
    assert first == same
    assert any(other != first for other in others)


def test_two_choices_are_two_answers(said):
    assert [each["index"] for each in said["two"]["choices"]] == [0, 1]
    assert {each["message"]["content"] for each in said["two"]["choices"]} == {
        said["chat"]["choices"][0]["message"]["content"]
    }


def test_logprobs_name_the_chosen_token_and_its_rivals(said):
    tokens = said["logprobs"]["choices"][0]["logprobs"]["content"]
    assert tokens
    for token in tokens:
        assert token["logprob"] <= 0 and len(token["top_logprobs"]) == 3
        # Greedy: the chosen token is the likeliest.
        assert token["logprob"] == pytest.approx(max(each["logprob"] for each in token["top_logprobs"]))


@pytest.mark.parametrize(
    ("what", "status", "name"),
    [
        ("temperature", 400, "temperature"),
        ("max_tokens", 400, "max_tokens"),
        ("messages", 400, "messages"),
        ("tools", 400, "tools"),
        ("penalty", 400, "frequency_penalty"),
        ("n", 400, "n"),
        ("unknown", 400, "no_such_field"),
        ("too_long", 400, "messages"),
        ("model", 404, "model"),
        ("key", 401, ""),
    ],
)
def test_what_is_wrong_is_refused_with_the_field_named(said, what, status, name):
    refusal = said["refusals"][what]
    classes = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError"}
    assert (refusal["class"], refusal["status"]) == (classes[status], status), refusal
    assert name in (refusal["param"] or "") or not name
    assert name in refusal["message"]
