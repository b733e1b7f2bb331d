"""Models with weights of 4 and 8 bits against transformers with the same weights multiplied out."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import LlamaConfig, Qwen2Config

from labkit.errors import UserError
from labkit.kernels.w4a16 import dequantize, pack_levels
from labkit.models import quantized
from labkit.models.layers import Linear, Norm
from labkit.models.loading import load_model, open_checkpoint
from labkit.models.parallel import Parallel
from labkit.models.quantized import QuantizedLinear, round_to_nearest
from labkit.models.shape import ModelShape, Quantization
from labkit.models.weights import checkpoint_places, random_tensors

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
ONE = "model.layers.0.self_attn.k_proj"
# bits, group size, version of the format
FORMATS = {
    "qwen2": (4, 32, 1),
    "llama3": (4, 64, 2),
    "llama-bias": (4, -1, 1),
    "qwen3": (8, 32, 1),
    "deepseek-v2-lite": (8, 64, 2),
    "deepseek-v2": (4, -1, 2),
    "deepseek-v3": (4, 32, 1),
}


def load(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return load_model(open_checkpoint(str(path)), DEVICE, dtype, **options)


def linears(model: Any) -> dict[str, torch.Tensor]:
    """Every linear map's weight [outputs, inputs], in float32 on the CPU."""
    maps = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    packed = {name: getattr(module, "packed", None) for name, module in maps.items()}
    return {
        name: (dequantize(packed[name], torch.float32) if packed[name] else module.weight).cpu()
        for name, module in maps.items()
    }


def kinds(model: Any) -> set[type]:
    return {type(module) for module in model.modules()} & {Linear, QuantizedLinear}


