from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from labkit.errors import UserError
from labkit.training import modeldir
from labkit.training.modeldir import read_model, write_model
from labkit.training.network import Network, Shape
from labkit.training.tokenizer import train_tokenizer

SHAPE = Shape(hidden=32, layers=2, heads=2, kv_heads=1, intermediate=48, context=128)
TOKENIZER = train_tokenizer()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(Network(SHAPE, seed=1), TOKENIZER, tmp_path / "model")
    return tmp_path / "model"


def test_what_is_written_comes_back_in_bfloat16(model: Path) -> None:
    network, tokenizer = read_model(model)
    assert network.shape == SHAPE and tokenizer.to_str() == TOKENIZER.to_str()
    for (name, value), (other, expected) in zip(
        network.named_parameters(), Network(SHAPE, seed=1).named_parameters(), strict=True
    ):
        assert name == other and torch.equal(value, expected.bfloat16())
    assert network.cos.dtype == torch.float32
    assert (model / "model.safetensors").stat().st_mode & 0o444 == 0o444
    with safe_open(model / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_parts_that_transformers_writes_are_read_and_removed_by_the_next_writing(model: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "parts", max_shard_size="60KB")
    parts = tmp_path / "parts"
    (parts / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    assert len(list(parts.glob("model-*-of-*.safetensors"))) > 1
    whole, _ = read_model(model)
    split, _ = read_model(parts)
    assert all(torch.equal(value, split.state_dict()[name]) for name, value in whole.state_dict().items())
    write_model(split, TOKENIZER, parts)
    assert [file.name for file in parts.glob("model*")] == ["model.safetensors"]


def test_a_directory_is_no_model_while_it_is_written_over(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(modeldir, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_model(Network(SHAPE, seed=2), TOKENIZER, model)
    with pytest.raises(UserError, match="no model"):
        read_model(model)
    assert not list(model.glob(".*partial"))


def test_damaged_directories_are_named_with_what_is_wrong(model: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config.json"):
        read_model(tmp_path)
    with pytest.raises(UserError, match="tied"):
        read_model(tiny_model)
    os.truncate(model / "model.safetensors", 1000)
    with pytest.raises(UserError, match="damaged"):
        read_model(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="Missing key"):
        read_model(model)
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_model(model)
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2", "tie_word_embeddings": True}))
    with pytest.raises(UserError, match="vocab_size"):
        read_model(model)
