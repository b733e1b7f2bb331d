"""The pieces of an answer, without a server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.request import SamplingParams
from labkit.serving.prompts import Job
from labkit.serving.streams import ReasoningSplitter, deltas

WHOLE = [
    # (text, opened by the prompt, reasoning, content)
    ("plain answer", False, "", "plain answer"),
    ("<think>why</think>\nbecause", False, "why", "because"),
    ("\n<think>\nwhy\n</think>\n\nbecause", False, "why\n", "because"),
    ("why</think>because", True, "why", "because"),
    ("\nwhy", True, "why", ""),
    ("<think>never ends </thin", False, "never ends </thin", ""),
    ("<thin", False, "", "<thin"),
    ("<think></think>\n42", False, "", "42"),
    ("a <think>b</think> c", False, "", "a <think>b</think> c"),
    ("<think>a</think>b</think>c", False, "a", "b</think>c"),
    ("  indented", False, "", "  indented"),
    ("", False, "", ""),
    ("<think><</t</think><", False, "<</t", "<"),
]


@pytest.mark.parametrize(("text", "opened", "reasoning", "content"), WHOLE)
@given(data=st.data())
def test_the_split_does_not_depend_on_where_the_text_is_cut(
    text: str, opened: bool, reasoning: str, content: str, data: Any
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    splitter = ReasoningSplitter(opened)
    parts = [splitter.feed(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)] + [
        splitter.finish()
    ]
    assert "".join(part[0] for part in parts) == reasoning
    assert "".join(part[1] for part in parts) == content
    assert splitter.reasoned == (opened or text.lstrip().startswith("<think>"))


def test_text_is_held_back_no_longer_than_it_may_be_a_tag() -> None:
    splitter = ReasoningSplitter()
    assert splitter.feed("<th") == ("", "")
    assert splitter.feed("is is it") == ("", "<this is it")
    splitter = ReasoningSplitter(opened=True)
    assert splitter.feed("a</") == ("a", "")
    assert splitter.feed("b") == ("</b", "")


def test_merged_streams_end_together_on_an_error_and_when_closed(helpers: Any, tokenizer: Any) -> None:
    async def main() -> None:
        engine = helpers.ScriptedEngine(tokenizer, pieces=("a", "b", "c"), fail_after=2, failure=RuntimeError("x"))
        jobs = [Job(index, [1], SamplingParams()) for index in range(3)]
        got = []
        with pytest.raises(RuntimeError):
            async for index, delta in deltas(engine, jobs):
                got.append((index, delta.text))
        assert {index for index, _ in got} == {0, 1, 2} and {text for _, text in got} == {"a", "b"}
        assert engine.running == 0

        engine = helpers.ScriptedEngine(tokenizer, pieces=("a",) * 100, gap_s=0.01)
        stream = deltas(engine, jobs)
        await anext(stream)
        assert engine.running == 3
        await stream.aclose()
        assert engine.running == 0

    asyncio.run(main())
