"""Models split over processes against the same models whole."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from labkit.errors import UserError
from labkit.models.loading import load_model, open_checkpoint
from labkit.models.parallel import Parallel
from labkit.models.shape import ModelShape
from labkit.models.weights import checkpoint_places

CPU = torch.device("cpu")


def run_ranks(drive: ModuleType, tmp_path: Path, world: int, **job: Any) -> list[Any]:
    """What each of ``world`` processes found."""
    ranks = []
    for rank in range(world):
        files = {"rendezvous": str(tmp_path / "rendezvous"), "out": str(tmp_path / f"{rank}.json")}
        argument = json.dumps(job | files | {"rank": rank, "world": world})
        ranks.append(subprocess.Popen([sys.executable, drive.__file__, argument], stderr=subprocess.PIPE))
    for process in ranks:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors.decode()
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]


def test_two_processes_answer_as_one_does(make_case: Any, drive: ModuleType, tmp_path: Path) -> None:
    """Of qwen2-yarn both ranks hold the one key head, of llama-bias one rank alone adds the bias of the output."""
    cases = [make_case(name) for name in ("qwen2", "qwen2-yarn", "llama-bias", "deepseek-v3")]
    paths = [str(case.path) for case in cases]
    ranks = run_ranks(drive, tmp_path, 2, checkpoints=paths, prompts=cases[0].prompts, tokens=64, chunks=[40])
    for i, case in enumerate(cases):
        whole = load_model(open_checkpoint(paths[i]), CPU, torch.float32)
        for rank in ranks:
            assert rank[i]["answers"] == case.answers
            assert rank[i]["parameters"] < 0.85 * sum(parameter.numel() for parameter in whole.parameters())


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "deepseek-v2-lite"])
def test_ranks_of_random_weights_are_parts_of_one_model(make_case: Any, name: str) -> None:
    checkpoint = open_checkpoint(str(make_case(name).path))
    whole, first, second = (
        load_model(checkpoint, CPU, torch.float32, parallel, random_weights=True).state_dict()
        for parallel in (Parallel(), Parallel(0, 2), Parallel(1, 2))
    )
    split = [key for key in whole if whole[key].shape != first[key].shape]
    assert len(split) >= 4 * checkpoint.shape.layers
    for key in whole.keys() - split:
        assert torch.equal(first[key], whole[key]) and torch.equal(second[key], whole[key])
    for key in split:
        if key.endswith(("out.weight", "down.weight", ".down")):
            assert torch.equal(torch.cat((first[key], second[key]), dim=-1), whole[key])


def test_parts_cover_every_tensor() -> None:
    sizes = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    shape = ModelShape.from_config(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=2))
    places = [checkpoint_places(shape, Parallel(rank, 4)) for rank in range(4)]
    for name, place in places[0].items():
        covered = torch.zeros(place.shape)
        for rank in places:
            covered[rank[name].part] += 1
        whole = place.parameter in ("embed", "head") or "norm" in name
        assert (covered == (4 if whole else 2 if "k_proj" in name or "v_proj" in name else 1)).all(), name


def test_what_cannot_be_split_is_refused() -> None:
    shape = ModelShape.from_config(LlamaConfig(num_attention_heads=6, num_key_value_heads=6, hidden_size=384))
    assert Parallel().share(shape) is shape
    assert Parallel(1, 2).share(shape).kv_heads == 3
    with pytest.raises(UserError, match="6 attention heads cannot be split over 4"):
        Parallel(0, 4).share(shape)
    with pytest.raises(UserError, match="11008 intermediate size cannot be split over 3"):
        Parallel(0, 3).share(shape)
    with pytest.raises(UserError, match="3 key heads can neither be split over 2 processes nor repeated"):
        Parallel(0, 2).share(replace(shape, kv_heads=3))
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        Parallel(2, 2)
