"""Writes checkpoints in GPTQ format from ones that are not quantised, in numpy, and what they amount to beside them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

LINEAR = re.compile(r"model\.layers\..*_proj(_with_mqa)?\.weight")


def quantized_copies(
    source: Path, folder: Path, bits: int = 4, group_size: int = 32, version: int = 1, whole: str = "(none)"
) -> tuple[Path, Path]:
    """(the checkpoint of ``source`` in GPTQ format, in two shards that split its linear maps; the same multiplied out).

    ``whole``: names that match are left as they are.
    """
    quantized, plain = folder / "quantized", folder / "plain"
    tensors = {
        name: tensor for file in sorted(source.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    levels: dict[str, Any] = {}
    for name, weight in list(tensors.items()):
        if LINEAR.fullmatch(name) and not re.search(whole, name):
            found = quantize(weight, bits, weight.shape[1] if group_size == -1 else group_size)
            levels |= pack(name.removesuffix(".weight"), *found, bits, version)
            tensors[name] = multiply_out(*found)
    kept = {name: tensor for name, tensor in tensors.items() if name.replace(".weight", ".qweight") not in levels}
    config = json.loads((source / "config.json").read_text())
    _write(plain, config, [tensors])
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": {1: "gptq", 2: "gptq_v2"}[version],
        "meta": {"quantizer": ["a test:0"]},
    }
    names = sorted(levels)
    _write(quantized, config, [kept | {name: levels[name] for name in names[::2]}, {n: levels[n] for n in names[1::2]}])
    return quantized, plain


def quantize(weight: Any, bits: int, group: int) -> tuple[Any, Any, Any]:
    """weight [O, I] -> levels [O, I], signed scales float16 [O, G], the group of each input [I]."""
    top = 2 ** (bits - 1)
    groups = np.arange(weight.shape[1]) // group
    scales = np.stack([_extreme(weight[:, groups == each]) for each in range(groups[-1] + 1)], axis=1) / -top
    scales = scales.astype(np.float16)
    return np.clip(np.rint(weight / scales[:, groups].astype(np.float32)) + top, 0, 2 * top - 1), scales, groups


def multiply_out(levels: Any, scales: Any, groups: Any) -> Any:
    """float32 [O, I]."""
    top = 8 if levels.max() < 16 else 128
    return ((levels - top) * scales[:, groups].astype(np.float32)).astype(np.float32)


def pack(stem: str, levels: Any, scales: Any, groups: Any, bits: int, version: int) -> dict[str, Any]:
    zeros = np.full(scales.T.shape, 2 ** (bits - 1) - (version == 1))
    return {
        f"{stem}.qweight": words(levels.T, bits),
        f"{stem}.qzeros": words(zeros.T, bits).T.copy(),
        f"{stem}.scales": scales.T.copy(),
        f"{stem}.g_idx": groups.astype(np.int32),
    }


def words(numbers: Any, bits: int) -> Any:
    """[rows, columns] -> int32 [rows * bits / 32, columns], the first row in the lowest bits."""
    per_word = 32 // bits
    out = np.zeros((len(numbers) // per_word, numbers.shape[1]), np.uint32)
    for row in range(len(numbers)):
        out[row // per_word] |= numbers[row].astype(np.uint32) << np.uint32(bits * (row % per_word))
    return out.view(np.int32)


def _extreme(part: Any) -> Any:
    """Of each row the number that is largest without its sign."""
    return part[np.arange(len(part)), np.abs(part).argmax(axis=1)]


def _write(path: Path, config: dict[str, Any], shards: list[dict[str, Any]]) -> None:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    homes = {}
    for i, shard in enumerate(shards):
        save_file(
            {name: np.ascontiguousarray(each) for name, each in shard.items()},
            path / f"{i}.safetensors",
            {"format": "pt"},
        )
        homes |= dict.fromkeys(shard, f"{i}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))


def copy_of(path: Path, target: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(path, target))


def edit(path: Path, **changes: Any) -> None:
    """Adds and replaces tensors of a checkpoint written here; None takes one away."""
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        mine = {name: each for name, each in changes.items() if name in tensors or file.name == "0.safetensors"}
        kept = {name: each for name, each in (tensors | mine).items() if each is not None}
        if mine:
            save_file(kept, file, {"format": "pt"})
