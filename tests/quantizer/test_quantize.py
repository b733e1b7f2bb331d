"""Models of every architecture quantised and read back, quantisations that were killed, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from labkit.errors import UserError
from labkit.models.loading import load_model, open_checkpoint
from labkit.quantizer.checkpoint import Workplace
from labkit.quantizer.quantize import Options, quantize
from labkit.quantizer.report import Report

CPU = torch.device("cpu")
PROMPTS = [[5, 9, 200], list(range(10, 47))]
LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\..*_proj(_with_mqa)?\.weight")
# bits and group size
FAMILIES = {
    "qwen2": (4, 32),
    "qwen2-yarn": (8, 32),
    "llama3": (4, -1),
    "llama-bias": (8, -1),
    "qwen3": (4, 32),
    "deepseek-v2-lite": (4, 32),
    "deepseek-v2": (8, -1),
    "deepseek-v3": (4, -1),
}
SMALL = {"sequences": 12, "length": 64}


def run(model: Path, out: Path, text: Path, **options: object) -> Report:
    said: list[str] = []
    return quantize(Options(str(model), out, **(SMALL | {"calibration": text} | options)), said.append)  # type: ignore[arg-type]


def tensors(path: Path) -> dict[str, Tensor]:
    return {name: each for file in sorted(path.glob("*.safetensors")) for name, each in load_file(file).items()}


def multiplied_out(path: Path, into: Path, original: Path) -> Path:
    """The same model with its levels multiplied out, by the format's definition; the rest from the original."""
    found = tensors(path)
    plain = tensors(original)
    config = json.loads((path / "config.json").read_text())
    bits = config.pop("quantization_config")["bits"]
    for name in [name for name in found if name.endswith(".qweight")]:
        stem = name.removesuffix(".qweight")
        words, zeros = (found[f"{stem}.{each}"].numpy().view(np.uint32) for each in ("qweight", "qzeros"))
        shifts, mask = np.arange(0, 32, bits), 2**bits - 1
        levels = ((words[:, None] >> shifts[:, None]) & mask).reshape(-1, words.shape[1]).astype(int)
        zeros = ((zeros[:, :, None] >> shifts) & mask).reshape(len(zeros), -1).astype(int) + 1
        groups, scales = found[f"{stem}.g_idx"].numpy(), found[f"{stem}.scales"].numpy().astype(np.float32)
        plain[f"{stem}.weight"] = torch.from_numpy(((levels - zeros[groups]) * scales[groups]).T.astype(np.float32))
    into.mkdir()
    save_file({name: each.contiguous() for name, each in plain.items()}, into / "model.safetensors", {"format": "pt"})
    (into / "config.json").write_text(json.dumps(config))
    return into


def logits_of_ours(path: Path, drive: ModuleType) -> list[Tensor]:
    model = load_model(open_checkpoint(str(path)), CPU, torch.float32)
    return drive.Driver(model, PROMPTS).prefill([512])


@torch.inference_mode()
def logits_of_transformers(path: Path) -> list[Tensor]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return [model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]


def off(found: list[Tensor], expected: list[Tensor]) -> float:
    """Root of the mean square of the difference, as a share of the expected's."""
    one, other = torch.cat(found), torch.cat(expected)
    return float((one - other).square().mean().sqrt() / other.square().mean().sqrt())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_is_quantised_and_read_as_it_was_meant(
    family: str, make_model: Callable[..., Path], text: Path, tmp_path: Path, drive: ModuleType
) -> None:
    bits, group_size = FAMILIES[family]
    model, out = make_model(family), tmp_path / "out"
    report = run(model, out, text, bits=bits, group_size=group_size)
    found, before = tensors(out), tensors(model)
    stems = {name.removesuffix(".weight") for name in before if LINEAR.fullmatch(name)}
    assert {name.removesuffix(".qweight") for name in found if name.endswith(".qweight")} == stems
    for name, tensor in before.items():
        if name.removesuffix(".weight") not in stems or name.endswith(".bias"):
            assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, "it stays as it was"
    assert not report.fallbacks
    assert all(line["gptq_error"] < line["rtn_error"] for line in report.lines)
    plain = logits_of_transformers(multiplied_out(out, tmp_path / "plain", model))
    assert off(logits_of_ours(out, drive), plain) < 1e-4
    assert off(plain, logits_of_transformers(model)) < (0.25 if bits == 8 else 1.0)


