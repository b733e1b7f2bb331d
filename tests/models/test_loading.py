from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from labkit.errors import UserError
from labkit.models.decoder import Decoder
from labkit.models.loading import (
    empty_layer,
    load_model,
    load_model_for_generate,
    load_tokenizer,
    open_checkpoint,
    read_weights,
)
from labkit.models.parallel import Parallel
from labkit.models.weights import checkpoint_places

CPU = torch.device("cpu")
SHAPES = Path(__file__).resolve().parents[2] / "data" / "shapes"


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path: Path, change: Any) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def load(path: Path) -> Any:
    return load_model(open_checkpoint(str(path)), CPU, torch.float32)


def test_every_weight_is_loaded(tiny_model: Path) -> None:
    """No parameter keeps what memory happened to hold: all values are those of the checkpoint, each once."""
    ours = torch.cat([p.flatten() for p in load(tiny_model).parameters()]).sort().values
    theirs = torch.cat([p.flatten() for p in load_file(tiny_model / "model.safetensors").values()]).sort().values
    assert torch.equal(ours, theirs)


def test_sharded_and_tied_checkpoints(tiny_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    single = load(tiny_model).state_dict()
    for name, weight in load(tmp_path / "sharded").state_dict().items():
        assert torch.equal(weight, single[name])

    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    tied = load(tmp_path / "tied")
    assert tied.head is tied.embed
    assert torch.equal(tied.head, model.model.embed_tokens.weight)


def test_eos_may_be_one_or_many_and_generation_config_wins(copy: Path) -> None:
    assert open_checkpoint(str(copy)).eos_token_ids == {2}
    edit_json(copy / "generation_config.json", eos_token_id=[2, 7])
    assert open_checkpoint(str(copy)).eos_token_ids == {2, 7}
    (copy / "generation_config.json").unlink()
    edit_json(copy / "config.json", eos_token_id=9)
    assert open_checkpoint(str(copy)).eos_token_ids == {9}
    edit_json(copy / "config.json", eos_token_id=None)
    assert open_checkpoint(str(copy)).eos_token_ids == frozenset()


def test_pickles_are_refused_by_both_engines(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pickles"):
        load(copy)
    with pytest.raises(UserError, match="pickles"):
        load_model_for_generate(open_checkpoint(str(copy)), CPU, torch.float32, "sdpa")


def test_wrong_tensors_are_named(copy: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    kept = load_file(copy / "model.safetensors")[name]
    edit_weights(copy, lambda weights: weights.pop(name))
    with pytest.raises(UserError, match=f"lacks 1 tensors, such as {name}"):
        load(copy)
    edit_weights(copy, lambda weights: weights.update({name: kept[:-1].clone()}))
    with pytest.raises(UserError, match=rf"{name} is \[31, 64\], config.json makes it \[32, 64\]"):
        load(copy)
    edit_weights(copy, lambda weights: weights.update({name: kept, "model.layers.7.extra": torch.zeros(1)}))
    with pytest.raises(UserError, match="unexpected tensor model.layers.7.extra"):
        load(copy)


def test_broken_directories_are_explained(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        load(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        load(copy)
    edit_json(copy / "config.json", architectures=["GPT2LMHeadModel"])
    with pytest.raises(UserError, match="GPT2LMHeadModel; supported are: Qwen2ForCausalLM"):
        open_checkpoint(str(copy))
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        open_checkpoint(str(copy))
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match="is missing"):
        open_checkpoint(str(copy))
    with pytest.raises(UserError, match="no model directory"):
        open_checkpoint(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_hub_id_that_cannot_be_had_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the hub does not give it"):
        open_checkpoint("nobody/no-such-model")


def test_missing_shards_are_named(tiny_model: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(UserError, match=f"lacks the shards {shards[1].name}"):
        load(tmp_path / "sharded")


def only_config(source: Path, target: Path) -> Path:
    target.mkdir()
    shutil.copy(source / "config.json", target)
    return target


def test_random_weights_need_no_files_and_are_the_same_every_time(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(only_config(tiny_model, tmp_path / "shape")))
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        load_model(checkpoint, CPU, torch.float32)
    model = load_model(checkpoint, CPU, torch.float32, random_weights=True)
    again = load_model(checkpoint, CPU, torch.float32, random_weights=True).state_dict()
    assert model.state_dict().keys() == load(tiny_model).state_dict().keys()
    seen = set()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again[name])
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            assert 0.015 < weight.std() < 0.025 and abs(weight.mean()) < 0.006, name
            seen.add(weight.flatten()[0].item())
    assert len(seen) == sum("norm" not in name for name in again), "no two tensors are alike"


def test_random_weights_for_generate(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(only_config(tiny_model, tmp_path / "shape")))
    model = load_model_for_generate(checkpoint, CPU, torch.bfloat16, "sdpa", random_weights=True)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.generate(torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False).shape == (1, 5)


@pytest.mark.parametrize("size, parameters", [("1.5b", 1_777_088_000), ("7b", 7_615_616_512)])
def test_shapes_that_are_shipped_have_the_published_number_of_parameters(size: str, parameters: int) -> None:
    shape = open_checkpoint(str(SHAPES / f"deepseek-r1-distill-qwen-{size}")).shape
    with torch.device("meta"):
        model = Decoder(shape, Parallel())
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    places = checkpoint_places(shape, Parallel())
    assert sum(math.prod(place.shape) for place in places.values()) == parameters


def test_layers_for_predicting_more_tokens_are_not_loaded(make_case: Any, tmp_path: Path) -> None:
    """Published DeepSeek-V3 has one past its last layer."""
    case = make_case("deepseek-v3")
    path = Path(shutil.copytree(case.path, tmp_path / "copy"))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.3.eh_proj.weight"] = "more.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"model.layers.3.eh_proj.weight": torch.zeros(2)}, path / "more.safetensors")
    load(path)
    edit_json(path / "config.json", num_nextn_predict_layers=0)
    with pytest.raises(UserError, match="unexpected tensor model.layers.3.eh_proj.weight"):
        load(path)


def test_what_chooses_experts_stays_float32(make_case: Any) -> None:
    model = load_model(open_checkpoint(str(make_case("deepseek-v3").path)), CPU, torch.bfloat16)
    dtypes = {name: buffer.dtype for name, buffer in model.named_buffers()}
    assert set(dtypes) == {"cos_sin", "layers.1.mlp.correction", "layers.2.mlp.correction"}
    assert set(dtypes.values()) == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["qwen3", "deepseek-v3"])
def test_a_layer_alone_is_that_of_the_whole_model(make_case: Any, name: str) -> None:
    checkpoint = open_checkpoint(str(make_case(name).path))
    whole = load_model(checkpoint, CPU, torch.bfloat16).state_dict()
    prefix = "layers.1."
    layer = empty_layer(checkpoint.shape, 1, CPU, torch.bfloat16)
    targets = {prefix + key: value for key, value in layer.state_dict(keep_vars=True).items()}
    places = {
        key: place
        for key, place in checkpoint_places(checkpoint.shape, Parallel()).items()
        if place.parameter.startswith(prefix)
    }
    read_weights(checkpoint, targets, places)
    assert targets.keys() == {key for key in whole if key.startswith(prefix)}
    for key, value in targets.items():
        assert value.dtype == whole[key].dtype and torch.equal(value, whole[key])
    assert not any(parameter.requires_grad for parameter in layer.parameters())
