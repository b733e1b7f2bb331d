from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from labkit.detokenize import TextStream, token_decoder


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def metaspace() -> Any:
    """A tokenizer in the SentencePiece manner, where a piece's text depends on its place."""
    vocab = {"▁": 0, "▁a": 1, "b": 2, "▁word": 3, "é": 4, "▁日": 5, "本": 6, "<s>": 7}
    inner = Tokenizer(models.BPE(vocab, [], fuse_unk=False))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


def pieces(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream, found = TextStream(token_decoder(tokenizer)(), stop), []
    for token_id in ids:
        found.append(stream.push(token_id))
        if stream.stopped:
            return found
    return [*found, stream.flush()]


TEXTS = [
    "Which account paid 187.50 for the trade?",
    "你好，世界 — naïve café",
    "👍🏽 family: 👨‍👩‍👧‍👦 flag: 🇩🇪 done",
    "<think>a 1 2 3</think>42\n\n",
    "\t tabs\r\nand   spaces ",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_text_and_none_is_broken(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    found = pieces(tokenizer, ids)
    assert "".join(found) == text == tokenizer.decode(ids, skip_special_tokens=True)
    assert all("\ufffd" not in piece for piece in found)
    assert sum(map(bool, found)) > 1, "it comes in pieces"


def test_every_single_token_is_worth_its_own_text(tokenizer: Any) -> None:
    decode = token_decoder(tokenizer)
    for token_id in range(len(tokenizer)):
        text = decode()(token_id)
        expected = tokenizer.decode([token_id], skip_special_tokens=True)
        # A token that is the beginning of a character has no text of its own.
        assert text == expected or (text == "" and expected == "\ufffd")
    assert decode()(398) == "<think>" and decode()(1) == ""


def test_any_tokens_give_what_the_tokenizer_gives(tokenizer: Any) -> None:
    """Random tokens are mostly invalid UTF-8; the text must then agree too, except for a beginning at the end."""
    chance = random.Random(0)
    for _ in range(300):
        ids = [chance.randrange(400) for _ in range(20)]
        found = "".join(pieces(tokenizer, ids))
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        assert expected.startswith(found)
        assert expected[len(found) :].strip("\ufffd") == ""


def test_two_answers_do_not_mix(tokenizer: Any) -> None:
    make = token_decoder(tokenizer)
    first, second = make(), make()
    mixed = [(first(a), second(b)) for a, b in zip(tokenizer.encode("你你你"), tokenizer.encode("好好好"), strict=True)]
    assert ("".join(a for a, _ in mixed), "".join(b for _, b in mixed)) == ("你你你", "好好好")


def test_tokenizers_that_are_not_byte_level(metaspace: Any) -> None:
    chance = random.Random(0)
    for _ in range(100):
        ids = [chance.randrange(8) for _ in range(40)]
        assert "".join(pieces(metaspace, ids)) == metaspace.decode(ids, skip_special_tokens=True)


def one_by_one(text: str, stop: tuple[str, ...]) -> tuple[list[str], bool]:
    """Text streamed one character a token."""
    stream, found = TextStream(chr, stop), []
    for character in text:
        found.append(stream.push(ord(character)))
        if stream.stopped:
            return found, True
    return [*found, stream.flush()], False


@given(st.text("ab<", max_size=30), st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3))
def test_text_ends_where_the_first_stop_string_is_complete(text: str, stop: list[str]) -> None:
    ends = [(text.find(each) + len(each), text.find(each)) for each in stop if each in text]
    # Of those complete at the same character, the one that begins first.
    expected = text[: min(ends)[1]] if ends else text
    found, stopped = one_by_one(text, tuple(stop))
    assert ("".join(found), stopped) == (expected, bool(ends))


def test_no_more_is_held_back_than_needed() -> None:
    found, _ = one_by_one("x<y<stoz", ("<stop>",))
    assert found == ["x", "", "<y", "", "", "", "", "<stoz", ""]


def test_a_stop_string_across_token_borders(tokenizer: Any) -> None:
    ids = tokenizer.encode("The trade of 100 shares\nwas 你好 fine")
    for stop, kept in [
        ("0 sh", "The trade of 10"),
        ("\nwa", "The trade of 100 shares"),
        ("好 f", "The trade of 100 shares\nwas 你"),
    ]:
        assert json.dumps("".join(pieces(tokenizer, ids, ("never", stop)))) == json.dumps(kept)
