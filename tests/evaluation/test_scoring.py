from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from labkit.errors import UserError
from labkit.evaluation import scoring
from labkit.evaluation.scoring import Passage, Scorer, read_text, score, windows

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 2,
    "tie_word_embeddings": False, "initializer_range": 0.4,
}  # fmt: skip
PASSAGES = [Passage([5, 9, 8], 1), Passage([(7 * i) % 57 + 3 for i in range(50)], 40), Passage([1, 2, 3, 4] * 9, 1)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two random models that transformers wrote, of one vocabulary."""
    directory = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "other")):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(directory / name)
    return directory / "one", directory / "other"


def numpy_logs(model: Path, passage: Passage) -> np.ndarray:
    """Log-probabilities [predicted, vocabulary] by transformers, the softmax by numpy."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = network(torch.tensor([passage.ids])).logits[0].double().numpy()
    logits = logits[passage.start - 1 : -1]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("step_tokens", [4096, 40])
def test_scores_are_those_of_transformers_and_numpy(
    models: tuple[Path, Path], step_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_STEP_TOKENS", {"cpu": step_tokens})
    monkeypatch.setattr(scoring, "_ROWS", 7)
    one, other = (Scorer(str(model), "cpu", torch.float32) for model in models)
    read: list[int] = []
    found = score(one, PASSAGES, other, read.append).account(compared=True)
    ours = np.concatenate([numpy_logs(models[0], passage) for passage in PASSAGES])
    theirs = np.concatenate([numpy_logs(models[1], passage) for passage in PASSAGES])
    targets = np.concatenate([passage.ids[passage.start :] for passage in PASSAGES])
    rows = np.arange(len(targets))
    assert found["tokens"] == len(targets) == 2 + 10 + 35 and sum(read) == 3 + 50 + 36
    assert found["loss"] == pytest.approx(-ours[rows, targets].mean(), rel=1e-4)
    assert found["perplexity"] == pytest.approx(np.exp(-ours[rows, targets].mean()), rel=1e-3)
    assert found["reference_loss"] == pytest.approx(-theirs[rows, targets].mean(), rel=1e-4)
    assert found["divergence"] == pytest.approx((np.exp(theirs) * (theirs - ours)).sum(-1).mean(), rel=1e-3)
    assert found["agreement"] == (ours.argmax(-1) == theirs.argmax(-1)).mean()


def test_a_model_agrees_with_itself(models: tuple[Path, Path]) -> None:
    model = Scorer(str(models[0]), "cpu", torch.float32)
    found = score(model, PASSAGES, model).account(compared=True)
    assert found["agreement"] == 1.0 and abs(found["divergence"]) < 1e-6 and found["loss"] == found["reference_loss"]
    assert "agreement" not in score(model, PASSAGES).account(compared=False)


def test_a_passage_longer_than_the_context_is_refused(models: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="65 tokens is longer than a model's context of 64"):
        score(Scorer(str(models[0]), "cpu", torch.float32), [Passage([1] * 65, 1)])


def test_a_text_is_cut_into_windows_that_miss_no_token() -> None:
    found = windows(list(range(11)), 4)
    assert [passage.ids for passage in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert windows(list(range(9)), 4)[-1].ids == [4, 5, 6, 7] and windows([3], 4) == []


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"", "is empty"), (b" \n ", "is empty"), (b"\xff\xfe\x00a", "no UTF-8"), (None, "no text file")],
)
def test_a_file_that_is_no_text_is_named(tmp_path: Path, content: bytes | None, named: str) -> None:
    path = tmp_path / "book.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=named):
        read_text(path)
