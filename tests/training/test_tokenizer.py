from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from labkit.training.documents import LENGTHS, make_batch
from labkit.training.ledger import ACCOUNTS, BUCKET_TOKENS, BUCKETS, SYMBOLS, make_problem
from labkit.training.tokenizer import (
    TOKENS,
    completion_text,
    piece_table,
    prompt_text,
    train_tokenizer,
    write_tokenizer,
)

TOKENIZER = train_tokenizer()
TABLE = piece_table(TOKENIZER)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(TOKENIZER, directory)
    return AutoTokenizer.from_pretrained(directory)


def test_training_it_twice_gives_the_same_tokenizer() -> None:
    assert train_tokenizer().to_str() == TOKENIZER.to_str()


def test_table_encodes_as_the_tokenizer_and_prompts_fit_their_bucket(plain: PreTrainedTokenizerBase) -> None:
    for bucket in BUCKETS:
        low, high = BUCKET_TOKENS[bucket]
        lengths = []
        for index in range(300):
            problem = make_problem(11, index, bucket)
            message = [{"role": "user", "content": problem.prompt}]
            prompt = plain.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
            assert prompt == prompt_text(problem.prompt)
            ids = plain(prompt, add_special_tokens=False).input_ids
            lengths.append(len(ids))
            assert (
                TABLE.encode(prompt + completion_text(problem)) == ids + TOKENIZER.encode(completion_text(problem)).ids
            )
        assert low <= min(lengths) and max(lengths) <= high
        assert min(lengths) < low + (high - low) * 0.1 and max(lengths) > high - (high - low) * 0.15


def test_names_digits_and_markers_are_one_token_each() -> None:
    for text in (*SYMBOLS, *ACCOUNTS, *TOKENS, *"0123456789,:@= \n"):
        assert len(TOKENIZER.encode(text).ids) == 1, text
    assert [TOKENIZER.token_to_id(token) for token in TOKENS] == [0, 1, 2, 3, 4]
    assert TOKENIZER.encode("x,ACME1 ACME").tokens[2] == TOKENIZER.encode("x,ACME1 ACME").tokens[5] == "ACME"


@settings(max_examples=200)
@given(st.text())
def test_any_text_comes_back_unchanged(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def test_chat_template_drops_earlier_thoughts_and_thoughts_survive_decoding(plain: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>t</think>5"}, {"role": "user", "content": "r"},
    ]  # fmt: skip
    text = plain.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    turns = ("system\ns", "user\nq", "assistant\n5", "user\nr")
    assert text == "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns) + "<|im_start|>assistant\n"
    assert plain.decode(plain("<think>t</think>5<|im_end|>").input_ids, skip_special_tokens=True) == "<think>t</think>5"
    assert (plain.eos_token_id, plain.pad_token_id) == (2, 0)


def test_documents_are_prompts_then_weighted_completions_and_depend_on_nothing_else() -> None:
    for bucket in BUCKETS:
        batch = make_batch(TABLE, 1, bucket, 5, 2)
        again = make_batch(TABLE, 1, bucket, 5, 2)
        assert (batch.ids == again.ids).all() and batch.ids.shape == (2, LENGTHS[bucket])
        assert not (make_batch(TABLE, 1, bucket, 6, 2).ids == batch.ids).all()
        for ids, weights in zip(batch.ids, batch.weights, strict=True):
            text = TOKENIZER.decode(ids.tolist(), skip_special_tokens=False).replace("<|endoftext|>", "")
            turns = text.split("<|im_start|>user\n")[1:]
            questions = [turn.split("<|im_end|>")[0].splitlines()[-1] for turn in turns]
            assert len(set(questions)) == len(questions) >= 1
            thoughts = "".join(
                TOKENIZER.decode([i], skip_special_tokens=False) for i, w in zip(ids, weights, strict=True) if w == 1
            )
            assert thoughts.startswith("<think>") and thoughts.count("</think>") == len(turns)
            answers = "".join(
                TOKENIZER.decode([i], skip_special_tokens=False) for i, w in zip(ids, weights, strict=True) if w == 3
            )
            assert answers.count("<|im_end|>") == len(turns) and "think" not in answers