@pytest.fixture(scope="module")
def written(make_case: Any, gptq: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Qwen2 in 4 bits, groups of 32, and the same multiplied out."""
    found: tuple[Path, Path] = gptq.quantized_copies(make_case("qwen2").path, tmp_path_factory.mktemp("written"))
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_a_gptq_checkpoint_computes_what_its_weights_amount_to(
    make_case: Any, read_case: Callable[[Path], Any], gptq: ModuleType, drive: ModuleType, tmp_path: Path, name: str
) -> None:
    bits, group_size, version = FORMATS[name]
    quantized, plain = gptq.quantized_copies(make_case(name).path, tmp_path, bits, group_size, version)
    case = read_case(plain)
    model = load(quantized)
    assert kinds(model) == ({QuantizedLinear} if bits == 4 else {Linear})
    for ours, theirs in zip(drive.Driver(model, case.prompts).prefill([33, 1, 90]), case.logits, strict=True):
        assert theirs.std() > 1
        torch.testing.assert_close(ours, theirs, atol=5e-4, rtol=1e-4)
    assert drive.Driver(model, case.prompts).greedy(64, [17]) == case.answers
    exact = make_case(name)
    assert case.answers != exact.answers, "the levels matter"


def test_bfloat16_logits_are_as_near_the_truth_as_those_of_the_weights_multiplied_out(
    written: tuple[Path, Path], read_case: Callable[[Path], Any], drive: ModuleType
) -> None:
    case = read_case(written[1])
    truth = torch.cat(case.logits)
    errors = [
        (torch.cat(drive.Driver(load(path, torch.bfloat16), case.prompts).prefill([50, 1])) - truth).square().mean()
        for path in written
    ]
    assert 0 < errors[1] < truth.var()
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("rows", [1, 5])
def test_a_map_that_stays_packed_computes_what_one_multiplied_out_does(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """As where there are kernels: with bias and without, normed and gated."""
    generator = torch.Generator().manual_seed(3)
    weight, x, residual, bias = (
        0.1 * torch.randn(size, generator=generator) for size in ((64, 128), (rows, 128), (rows, 128), (64,))
    )
    norm = Norm(128, 1e-6)
    norm.weight.data = 1 + residual[0]
    maps = []
    for kept_packed in (True, False):
        monkeypatch.setattr(quantized, "has_kernel", lambda *_, kept=kept_packed: kept)
        like = Linear(128, 64, bias=True)
        like.bias.data = bias  # type: ignore[union-attr]
        made = QuantizedLinear(like, CPU, torch.float32)
        made.take(16, pack_levels(*round_to_nearest(weight[16:], 32), None, 32))
        made.take(0, pack_levels(*round_to_nearest(weight[:16], 32), None, 32))
        assert (made.packed is not None) == kept_packed == (made.weight is None)
        maps.append(made)
    packed, plain = maps
    same = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
    same(packed(x), plain(x))
    for each in (residual, None):
        same(packed.of_normed_sum(x, each, norm), plain.of_normed_sum(x, each, norm))
    packed.bias = plain.bias = None
    same(packed.silu_mul_of(x), plain.silu_mul_of(x))
    for each in (residual, None):
        same(packed.silu_mul_of_normed_sum(x, each, norm), plain.silu_mul_of_normed_sum(x, each, norm))


def test_a_map_of_which_a_part_is_not_quantised_is_multiplied_out(
    make_case: Any, gptq: ModuleType, tmp_path: Path
) -> None:
    quantized, plain = gptq.quantized_copies(make_case("qwen2").path, tmp_path, whole=r"0\.self_attn\.q_proj|1\.mlp")
    model, expected = load(quantized), linears(load(plain))
    plain_ones = {name for name, module in model.named_modules() if type(module) is Linear}
    assert plain_ones == {"layers.0.attention.qkv", "layers.1.mlp.gate_up", "layers.1.mlp.down"}
    for name, weight in linears(model).items():
        assert torch.equal(weight, expected[name])


def test_what_writers_leave_beside_is_taken_or_refused(
    written: tuple[Path, Path], gptq: ModuleType, tmp_path: Path
) -> None:
    """Old writers give every linear map a bias of zeros; some leave g_idx out; a head need not be in 16 bits."""
    path = gptq.copy_of(written[0], tmp_path / "copy")
    bias = "model.layers.0.mlp.down_proj.bias"
    gptq.edit(path, **{bias: np.zeros(64, np.float16), f"{ONE}.g_idx": None})
    load(path)
    gptq.edit(path, **{bias: np.ones(64, np.float16)})
    with pytest.raises(UserError, match=f"unexpected tensor {bias}"):
        load(path)
    gptq.edit(path, **{bias: None, "model.layers.0.mlp.down_proj.perm": np.zeros(96, np.int32)})
    with pytest.raises(UserError, match="unexpected tensor model.layers.0.mlp.down_proj.perm"):
        load(path)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({f"{ONE}.scales": None}, rf"lacks the tensor {ONE}\.scales"),
        ({f"{ONE}.qweight": None, f"{ONE}.g_idx": None}, f"unexpected tensor {ONE}|lacks 1 tensors, such as {ONE}"),
        ({f"{ONE}.qweight": np.zeros((16, 32), np.int32)}, r"qweight is \[16, 32\], config.json makes it \[8, 32\]"),
        ({f"{ONE}.scales": np.ones((1, 32), np.float16)}, r"scales is \[1, 32\], config.json makes it \[2, 32\]"),
        ({f"{ONE}.qzeros": np.full((2, 4), 0x77777776, np.int32)}, "qzeros holds other zeros"),
        ({f"{ONE}.g_idx": np.arange(64, dtype=np.int32) % 2}, "g_idx sorts inputs into groups"),
    ],
)
def test_tensors_that_would_be_computed_wrongly_are_refused(
    written: tuple[Path, Path], gptq: ModuleType, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    path = gptq.copy_of(written[0], tmp_path / "copy")
    gptq.edit(path, **changes)
    with pytest.raises(UserError, match=reason):
        load(path)


def test_the_wrong_version_of_the_format_is_noticed(
    written: tuple[Path, Path], gptq: ModuleType, tmp_path: Path
) -> None:
    path = gptq.copy_of(written[0], tmp_path / "copy")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="of the format that config.json names"):
        load(path)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"quant_method": "awq"}, r"quantised weights \(awq\)"),
        ({"quant_method": None}, r"quantised weights \(quantization_config\)"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"is_marlin_format": True}, "checkpoint_format 'marlin'"),
        ({"bits": 3}, "bits 3 are not supported; supported are: 4, 8"),
        ({"bits": None}, "bits None"),
        ({"group_size": 16}, "group_size 16"),
        ({"group_size": "128"}, "group_size '128'"),
        ({"sym": False}, "sym False"),
        ({"pack_dtype": "int16"}, "pack_dtype 'int16'"),
    ],
)
def test_formats_that_cannot_be_read_are_refused_by_their_field(changes: dict[str, Any], reason: str) -> None:
    good = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
    shape = ModelShape.from_config(LlamaConfig(quantization_config=good))
    assert shape.quantization == Quantization(4, 128, zero_stored_less_one=True)
    assert Quantization.from_config(good | {"format": "gptq_v2"}) == Quantization(4, 128, zero_stored_less_one=False)
    with pytest.raises(UserError, match=reason):
        ModelShape.from_config(LlamaConfig(quantization_config=good | changes))


def test_what_is_quantised_already_is_neither_rounded_nor_made_up(written: tuple[Path, Path]) -> None:
    for options in ({"quantization": "int4"}, {"random_weights": True}):
        with pytest.raises(UserError, match="is quantised already"):
            load(written[0], **options)


def rounded(weight: Any, group: int) -> Any:
    """weight [O, I] in float32, rounded in groups to levels from -8 to 7 of a scale that is kept in float16."""
    out = np.empty_like(weight)
    for at in range(0, weight.shape[1], group):
        part = weight[:, at : at + group]
        scale = (np.abs(part).max(axis=1, keepdims=True) * np.float32(2 / 15)).astype(np.float16).astype(np.float32)
        safe = np.where(scale == 0, np.float32(1), scale)
        out[:, at : at + group] = np.clip(np.rint(part / safe), -8, 7) * scale
    return out


@pytest.mark.parametrize("name", ["qwen2", "deepseek-v2-lite"])
def test_weights_are_rounded_in_the_largest_groups_that_divide(make_case: Any, name: str) -> None:
    """Of 64 inputs in one group, of 96 in three."""
    path = make_case(name).path
    model, exact = load(path, quantization="int4"), linears(load(path))
    assert kinds(model) == {QuantizedLinear}
    for layer, weight in linears(model).items():
        group = next(size for size in (128, 64, 32) if weight.shape[1] % size == 0)
        assert np.array_equal(weight.numpy(), rounded(exact[layer].numpy(), group)), layer


def test_rounding_by_hand() -> None:
    weight = torch.tensor([[7.5, -7.5, 2.4, 0.0], [0.0, 0.0, 0.0, 0.0], [1e-9, -1e-9, 1e-9, 0.0]])
    levels, scales = round_to_nearest(weight, 4)
    assert scales.dtype == torch.float16 and scales.tolist() == [[1.0, 0.0, 0.0]]
    assert levels.tolist() == [[15, 0, 10, 8], [8, 8, 8, 8], [8, 8, 8, 8]]


def small(folder: Path, hidden: int = 128, inner: int = 256) -> Path:
    """A checkpoint of random weights: 2 layers, 4 heads."""
    config = Qwen2Config(
        vocab_size=40, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, architectures=["Qwen2ForCausalLM"], tie_word_embeddings=False,
    )  # fmt: skip
    folder.mkdir()
    config.save_pretrained(folder)
    places = checkpoint_places(open_checkpoint(str(folder)).shape, Parallel())
    tensors = {name: each.numpy() for name, each in random_tensors(places, CPU, torch.float32)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def parts(path: Path, **options: Any) -> list[dict[str, torch.Tensor]]:
    return [linears(load(path, parallel=Parallel(rank, 2), **options)) for rank in range(2)]


@pytest.mark.parametrize("bits, group_size", [(4, 64), (4, 128), (4, -1), (8, 128)])
def test_ranks_hold_parts_of_one_quantised_model(gptq: ModuleType, tmp_path: Path, bits: int, group_size: int) -> None:
    """The only group of an input of 128 is shared."""
    quantized, plain = gptq.quantized_copies(small(tmp_path / "small"), tmp_path, bits, group_size)
    for ours, theirs in zip(parts(quantized), parts(plain), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name


def test_ranks_hold_parts_of_one_model_that_is_rounded(tmp_path: Path) -> None:
    path = small(tmp_path / "small", hidden=256)
    whole = linears(load(path, quantization="int4"))
    first, second = parts(path, quantization="int4")
    for name, weight in whole.items():
        if name.endswith(("out", "down")):
            assert torch.equal(torch.cat((first[name], second[name]), dim=1), weight)
        else:
            assert {tuple(row) for row in torch.cat((first[name], second[name])).tolist()} == {
                tuple(row) for row in weight.tolist()
            }


@pytest.mark.parametrize("is_rounded", [True, False])
def test_a_split_within_a_group_is_refused(gptq: ModuleType, tmp_path: Path, is_rounded: bool) -> None:
    path = small(tmp_path / "small", hidden=512, inner=384)
    with pytest.raises(UserError, match=r"down_proj.weight cannot be split .* one of its groups of 128 inputs"):
        if is_rounded:
            parts(path, quantization="int4")
        else:
            parts(gptq.quantized_copies(path, tmp_path, 4, 128)[0])


def test_inputs_that_no_group_divides_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"down_proj.weight has 200 inputs; .* a multiple of 32"):
        load(small(tmp_path / "small", inner=200), quantization="int4")


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_a_head_of_8_bits_is_near_the_exact_one(make_case: Any, drive: ModuleType, name: str) -> None:
    """Qwen3's is tied to the embedding, which stays exact."""
    case = make_case(name)
    model = load(case.path, int8_head=True)
    exact = load(case.path)
    assert torch.equal(model.embed, exact.embed)
    head = exact.head.cpu().numpy()
    scale = np.abs(head).max(axis=1, keepdims=True) / np.float32(127)
    expected = torch.from_numpy(np.rint(head / scale) * scale)
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    torch.testing.assert_close(model.logits(hidden).cpu(), hidden.cpu() @ expected.T, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(drive.Driver(model, case.prompts).prefill([1000]), case.logits, strict=True):
        error = (ours - theirs).square().mean().sqrt() / theirs.std()
        assert 0 < error < 0.01
