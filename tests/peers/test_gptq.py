"""GPTQ checkpoints: ours read by auto-gptq, transformers and gptqmodel; gptqmodel's read by our engine.

What each makes of a checkpoint is compared with its weights multiplied out here, by the definition of the format, in a
plain model of ``transformers`` in float32.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from labkit.bench.gptqmodel import ENVIRONMENT, quantize_with_gptqmodel
from labkit.bench.quantization import measure_quantization
from labkit.bench.rows import keeping
from labkit.experiments.store import RunStore
from labkit.models.loading import load_model, open_checkpoint
from labkit.quantizer import checkpoint as writer
from labkit.quantizer.calibration import from_ledger
from labkit.quantizer.quantize import Options, quantize
from labkit.training.ledger import make_problem

pytestmark = [pytest.mark.peers, pytest.mark.timeout(900)]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHIPPED = ROOT / "data" / "models" / "ledger-r1"

# reader -> (its environment, the largest error that its arithmetic excuses, as a share of the logits' size)
READERS = {
    "auto-gptq": ("auto-gptq", 1e-5),
    "transformers-exact": ("gptqmodel", 3e-3),
    "transformers": ("gptqmodel", 0.04),
    "gptqmodel": ("gptqmodel", 0.04),
}
# name -> (the model, bits, group size)
WRITTEN = {
    "tiny-4-128": ("tiny", 4, 128),
    "tiny-4-64": ("tiny", 4, 64),
    "tiny-4-32": ("tiny", 4, 32),
    "tiny-4-whole": ("tiny", 4, -1),
    "tiny-8-128": ("tiny", 8, 128),
    "tiny-8-whole": ("tiny", 8, -1),
    "tiny-tied": ("tied", 4, 128),
    "tiny-shards": ("tiny", 4, 128),
    "ledger-r1-4-128": ("shipped", 4, 128),
    "ledger-r1-8-128": ("shipped", 8, 128),
}

# On a CPU these pick an operator of torch for 4 bits that knows no groups of 512.
PAIRS = [
    (reader, name)
    for reader in READERS
    for name in WRITTEN
    if not (name == "tiny-4-whole" and reader in ("transformers", "gptqmodel"))
]


def multiplied_out(stem: str, tensors: dict[str, Any], bits: int, less_one: int = 1) -> torch.Tensor:
    """float32 [outputs, inputs]; ``less_one``: what the stored zeros lack, 1 in format v1."""
    qweight, qzeros, scales, groups = (
        tensors[f"{stem}.{suffix}"].numpy() for suffix in ("qweight", "qzeros", "scales", "g_idx")
    )
    shifts = np.arange(0, 32, bits)
    levels = (qweight[:, None, :].astype(np.int64) >> shifts[None, :, None]) & (2**bits - 1)
    zeros = (qzeros[:, :, None].astype(np.int64) >> shifts) & (2**bits - 1)
    levels = levels.reshape(-1, qweight.shape[1])
    zeros = zeros.reshape(len(qzeros), -1) + less_one
    weight = scales.astype(np.float64)[groups] * (levels - zeros[groups])
    return torch.from_numpy(weight.T.astype(np.float32))


def plain(checkpoint: Path, less_one: int = 1) -> Qwen2ForCausalLM:
    """The model that a checkpoint in GPTQ format amounts to, in float32."""
    config = json.loads((checkpoint / "config.json").read_text())
    bits = config.pop("quantization_config")["bits"]
    stored: dict[str, Any] = {}
    for file in checkpoint.glob("*.safetensors"):
        stored |= load_file(file)
    found = {}
    for name, tensor in stored.items():
        stem, _, kind = name.rpartition(".")
        if kind == "qweight":
            found[f"{stem}.weight"] = multiplied_out(stem, stored, bits, less_one)
        elif kind not in ("qzeros", "scales", "g_idx"):
            found[name] = tensor.float()
    model = Qwen2ForCausalLM(Qwen2Config(**config | {"dtype": "float32"})).eval()
    lacking, unknown = model.load_state_dict(found, strict=False)
    assert set(lacking) <= {"lm_head.weight"} and not unknown
    assert lacking == [] or config["tie_word_embeddings"]
    return model


@torch.inference_mode()
def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    return model(input_ids=torch.from_numpy(tokens)).logits.numpy()


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Of root mean squares, as a share."""
    return float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))


