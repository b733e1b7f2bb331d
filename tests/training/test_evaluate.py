from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from labkit.errors import UserError
from labkit.training import evaluate as module
from labkit.training.evaluate import evaluate, share_text, table_rows, wilson
from labkit.training.ledger import FAMILIES, FIRST_TRAINING_SEED, Problem, make_problem
from labkit.training.modeldir import write_model
from labkit.training.network import Network, Shape
from labkit.training.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("untrained")
    write_model(Network(Shape(hidden=32, layers=1, heads=2, kv_heads=1, intermediate=48)), train_tokenizer(), directory)
    return directory


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_the_published_ones(right: int, asked: int, low: float, high: float) -> None:
    share = wilson(right, asked)
    assert (round(share.low, 4), round(share.high, 4)) == (low, high) and share.value == right / asked
    other = wilson(asked - right, asked)
    assert (other.low, other.high) == pytest.approx((1 - share.high, 1 - share.low))


def test_an_untrained_model_is_right_never_and_its_mistakes_are_kept(untrained: Path, tmp_path: Path) -> None:
    result = tmp_path / "deep" / "result.json"
    account = evaluate(untrained, 5, ["short", "medium", "short"], result=result, say=lambda line: None)
    assert json.loads(result.read_text()) == account
    assert account["dtype"] == "float32" and account["machine"]["device"] == "cpu"  # type: ignore[index]
    assert [(name, share["right"], share["asked"]) for name, share in account["buckets"].items()] == [  # type: ignore[attr-defined]
        ("short", 0, 5),
        ("medium", 0, 5),
    ]
    wrong = account["wrong"]
    assert isinstance(wrong, list) and len(wrong) == 10
    for mistake in wrong:
        problem = make_problem(0, mistake["index"], mistake["bucket"])
        assert mistake["right"] == f"<think>{problem.thought}</think>{problem.answer}" and mistake["wrote"]


def test_right_answers_are_counted_by_bucket_and_family(untrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(_: object, __: object, problems: list[Problem], ___: object) -> Iterator[tuple[Problem, str]]:
        for problem in problems:
            yield problem, "<think>?</think>" + (problem.answer if problem.family != "net" else "no idea")

    monkeypatch.setattr(module, "_answers", answers)
    account = evaluate(untrained, 60, ["short", "long"], seed=4, say=lambda line: None)
    for bucket in ("short", "long"):
        families = [make_problem(4, index, bucket).family for index in range(60)]
        assert account["buckets"][bucket]["right"] == 60 - families.count("net")  # type: ignore[index]
        for family in FAMILIES:
            share = account["families"][bucket][family]  # type: ignore[index]
            assert (share["right"], share["asked"]) == (
                families.count(family) * (family != "net"),
                families.count(family),
            )
    rows = table_rows(account)
    assert rows[0] == ("family", "short", "long") and [row[0] for row in rows[1:]] == [*FAMILIES, "all"]
    assert rows[2][1].startswith("0/") and rows[1][2].endswith("to 100.0)")


def test_shares_read_as_counts_percent_and_interval() -> None:
    share = {"right": 974, "asked": 1000, "share": 0.974, "low": 0.96218, "high": 0.98219}
    assert share_text(share) == "974/1000  97.4 % (96.2 to 98.2)" and share_text(None) == "–"


def test_progress_names_the_place_and_the_time_left(untrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REPORT_EVERY_S", 0.0)
    said: list[str] = []
    evaluate(untrained, 3, ["short"], say=said.append)
    assert [line.split(",")[0] for line in said] == ["short 1/3", "short 2/3", "short 3/3"]
    assert said[-1].endswith("about 0 s left")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"buckets": ["tiny"]}, "short, medium, long"),
        ({"problems": 0}, "--problems"),
        ({"seed": FIRST_TRAINING_SEED}, "training draws"),
        ({"seed": -1}, "--seed"),
        ({"device": "cuda:7"}, "CUDA|cuda"),
        ({"device": "tpu"}, "no device 'tpu'"),
    ],
)
def test_impossible_wishes_are_named(untrained: Path, arguments: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        evaluate(untrained, **{"problems": 1, **arguments})  # type: ignore[arg-type]
