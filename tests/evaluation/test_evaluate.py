"""`labkit evaluate` on models of every kind: the shipped one, the same through the engine, and one of other tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from labkit.cli import app
from labkit.errors import UserError
from labkit.evaluation.evaluate import Wishes, evaluate, is_ledger_model, paired
from labkit.evaluation.show import tables
from labkit.training.ledger import make_problem
from labkit.training.modeldir import write_model
from labkit.training.network import Network, Shape
from labkit.training.tokenizer import train_tokenizer

MODEL = Path(__file__).resolve().parents[2] / "data" / "models" / "ledger-r1"


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with a head of its own, equal to the embedding: the same answers, but by the engine."""
    torch.set_num_threads(1)
    directory: Path = tmp_path_factory.mktemp("models") / "untied"
    shutil.copytree(MODEL, directory, ignore=shutil.ignore_patterns("training", "*.safetensors"))
    tensors = load_file(MODEL / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((MODEL / "config.json").read_text()) | {"tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def beginner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger model that has learnt nothing."""
    directory: Path = tmp_path_factory.mktemp("models") / "beginner"
    write_model(Network(Shape(hidden=32, layers=1, heads=2, kv_heads=1, intermediate=48)), train_tokenizer(), directory)
    return directory


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of other tokens, bytes that is, without a chat template."""
    directory: Path = tmp_path_factory.mktemp("models") / "stranger"
    tokenizer = Tokenizer(models.BPE({chr(code): code for code in range(128)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1500, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def test_the_engine_gives_the_answers_of_the_trainers_own_network(untied: Path) -> None:
    assert is_ledger_model(str(MODEL)) and not is_ledger_model(str(untied))
    wishes = Wishes(problems=6, buckets=("short",), seed=3, reference=str(MODEL))
    account = evaluate(str(untied), wishes, say=silent)
    assert account["verdicts"] == account["reference"]["verdicts"] and account["buckets"]["short"]["right"] >= 5
    scores = account["completions"]["short"]
    assert scores["agreement"] == 1.0 and abs(scores["divergence"]) < 1e-5 and scores["perplexity"] < 1.01
    pair = account["paired"]["all"]
    assert pair["both"] == account["buckets"]["short"]["right"] and pair["p"] == 1.0 and pair["difference"] == 0.0


def test_a_better_and_a_worse_model_are_held_against_each_other(beginner: Path, tmp_path: Path) -> None:
    result, text = tmp_path / "deep" / "result.json", tmp_path / "page.txt"
    text.write_text(Path(__file__).read_text()[:2500])
    wishes = Wishes(problems=6, buckets=("short",), reference=str(MODEL), text=text)
    account = evaluate(str(beginner), wishes, result=result, say=silent)
    assert json.loads(result.read_text()) == account and account["model"] == "beginner"
    verdicts = account["reference"]["verdicts"]["short"]
    right = verdicts.count("1")
    assert (account["paired"]["short"]["reference_only"], account["verdicts"]["short"]) == (right, "0" * 6)
    assert account["paired"]["short"]["p"] == 2 / 2**right
    assert account["completions"]["short"]["reference_loss"] < 0.01 < account["completions"]["short"]["loss"]
    assert account["text"]["file"] == "page.txt" and account["text"]["tokens"] > 1000
    shown = tables(account)
    assert [table[0][0] for table in shown][1:3] == ["right completions", "against ledger-r1"]
    assert all(len(row) == len(table[0]) for table in shown for row in table)
    assert str(tmp_path) not in result.read_text() and str(MODEL.parent) not in result.read_text()


def test_an_account_is_a_reference_as_good_as_the_model(beginner: Path, tmp_path: Path) -> None:
    few = Wishes(problems=3, buckets=("short",))
    evaluate(str(MODEL), few, result=tmp_path / "teacher.json", say=silent)
    again = Wishes(problems=5, buckets=("short",), reference=str(tmp_path / "teacher.json"))
    account = evaluate(str(beginner), again, say=silent)
    assert account["paired"]["all"]["reference_only"] + account["paired"]["all"]["neither"] == 3
    other = Wishes(problems=3, buckets=("short",), seed=5, reference=str(tmp_path / "teacher.json"))
    with pytest.raises(UserError, match="seed 0, not 5"):
        evaluate(str(beginner), other, say=silent)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="no verdicts"):
        evaluate(str(beginner), Wishes(reference=str(tmp_path / "other.json")), say=silent)


def test_a_model_of_other_tokens_is_asked_and_reads_but_agrees_with_no_one(stranger: Path, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("It was a dark and stormy night. " * 60)
    said: list[str] = []
    wishes = Wishes(problems=0, text=text, reference=str(MODEL))
    account = evaluate(str(stranger), wishes, say=said.append)
    assert account["text"]["window"] == 1500 and account["text"]["tokens"] == 32 * 60 - 2
    assert "agreement" not in account["text"] and any("no agreement" in line for line in said)
    assert "tokens are others" in account["reference"]["note"] and "buckets" not in account
    asked = evaluate(str(stranger), Wishes(problems=2, buckets=("short",), max_tokens=4), say=silent)
    assert asked["verdicts"] == {"short": "00"} and len(asked["wrong"][0]["wrote"].replace(" ", "")) <= 4


def test_verdicts_are_paired_by_problem_and_bucket() -> None:
    ours = {"verdicts": {"short": "1101", "long": "00"}}
    theirs = {"verdicts": {"short": "1011", "medium": "1", "long": "011"}}
    found = paired(ours, theirs)
    assert set(found) == {"short", "long", "all"}
    assert [found["short"][key] for key in ("both", "model_only", "reference_only", "neither")] == [2, 1, 1, 0]
    assert [found["all"][key] for key in ("both", "model_only", "reference_only", "neither")] == [2, 1, 2, 1]


@pytest.mark.parametrize(
    ("wishes", "named"),
    [
        (Wishes(problems=0), "nothing to find out"),
        (Wishes(buckets=("huge",)), "no bucket 'huge'"),
        (Wishes(max_tokens=0), "--max-tokens"),
        (Wishes(text=Path("nowhere.txt")), "no text file"),
        (Wishes(reference="./nowhere"), "no model directory './nowhere'"),
    ],
)
def test_impossible_wishes_are_named_before_any_work(wishes: Wishes, named: str) -> None:
    with pytest.raises(UserError, match=named):
        evaluate(str(MODEL), wishes, say=silent)


def test_the_command_prints_every_table(beginner: Path, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    arguments = ["evaluate", str(beginner), "--problems", "2", "--buckets", "short", "--device", "cpu"]
    ran = CliRunner().invoke(app, [*arguments, "--reference", str(beginner), "--result", str(result)])
    assert ran.exit_code == 0, ran.output
    for title in ("family", "right completions", "against beginner", "McNemar", "same first choice"):
        assert title in ran.output
    assert json.loads(result.read_text())["paired"]["all"]["neither"] == 2
    assert make_problem(0, 0, "short").prompt not in ran.output
