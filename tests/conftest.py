"""Fixtures that every part's tests may use."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

# Tests share the machine with each other: threads beyond one mostly wait for each other on models this small.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402  # reads the variables above when it is imported

# Triton reads this one when it is imported: without a GPU its kernels run interpreted, on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples every time, so that what was green stays so, and no limit of time, which other tests would break.
# `make test-all` goes on to examples that nobody has seen.
settings.register_profile("known", deadline=None, derandomize=True)
settings.register_profile("new", deadline=None)
settings.load_profile("known")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK_TOKENS = ("<think>", "</think>")
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Which account paid the largest fee on the trade of 100 shares?",
    "system user assistant: trade T0412 BUY 250 AAPL @ 187.50 fee 1.25 account ACC7",
    "Net position in MSFT after all the trades of the blotter is the sum of what was bought less what was sold.",
    "A streaming server answers every request with the same words, whatever else it is doing at the time.",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A bound on a time also breaks when the machine stands still for a moment; a fault of ours breaks it every time.

    So an assertion is tried again, an exception is not; and tests that are not marked have one try.
    """
    for item in items:
        if item.get_closest_marker("clock"):
            item.add_marker(pytest.mark.flaky(reruns=2, only_rerun="AssertionError"))


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Global generators start from the same seed in every test, whichever ran before it and in which process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with a random Qwen2 (2 layers, hidden 64, 4/2 heads, context 512, untied head, seed 0).

    Its weights are spread widely enough that greedy answers vary from prompt to prompt. The tokenizer is a byte-level
    BPE of 400 tokens with digits apart and a ChatML template; `<|endoftext|>` is 0, `<|im_end|>` ends an answer.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    path = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(path)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.1 * torch.randn(weight.shape, generator=generator))
            else:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(path)
    return path


@dataclass(frozen=True)
class GreedyCase:
    """A prompt and the 64 tokens that ``transformers`` answers greedily when end-of-sequence tokens are ignored."""

    prompt_ids: list[int]
    answer_ids: list[int]


@pytest.fixture(scope="session")
def greedy_cases(tiny_model: Path) -> list[GreedyCase]:
    """50 prompts for ``tiny_model``, 1 to 400 tokens, shuffled, with the answers that ``transformers`` gives."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    chance, cases = random.Random(0), []
    for length in (1, 2, 7, 15, 16, 17, 33, 100, 257, 400):
        prompts = [[chance.randrange(3, 398) for _ in range(length)] for _ in range(5)]
        ids = torch.tensor(prompts)
        answers = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=64,
            min_new_tokens=64,
            eos_token_id=-1,
            do_sample=False,
        )[:, length:]
        cases += [GreedyCase(prompt, answer) for prompt, answer in zip(prompts, answers.tolist(), strict=True)]
    chance.shuffle(cases)
    return cases


def build_tokenizer():  # type: ignore[no-untyped-def]
    """A transformers tokenizer of 400 tokens, trained here and now on a few sentences (the same every time)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400 - len(THINK_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    bpe.add_tokens(list(THINK_TOKENS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
