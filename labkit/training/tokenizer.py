"""The tokenizer of the ledger model: byte-level BPE trained on generated text, and a table that encodes that text fast.

Every character that is no letter is a piece of its own (so digits come one by one), a run of letters is one; BPE
merges only inside a piece. So the encoding of a text is the encodings of its pieces in a row, which is what
``PieceTable`` looks up.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from labkit.files import write_atomic
from labkit.training.ledger import (
    ACCOUNTS,
    BUCKETS,
    FIRST_TRAINING_SEED,
    SYMBOLS,
    Problem,
    make_problem,
)

VOCABULARY = 768
CONTEXT = 5120
END_OF_TEXT, TURN_START, TURN_END, THINK, THINK_END = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
)
TOKENS = (END_OF_TEXT, TURN_START, TURN_END, THINK, THINK_END)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set content = message['content'] or '' -%}
{%- if message['role'] == 'assistant' and '</think>' in content -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_PIECE = re.compile(r"<\|endoftext\|>|<\|im_start\|>|<\|im_end\|>|</?think>|[A-Za-z]+|[^A-Za-z]", re.DOTALL)


def prompt_text(prompt: str) -> str:
    """What the chat template makes of one user message, ready for the answer."""
    return f"{TURN_START}user\n{prompt}{TURN_END}\n{TURN_START}assistant\n"


def completion_text(problem: Problem) -> str:
    """What the model should write after ``prompt_text``."""
    return f"{THINK}{problem.thought}{THINK_END}{problem.answer}{TURN_END}"


def train_tokenizer() -> Tokenizer:
    """Trains the tokenizer on generated text: the same one every time. Takes a second or two."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\P{L}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    # the markers of a thought are text that a client reads, not control tokens that detokenising drops
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in (THINK, THINK_END)])
    return _without_special(tokenizer, (THINK, THINK_END))


def _without_special(tokenizer: Tokenizer, texts: tuple[str, ...]) -> Tokenizer:
    layout = json.loads(tokenizer.to_str())
    for token in layout["added_tokens"]:
        token["special"] = token["content"] not in texts
    return Tokenizer.from_str(json.dumps(layout, ensure_ascii=False))


def _corpus() -> list[str]:
    """Problems of every family and bucket, and each symbol and account often enough to become one token."""
    texts = [" ".join(SYMBOLS), " ".join(ACCOUNTS)] * 100
    for index in range(1500):
        problem = make_problem(FIRST_TRAINING_SEED, index, BUCKETS[0])
        question = problem.prompt.rpartition("\n")[2]
        texts.append(f"user\n{question}\nassistant\n{problem.thought}{problem.answer}")
    texts.append(make_problem(FIRST_TRAINING_SEED, 0, BUCKETS[2]).prompt)
    texts += ["system You are a helpful assistant"] * 20
    random.Random("corpus").shuffle(texts)
    return texts


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes what plain ``transformers.AutoTokenizer`` reads: tokenizer, its configuration and the chat template."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "chat_template": CHAT_TEMPLATE,
    }
    write_atomic(directory / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    write_atomic(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_atomic(directory / "chat_template.jinja", CHAT_TEMPLATE)


@dataclass(frozen=True)
class PieceTable:
    """Token ids of the pieces of generated text. Encodes ASCII text as the tokenizer does, some ten times as fast."""

    pieces: dict[str, tuple[int, ...]]

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``. Raises KeyError for a piece that the generator never writes."""
        pieces = self.pieces
        return [token for piece in _PIECE.findall(text) for token in pieces[piece]]


def piece_table(tokenizer: Tokenizer) -> PieceTable:
    """Reads the table off ``tokenizer``: every ASCII character, special and word that the generator may write."""
    words = {chr(code) for code in range(128)} | set(TOKENS) | _words()
    return PieceTable({word: tuple(tokenizer.encode(word, add_special_tokens=False).ids) for word in sorted(words)})


def _words() -> set[str]:
    words = {*SYMBOLS, *ACCOUNTS, "user", "assistant"}
    for seed in (0, FIRST_TRAINING_SEED):
        for index in range(3000):
            problem = make_problem(seed, index, "short")
            words.update(re.findall(r"[A-Za-z]+", f"{problem.prompt} {problem.thought} {problem.answer}"))
    return words