@pytest.fixture(scope="module")
def small(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """Random models whose matrices groups of 128 fit, biases included; ``small(tied)``, the head with the embedding."""

    def build(tied: bool) -> Path:
        path = tmp_path_factory.mktemp("models") / "small"
        shutil.copytree(tiny_model, path, ignore=lambda _, names: [n for n in names if n.startswith(("model", "conf"))])
        vocabulary = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = Qwen2Config(
            vocab_size=vocabulary, num_key_value_heads=2, tie_word_embeddings=tied, dtype="float32",
            max_position_embeddings=512, bos_token_id=None, eos_token_id=2, pad_token_id=0,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}, **sizes,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(7)
        model = Qwen2ForCausalLM(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(1 + 0.1 * noise if "norm" in name else 0.1 * noise)
        model.save_pretrained(path)
        return path

    return build


@pytest.fixture(scope="module")
def tokens() -> Callable[[str], np.ndarray]:
    """Model -> tokens to give it [sequences, length]."""
    problem = make_problem(seed=5, index=3, bucket="short", family="lookup").prompt
    ledger = AutoTokenizer.from_pretrained(SHIPPED)(problem)["input_ids"]
    random = np.random.default_rng(0).integers(0, 390, (2, 40))
    return lambda model: np.array([ledger]) if model == "shipped" else random


@pytest.fixture(scope="module")
def written(small, tokens, tmp_path_factory) -> dict[str, Path]:
    """Name of WRITTEN -> folder with our quantizer's ``checkpoint`` and ``tokens.npy``."""
    models = {"tiny": small(False), "tied": small(True), "shipped": SHIPPED}
    root = tmp_path_factory.mktemp("written")
    for name, (model, bits, group_size) in WRITTEN.items():
        text = {"length": 512} if model == "shipped" else {"calibration": ROOT / "README.md", "length": 128}
        out = root / name / "checkpoint"
        options = Options(str(models[model]), out, bits, group_size, sequences=4, **text)
        with pytest.MonkeyPatch.context() as patch:
            if name == "tiny-shards":
                patch.setattr(writer, "ONE_FILE", 0)
            quantize(options, say=lambda _: None)
        assert (out / "model.safetensors").exists() != (name == "tiny-shards")
        np.save(root / name / "tokens.npy", tokens(model))
    return {name: root / name for name in WRITTEN}


@pytest.fixture(scope="module")
def read(peer, output_of, written) -> Callable[[str], dict[str, str]]:
    """Reader -> what it ran with, once it has left its logits in every folder."""
    said: dict[str, dict[str, str]] = {}

    def run(reader: str) -> dict[str, str]:
        name = READERS[reader][0]
        if name not in said:
            readers = ",".join(each for each, (environment, _) in READERS.items() if environment == name)
            command = [peer(name) / "python", HERE / "gptq_calls.py", readers, *written.values()]
            # gptqmodel would have a C++ compiler make its kernels faster, for a minute.
            settings = {"TORCHDYNAMO_DISABLE": "1", "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}
            said[name] = json.loads(output_of(command, timeout_s=600, **settings).splitlines()[-1])
        return said[name]

    return run


@pytest.mark.parametrize("name", ["auto-gptq", "gptqmodel"])
def test_the_readers_are_the_pinned_ones(name, read):
    lock = (ROOT / "peers" / f"{name}.lock").read_text().split()
    for package, version in read(name).items():
        assert f"{package}=={version.partition('+')[0]}" in lock


@pytest.mark.parametrize(("reader", "name"), PAIRS)
def test_others_read_what_we_write(reader, name, read, written):
    read(reader)
    folder = written[name]
    assert not (failure := folder / f"{reader}.error").exists(), failure.read_text()
    expected = logits_of(plain(folder / "checkpoint"), np.load(folder / "tokens.npy"))
    found = np.load(folder / f"{reader}.npy")
    print(f"{reader} {name}: {error(found, expected):.1e}")
    assert found.shape == expected.shape
    assert error(found, expected) < READERS[reader][1]


@pytest.mark.parametrize("name", WRITTEN)
def test_our_engine_reads_what_we_write(name, written, drive):
    folder = written[name]
    tokens = np.load(folder / "tokens.npy")
    expected = logits_of(plain(folder / "checkpoint"), tokens)
    assert error(ours(folder / "checkpoint", tokens, drive), expected) < 1e-5


@pytest.mark.parametrize("name", [name for name, (_, bits, _) in WRITTEN.items() if bits == 4])
def test_a_reader_of_another_format_would_be_noticed(name, written):
    """The zeros are off by one where format v1 is read as v2."""
    checkpoint, tokens = written[name] / "checkpoint", np.load(written[name] / "tokens.npy")
    found = error(logits_of(plain(checkpoint, less_one=0), tokens), logits_of(plain(checkpoint), tokens))
    print(f"read as v2, {name}: {found:.1f}")
    assert found > 5 * max(allowed for _, allowed in READERS.values())


@pytest.mark.parametrize("name", [name for name in WRITTEN if name != "tiny-shards"])
def test_what_others_read_has_scales_of_both_signs(name, written):
    stored = load_file(written[name] / "checkpoint" / "model.safetensors")
    scales = torch.cat([tensor.flatten() for key, tensor in stored.items() if key.endswith(".scales")])
    assert 0.2 < (scales < 0).float().mean() < 0.8


@pytest.mark.parametrize("name", [name for name in WRITTEN if name.startswith("ledger")])
def test_a_quantised_model_says_much_the_same(name, written):
    tokens = np.load(written[name] / "tokens.npy")
    exact = logits_of(AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32), tokens)
    quantised = logits_of(plain(written[name] / "checkpoint"), tokens)
    assert error(quantised, exact) < (0.25 if WRITTEN[name][1] == 4 else 0.03)


def ours(checkpoint: Path, tokens: np.ndarray, drive: ModuleType) -> np.ndarray:
    """Logits of our model, read and run as the engine does."""
    model = load_model(open_checkpoint(str(checkpoint)), torch.device("cpu"), torch.float32)
    return torch.stack(drive.Driver(model, tokens.tolist()).prefill([13])).numpy()


@pytest.fixture(scope="module")
def drive() -> ModuleType:
    """tests/models/drive.py, which runs a model without the rest of the engine."""
    spec = importlib.util.spec_from_file_location("labkit_tests_drive", HERE.parent / "models" / "drive.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def theirs(peer, tmp_path_factory) -> Path:
    """The shipped model, quantised by gptqmodel with a few ledger problems."""
    assert peer("gptqmodel").parent == ENVIRONMENT
    out = tmp_path_factory.mktemp("theirs") / "ledger-r1"
    sequences = from_ledger(AutoTokenizer.from_pretrained(SHIPPED), sequences=4, length=512)
    print(f"gptqmodel took {quantize_with_gptqmodel(SHIPPED, sequences, out):.0f} s")
    return out


def test_our_engine_reads_what_gptqmodel_writes(theirs, tokens, drive):
    asked = tokens("shipped")
    found = ours(theirs, asked, drive)
    assert error(found, logits_of(plain(theirs), asked)) < 1e-5
    exact = logits_of(AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32), asked)
    assert 1e-3 < error(found, exact) < 0.25


def test_the_bench_tells_what_both_quantizers_take_and_lose(peer, tmp_path):
    """One calibration sequence; the difference is that of two ways to round, not of a model that broke."""
    peer("gptqmodel")
    with keeping(RunStore(tmp_path), {}) as (book, _):
        measure_quantization(str(SHIPPED), torch.device("cpu"), book, print, problems=4, sequences=1)
    found = {row.name: row for row in book.rows}
    for name in ("labkit", "gptqmodel"):
        assert found[name].note == "" and found[name].figures["s"] > 0
        assert found[name].figures["right, %"] == found["not quantised"].figures["right, %"] == 100
        assert 0 < found[name].figures["KL, nats"] < 0.01
