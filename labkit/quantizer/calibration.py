"""Text that the Hessians are taken from, as sequences of tokens: a file of the user's, or ledger problems."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from labkit.errors import UserError
from labkit.training.documents import LENGTHS, make_document
from labkit.training.ledger import ACCOUNTS, BUCKETS, FIRST_TRAINING_SEED, SYMBOLS
from labkit.training.tokenizer import TOKENS, VOCABULARY, piece_table

SEQUENCES, LENGTH = 128, 2048
SHORTEST = 16
_PIECE = 2**18
"""Characters of a file that are tokenised at a time: no more of a large file is read than is used."""
_FIELDS = ("text", "prompt")


def from_file(path: Path, tokenizer: Any, sequences: int = SEQUENCES, length: int = LENGTH) -> list[Tensor]:
    """The first ``sequences`` times ``length`` tokens of a text, cut into sequences; fewer if the text is shorter.

    A file named .jsonl holds a JSON object a line, with the text in "text" or "prompt"; texts are parted by the
    tokenizer's end-of-sequence token where it has one. tokenizer: of ``transformers``. Returns [length] int64 each.
    Raises UserError for a file that is not there, is empty, no text, or too short for a single sequence.
    """
    ids: list[int] = []
    for text, ends in _pieces(path):
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if ends and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if len(ids) >= sequences * length:
            break
    if not ids:
        raise UserError(f"{path} is empty; give text like what the model will be used for")
    if len(ids) < length:
        raise UserError(
            f"{path} has {len(ids):,} tokens, too few for a sequence of {length:,}; give more text, or a "
            "smaller --length"
        )
    whole = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return list(whole[:sequences])


def _pieces(path: Path) -> Iterator[tuple[str, bool]]:
    """Texts, and whether a document ends with each."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            if path.suffix == ".jsonl":
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _document(path, number, line), True
                return
            while text := file.read(_PIECE):
                # a word that is cut in two would be other tokens than the word
                text += file.readline(_PIECE)
                if "\0" in text:
                    raise UserError(f"{path} is no text: it holds characters of code 0; give a file of UTF-8 text")
                yield text, False
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}); convert it") from error
    except OSError as error:
        raise UserError(f"the calibration text {path} cannot be read: {error.strerror}") from error


def _document(path: Path, number: int, line: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number}: no JSON ({error})") from error
    texts = [found[field] for field in _FIELDS if isinstance(found, dict) and isinstance(found.get(field), str)]
    if not texts:
        raise UserError(f'{path}, line {number}: no object with a "text" or a "prompt"')
    return str(texts[0])


def is_ledger(tokenizer: Any) -> bool:
    """Whether this ``transformers`` tokenizer is that of the project's own models."""
    if len(tokenizer) != VOCABULARY:
        return False
    known = tokenizer.get_vocab()
    return all(word in known for word in (*TOKENS, *SYMBOLS, *ACCOUNTS))


def from_ledger(tokenizer: Any, sequences: int = SEQUENCES, length: int | None = None, seed: int = 0) -> list[Tensor]:
    """Training documents, of all lengths in turn: a blotter, then questions and answers. None that evaluation asks.

    ``length`` cuts off what is longer; None cuts nothing. Returns [up to length] int64 each.
    """
    table = piece_table(tokenizer.backend_tokenizer)
    found = []
    for number in range(sequences):
        bucket = BUCKETS[number % len(BUCKETS)]
        rng = random.Random(f"calibration/{FIRST_TRAINING_SEED + seed}/{number}")
        tokens, _ = make_document(rng, table, bucket, LENGTHS[bucket])
        found.append(torch.tensor(tokens[:length]))
    return found


def made_up(vocabulary: int, sequences: int = SEQUENCES, length: int = LENGTH, seed: int = 0) -> list[Tensor]:
    """Random tokens, for weights that are made up: only the time and the memory are of interest then."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(vocabulary, (sequences, length), generator=generator))


def fingerprint(sequences: list[Tensor]) -> str:
    """Changes with any token."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(8, "little"))
        digest.update(sequence.to(torch.int64).numpy().tobytes())
    return digest.hexdigest()
