"""The shipped model itself, on the CPU: what plain transformers makes of it, and how often it is right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from labkit.training.decoding import greedy
from labkit.training.evaluate import evaluate
from labkit.training.ledger import BUCKETS, make_problem
from labkit.training.modeldir import read_model
from labkit.training.network import operations_a_token
from labkit.training.tokenizer import CHAT_TEMPLATE, TURN_END, prompt_text, train_tokenizer, write_tokenizer

MODEL = Path(__file__).resolve().parents[2] / "data" / "models" / "ledger-r1"
STUDENT = MODEL.with_name("ledger-r1-mini")


def test_its_weights_are_bfloat16_and_at_most_28_megabytes() -> None:
    assert [file.name for file in MODEL.glob("*.safetensors*")] == ["model.safetensors"]
    assert (MODEL / "model.safetensors").stat().st_size <= 28e6
    with safe_open(MODEL / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}


def test_its_student_computes_a_fifth_at_most_and_answers_short_problems() -> None:
    torch.set_num_threads(1)
    teacher, student = (read_model(path)[0].shape for path in (MODEL, STUDENT))
    for context in (100, 300, 1000):
        assert operations_a_token(student, context) < 0.2 * operations_a_token(teacher, context)
    account = evaluate(STUDENT, 24, ["short"], seed=12)
    assert account["buckets"]["short"]["right"] >= 0.9 * 24  # type: ignore[index]


def test_its_tokenizer_is_what_the_code_trains(tmp_path: Path) -> None:
    write_tokenizer(train_tokenizer(), tmp_path)
    assert (tmp_path / "tokenizer_config.json").is_file()
    for file in tmp_path.iterdir():
        assert file.read_text() == (MODEL / file.name).read_text(), file.name
    assert AutoTokenizer.from_pretrained(MODEL).chat_template == CHAT_TEMPLATE


def test_greedy_decoding_in_one_batch_writes_what_transformers_writes_one_by_one() -> None:
    torch.set_num_threads(1)
    network, tokenizer = read_model(MODEL, dtype=torch.float32)
    other = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    problems = [make_problem(7, index, "short") for index in range(4)]
    prompts = [tokenizer.encode(prompt_text(problem.prompt)).ids for problem in problems]
    # one that the model was never trained on, to no end that anyone knows
    prompts.append(tokenizer.encode("Once upon a time").ids)
    ours = greedy(network, prompts, tokenizer.token_to_id(TURN_END), 48)
    for prompt, tokens in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = other.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48)[0, len(prompt) :]
        assert tokens == theirs.tolist()
    assert len({len(tokens) for tokens in ours}) > 2


def test_it_answers_short_problems() -> None:
    torch.set_num_threads(1)
    account = evaluate(MODEL, 24, ["short"], seed=12)
    assert account["buckets"]["short"]["right"] >= 0.9 * 24  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_it_answers_a_hundred_problems_of_each_length() -> None:
    account = evaluate(MODEL, 100, BUCKETS, seed=13)
    for bucket, least in (("short", 0.95), ("medium", 0.92), ("long", 0.85)):
        assert account["buckets"][bucket]["share"] >= least, bucket  # type: ignore[index]