def test_the_directory_is_what_other_readers_look_for(
    make_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    model, out = make_model("qwen2-yarn"), tmp_path / "deeper" / "out"
    run(model, out, text, group_size=32)
    config = json.loads((out / "config.json").read_text())
    told = config["quantization_config"]
    assert told == json.loads((out / "quantize_config.json").read_text())
    assert told["quant_method"] == told["checkpoint_format"] == "gptq" and "is_marlin_format" not in told
    assert (told["bits"], told["group_size"], told["desc_act"], told["sym"], told["lm_head"]) == (
        4,
        32,
        False,
        True,
        False,
    )
    rope = json.loads((model / "config.json").read_text())["rope_parameters"]
    assert config["rope_parameters"] == rope and config["rope_theta"] == rope["rope_theta"]
    assert config["rope_scaling"]["rope_type"] == "yarn"
    shape = open_checkpoint(str(out)).shape
    assert replace(shape, quantization=None) == replace(open_checkpoint(str(model)).shape, quantization=None)
    assert sorted(file.name for file in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "quantization_report.json",
        "quantization_report.svg",
        "quantize_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_written_out_too(
    make_model: Callable[..., Path], text: Path, tmp_path: Path, tied: bool
) -> None:
    """auto-gptq leaves a head that is only implied as whatever lies in memory."""
    model, out = make_model("qwen2", tie_word_embeddings=tied), tmp_path / "out"
    run(model, out, text, group_size=32)
    found = load_file(out / "model.safetensors")
    same = torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert same == tied and open_checkpoint(str(out)).shape.tied == tied


def test_text_that_is_seen_makes_the_model_better_on_it(
    make_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """GPTQ beats rounding also by what comes out of the whole model, for the text it was shown."""
    model = make_model("qwen2")
    ours = run(model, tmp_path / "gptq", text, group_size=32, sequences=40)
    assert ours.tokens == 40 * 64 and ours.sequences == 40
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(text.read_text())["input_ids"][:300]
    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(multiplied_out(tmp_path / "gptq", tmp_path / "plain", model))
    rounded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        for name, weight in rounded.named_parameters():
            if LINEAR.fullmatch(name):
                grouped = weight.unflatten(1, (-1, 32))
                scales = grouped.abs().amax(2, keepdim=True) / 7
                weight.copy_(((grouped / scales).round() * scales).flatten(1))
        expected = before(torch.tensor([ids])).logits
        errors = [off([model(torch.tensor([ids])).logits], [expected]) for model in (after, rounded)]
    assert errors[0] < 0.7 * errors[1]


COMMAND = [sys.executable, "-m", "labkit.cli", "quantize"]


def hashes(path: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.iterdir()
        if not file.name.startswith("quantization_report")
    }


def without_seconds(path: Path) -> list[dict[str, object]]:
    lines = json.loads((path / "quantization_report.json").read_text())["lines"]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_a_quantisation_that_was_killed_goes_on_and_ends_alike(
    make_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    model = make_model("qwen2", num_hidden_layers=16)
    options = ["--calibration", str(text), "--sequences", "30", "--length", "256", "--group-size", "32"]
    command = [*COMMAND, str(model), "out", *options]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    partial = tmp_path / "out.partial"
    deadline = time.monotonic() + 120
    while not (partial / "layer-0002.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    done = Workplace(tmp_path / "out", 16).finished()
    assert 3 <= done < 16
    other = {"calibration": text, "sequences": 30, "length": 256, "group_size": 32}
    with pytest.raises(UserError, match=r"begun otherwise \(damping was 0.01\); give the same options"):
        run(model, tmp_path / "out", text, **other, damping=0.02)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert f"going on after {done} finished layers" in again.stderr and "written to out" in again.stdout
    assert not partial.exists()
    run(model, tmp_path / "at-once", text, **other)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "at-once")
    assert without_seconds(tmp_path / "out") == without_seconds(tmp_path / "at-once")


def test_a_disk_that_is_full_keeps_what_is_done(make_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """Files may not grow beyond a size, which is the error that a full disk gives at the same place."""
    model = make_model("qwen2")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError):
            run(model, tmp_path / "out", text, group_size=32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").glob(".*.partial")), "no half files"
    run(model, tmp_path / "out", text, group_size=32)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_large_models_are_written_in_shards(
    make_model: Callable[..., Path], text: Path, tmp_path: Path, drive: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama-bias")
    run(model, tmp_path / "one", text, group_size=32)
    monkeypatch.setattr("labkit.quantizer.checkpoint.ONE_FILE", 1000)
    run(model, tmp_path / "many", text, group_size=32)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert set(index["weight_map"]) == set(one) == set(many) and all(torch.equal(one[name], many[name]) for name in one)
    assert len(set(index["weight_map"].values())) == 3
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in one.values())
    assert off(logits_of_ours(tmp_path / "many", drive), logits_of_ours(tmp_path / "one", drive)) == 0


def test_what_cannot_be_quantised(make_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    model, out = make_model("deepseek-v3"), tmp_path / "out"
    with pytest.raises(UserError, match=r"does not divide the 48 inputs of model.layers.0.self_attn.q_b_proj; use -1"):
        run(model, out, text, group_size=32)
    with pytest.raises(UserError, match="--bits is 4 or 8"):
        run(model, out, text, bits=3)
    with pytest.raises(UserError, match="--group-size 100"):
        run(model, out, text, group_size=100)
    with pytest.raises(UserError, match="--length 4096 is more than the 512"):
        run(model, out, text, group_size=-1, length=4096)
    with pytest.raises(UserError, match="give --calibration FILE"):
        run(model, out, text, group_size=-1, calibration=None)
    with pytest.raises(UserError, match="--sequences"):
        run(model, out, text, sequences=0)
    with pytest.raises(UserError, match="--length must be at least 16"):
        run(model, out, text, length=2)
    with pytest.raises(UserError, match="--damping"):
        run(model, out, text, damping=0.0)
    with pytest.raises(UserError, match="no model directory"):
        run(tmp_path / "none", out, text)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            run(model, out, text, device="cuda")
    assert list(tmp_path.iterdir()) == [], "nothing was begun"
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        run(model, tmp_path / "there", text, group_size=-1)
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="in the way"):
        run(model, tmp_path / "mine", text, group_size=-1)
    assert (tmp_path / "mine.partial" / "thesis.txt").exists()


def test_what_is_quantised_already(make_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    run(make_model("qwen2"), tmp_path / "once", text, group_size=32)
    with pytest.raises(UserError, match=r"is quantised already \(gptq\)"):
        run(tmp_path / "once", tmp_path / "twice", text, group_size=32)
    config = json.loads((tmp_path / "once" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (tmp_path / "once" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"is quantised already \(awq\)"):
        run(tmp_path / "once", tmp_path / "twice", text, group_size=32)


def test_a_disk_without_room_is_told_before_work(tmp_path: Path) -> None:
    place = Workplace(tmp_path / "out", 2)
    place.check_room(1000)
    with pytest.raises(UserError, match="GiB free, the quantised model takes"):
        place.check_room(2**60)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_workplace_is_told(make_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    place = Workplace(tmp_path / "out", 2)
    place.begin({"bits": 4})
    place.keep_layer(0, {"a": torch.zeros(4)}, [])
    shard = next(place.path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:10])
    with pytest.raises(UserError, match="is damaged"):
        place.layer(0)


def test_an_expert_without_tokens_is_rounded_and_named(
    make_model: Callable[..., Path], text: Path, tmp_path: Path, drive: ModuleType
) -> None:
    source, model = make_model("deepseek-v3"), tmp_path / "model"
    shutil.copytree(source, model)
    for file in model.glob("*.safetensors"):
        shard = load_file(file)
        for name, tensor in shard.items():
            if name.endswith("e_score_correction_bias"):
                tensor[2:4] = -100.0  # a group of experts: the better of the two would be drawn with the other
        save_file(shard, file, {"format": "pt"})
    report = run(model, tmp_path / "out", text, group_size=-1)
    assert report.fallbacks == [
        f"layer {layer}, mlp.{kind} of expert {expert}: no calibration token reached it"
        for layer in (1, 2)
        for kind in ("gate_up", "down")
        for expert in (2, 3)
    ]
    told = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    lines = [line for line in told["lines"] if line["fallback"]]
    assert [line["tokens"] for line in lines] == [0] * 8 and all(line["gptq_error"] is None for line in lines)
    assert 'class="fallback"' in (tmp_path / "out" / "quantization_report.svg").read_text()
    assert torch.isfinite(torch.cat(logits_of_ours(tmp_path / "out", drive))).all()


def test_gptq_that_is_worse_than_rounding_is_an_error(
    make_model: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What rounds columns is made to do it badly: the report notices, for which it is there."""
    from labkit.quantizer import gptq

    right = gptq.round_block

    def wrong(current: Tensor, weights: Tensor, factor: Tensor, *rest: object) -> object:
        return right(current, weights, -3 * factor, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(gptq, "round_block", wrong)
    with pytest.raises(UserError, match="in layer 0, attention.qkv, GPTQ does worse than rounding"):
        run(make_model("qwen2"), tmp_path / "out", text, group_size=32)
    assert not (tmp_path / "out").exists()


def test_interrupting_says_how_to_go_on(make_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    model = make_model("qwen2", num_hidden_layers=16)
    options = ["--calibration", str(text), "--sequences", "30", "--length", "256", "--group-size", "32"]
    # A job in the background, and all that it starts, ignores Ctrl-C; a terminal's does not.
    hearing = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(
        [*COMMAND, str(model), "out", *options], cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=hearing
    )
    while not (tmp_path / "out.partial" / "layer-0000.json").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in said, said
    assert "Traceback" not in said and os.path.isdir(tmp_path / "out.partial")


def test_weights_may_be_made_up(make_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """For time and memory at sizes whose weights cannot be had: the shape alone is enough."""
    shape = tmp_path / "shape"
    shape.mkdir()
    shutil.copy(make_model("qwen2") / "config.json", shape)
    report = run(shape, tmp_path / "out", text, group_size=32, random_weights=True, calibration=None)
    assert report.random_weights and report.tokens == 12 * 64 and not report.fallbacks
    checkpoint = open_checkpoint(str(tmp_path / "out"))
    assert checkpoint.shape.quantization is not None
    load_model(checkpoint, CPU, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["qwen2", "deepseek-v2-lite", "deepseek-v3"])
def test_a_gpu_finds_what_a_cpu_finds(
    family: str, make_model: Callable[..., Path], text: Path, tmp_path: Path, drive: ModuleType
) -> None:
    model = make_model(family)
    ours = run(model, tmp_path / "cpu", text, group_size=-1)
    there = run(model, tmp_path / "cuda", text, group_size=-1, device="cuda", dtype="bfloat16")
    assert there.peak_bytes and not there.fallbacks
    for one, other in zip(ours.lines, there.lines, strict=True):
        assert one["matrix"] == other["matrix"]
        assert other["gptq_error"] == pytest.approx(one["gptq_error"], rel=0.3)
        assert other["rtn_error"] == pytest.approx(one["rtn_error"], rel=0.1)
    assert off(logits_of_ours(tmp_path / "cuda", drive), logits_of_ours(tmp_path / "cpu", drive)) < 1


@pytest.mark.slow
def test_the_shipped_model_stays_right(tmp_path: Path) -> None:
    """At 4 bits, from a few documents, on the problems of seed 0."""
    from labkit.evaluation.evaluate import Wishes, evaluate

    shipped = Path(__file__).resolve().parent.parent.parent / "data" / "models" / "ledger-r1"
    report = quantize(Options(str(shipped), tmp_path / "out", sequences=6), print)
    assert not report.fallbacks and len(report.lines) == 32
    assert all(line["gptq_error"] < 0.5 * line["rtn_error"] for line in report.lines)
    account = evaluate(str(tmp_path / "out"), Wishes(40, ("short",), reference=str(shipped)), say=lambda _: None)
    mine, theirs = (each["buckets"]["short"]["right"] for each in (account, account["reference"]))
    assert mine >= theirs - 2
