"""Deployments that write in turn, and the rule of C28."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from labkit.errors import UserError
from labkit.experiments import decode_speed
from labkit.experiments.decode_speed import FIRST
from labkit.experiments.intervals import digits
from labkit.experiments.weights import GPTQ, GPTQ_HEAD, ORIGINAL, RTN

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 300, "hidden_size": 128,
    "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "eos_token_id": 2, "dtype": "float32",
}  # fmt: skip


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the place of data/shapes: one of a small model, "small"."""
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setattr("labkit.bench.cli.SHAPES", tmp_path)
    return tmp_path


def test_a_shape_with_random_weights_is_quantised_and_all_take_turns(shapes: Path, tmp_path: Path) -> None:
    calibration = {"sequences": 1, "length": 32}
    timed = decode_speed.contenders("unused", "cpu", tmp_path / "out" / "gptq", "small", calibration)
    assert list(timed) == [FIRST, ORIGINAL, RTN, GPTQ] and timed[GPTQ].model == str(tmp_path / "out" / "small")
    said: list[str] = []
    table = decode_speed.time_decoding(timed, [1, 2], 6, 4, 3, alone=[FIRST], say=said.append)
    counted = table.groupby(["way", "x"]).size().to_dict()
    assert counted == {(FIRST, 1): 6} | {(way, x): 6 for way in (ORIGINAL, RTN, GPTQ) for x in (1, 2)}
    assert (table["seconds"] > 0).all() and len(said) == 2
    # transformers counts the same weights, and on a CPU 4 bits are multiplied out
    assert table["bytes"].nunique() == 1
    verdict = decode_speed.judge_speed(table, "small")
    assert "random weights of the shape of small" in verdict.reason
    assert verdict.outcome == "not testable here" and "multiplied out" in verdict.reason and FIRST in verdict.reason
    assert len(verdict.evidence) == 3


def test_a_shape_that_is_none_is_refused(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="small"):
        decode_speed.contenders("unused", "cpu", tmp_path / "gptq", "large")


def made_up(gptq_s: float, first_s: float = 8.0) -> pd.DataFrame:
    """Batches of 1 and 4, six repeats: the original takes 1 s, and 2 s."""
    times = {(FIRST, 1): first_s, (ORIGINAL, 1): 1.0, (ORIGINAL, 4): 2.0, (GPTQ, 1): gptq_s, (GPTQ, 4): 2.0}
    rows = [
        (way, x, turn, seconds, 25 if way == GPTQ else 100, "") for (way, x), seconds in times.items()
        for turn in range(6)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["way", "x", "round", "seconds", "bytes", "note"])


@pytest.mark.parametrize(("gptq_s", "outcome"), [(0.25, "confirmed"), (0.5, "partly"), (1.0, "refuted")])
def test_the_same_engine_decides_and_the_first_deployment_is_named(gptq_s: float, outcome: str) -> None:
    verdict = decode_speed.judge_speed(made_up(gptq_s))
    assert verdict.outcome == outcome and f"it is {digits(8 / gptq_s)}× as fast" in verdict.reason
    assert [item.value for item in verdict.evidence] == [1 / gptq_s, 1.0, 8 / gptq_s]


def test_a_head_of_8_bits_stands_beside_and_decides_nothing() -> None:
    table = made_up(0.5)
    head = table[table["way"] == GPTQ].assign(way=GPTQ_HEAD, seconds=0.25)
    verdict = decode_speed.judge_speed(pd.concat([table, head]))
    assert verdict.outcome == "partly" and [item.value for item in verdict.evidence] == [2.0, 1.0, 4.0, 16.0]


def test_tokens_per_second_are_those_of_all_requests_of_a_batch() -> None:
    table = decode_speed.tokens_per_second(made_up(0.5), new_tokens=10)
    found = {(name, batch): value for name, batch, value in table[["name", "batch", "value"]].to_numpy()}
    assert found[ORIGINAL, 4] == 4 * 10 / 2 and found[GPTQ, 1] == 10 / 0.5
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
