"""Texts that are read, and texts that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from labkit.errors import UserError
from labkit.quantizer import calibration
from labkit.quantizer.calibration import fingerprint, from_file, from_ledger, is_ledger, made_up
from labkit.training.ledger import FIRST_TRAINING_SEED, make_problem

SHIPPED = Path(__file__).resolve().parent.parent.parent / "data" / "models" / "ledger-r1"


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def test_a_text_is_cut_into_sequences(text: Path, tokenizer: Any) -> None:
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    found = from_file(text, tokenizer, 5, 64)
    assert [len(each) for each in found] == [64] * 5 and torch.cat(found).tolist() == ids[:320]
    every = from_file(text, tokenizer, 10**6, 64)
    assert len(every) == len(ids) // 64, "fewer than were asked for"


def test_pieces_of_a_large_file_do_not_split_words(
    text: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(text.read_text().split()), encoding="utf-8")
    whole = from_file(lines, tokenizer, 50, 16)
    monkeypatch.setattr(calibration, "_PIECE", 100)
    assert fingerprint(from_file(lines, tokenizer, 50, 16)) == fingerprint(whole)


def test_jsonl_has_texts_or_prompts_parted_by_the_end_token(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "the trade"}\n\n{"prompt": "of account", "id": 3}\n' * 10, encoding="utf-8")
    expected = []
    for words in ("the trade", "of account") * 10:
        expected += [*tokenizer(words, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert torch.cat(from_file(path, tokenizer, 2, 20)).tolist() == expected[:40]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("empty.txt", b"", "is empty"),
        ("empty.jsonl", b"\n\n", "is empty"),
        ("short.txt", b"the trade", "too few for a sequence of 64; give more text, or a smaller --length"),
        ("model.bin", b"\xff\xfe\x00\x81" * 50, "no text in UTF-8"),
        ("zeros.bin", b"\0" * 500, "no text"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: no JSON"),
        ("other.jsonl", b'{"body": "a"}\n', 'no object with a "text" or a "prompt"'),
        ("list.jsonl", b"[1]\n", "no object"),
    ],
)
def test_what_is_no_calibration_text(tmp_path: Path, tokenizer: Any, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        from_file(tmp_path / name, tokenizer, 4, 64)


def test_a_text_that_is_not_there(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        from_file(tmp_path / "none.txt", tokenizer)
    with pytest.raises(UserError, match="cannot be read"):
        from_file(tmp_path, tokenizer)


def test_ledger_models_are_known_by_their_tokenizer_and_see_training_documents_of_every_length(tokenizer: Any) -> None:
    shipped = AutoTokenizer.from_pretrained(SHIPPED)
    assert is_ledger(shipped) and not is_ledger(tokenizer)
    found = from_ledger(shipped, 6)
    lengths = [len(each) for each in found]
    assert all(length > 500 for length in lengths) and max(lengths[:3]) > 2048 and min(lengths[:3]) < 768
    assert fingerprint(found) == fingerprint(from_ledger(shipped, 6)) != fingerprint(from_ledger(shipped, 6, seed=1))
    assert [len(each) for each in from_ledger(shipped, 3, length=64)] == [64] * 3
    texts = [shipped.decode(each) for each in found]
    assert all("<think>" in each and "counts " in each for each in texts)
    # evaluation asks of seeds below this one; not even the first problems of training are these documents
    asked = make_problem(FIRST_TRAINING_SEED - 1, 0, "short").prompt
    assert not any(asked[:100] in each for each in texts)


def test_made_up_tokens_and_fingerprints() -> None:
    found = made_up(50, 3, 40, seed=2)
    assert len(found) == 3 and all(0 <= int(each.min()) and int(each.max()) < 50 for each in found)
    changed = [each.clone() for each in found]
    changed[2][39] += 1
    assert fingerprint(found) != fingerprint(changed) != fingerprint([torch.cat(changed)])
    assert json.loads(json.dumps(fingerprint(found))) == fingerprint(made_up(50, 3, 40, seed=2))
