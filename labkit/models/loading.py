"""Models from Hugging Face directories and hub ids. Only safetensors are read: a pickle can run code of its author."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.nn import Parameter

from labkit.errors import UserError
from labkit.models.qwen2 import Qwen2, Qwen2Shape

SUPPORTED = ("Qwen2ForCausalLM",)
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt"]


@dataclass(frozen=True)
class Checkpoint:
    """A model directory that has been looked at but not loaded."""

    path: Path
    shape: Qwen2Shape
    eos_token_ids: frozenset[int]


def resolve_model(model: str) -> Path:
    """The directory of ``model``: itself if it is one, else the hub's files in the local cache, fetched where missing.

    Raises UserError when it is neither.
    """
    if Path(model).is_dir():
        return Path(model)
    if Path(model).exists() or model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise UserError(f"no model directory {model!r}; give one, or a hub id such as Qwen/Qwen2.5-0.5B")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's client raises many kinds; each means that the files cannot be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{model!r} is no directory, and the hub does not give it ({reason}); check the name"
        ) from error


def open_checkpoint(model: str) -> Checkpoint:
    """Reads the configuration. Raises UserError for a missing or broken config.json or an unsupported architecture."""
    from transformers import AutoConfig

    path = resolve_model(model)
    raw = _read_json(path / "config.json")
    named = raw.get("architectures") or ["(none named)"]
    if named[0] not in SUPPORTED:
        raise UserError(f"{path} is a {named[0]}; supported are: {', '.join(SUPPORTED)}")
    try:
        config = AutoConfig.from_pretrained(path)
        shape = Qwen2Shape.from_config(config)
    except UserError:
        raise
    except Exception as error:  # transformers validates with several exception types
        raise UserError(f"{path / 'config.json'} cannot be used: {error}") from error
    return Checkpoint(path, shape, _eos_token_ids(path, raw))


def load_model(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Qwen2:
    """The model with its weights on ``device`` in ``dtype``, for inference only.

    Raises UserError when tensors are missing, unexpected or of the wrong shape, or when there are no safetensors.
    """
    with torch.device("meta"):
        model = Qwen2(checkpoint.shape)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    if checkpoint.shape.tied:  # to_empty gives each its own storage
        model.head.weight = model.embed.weight
    parameters, wanted = dict(model.named_parameters()), checkpoint.shape.checkpoint_map()
    missing = dict(wanted)
    for file in _weight_files(checkpoint.path):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if name in wanted:
                        _fill(parameters, wanted[name], name, tensors.get_tensor(name))
                        missing.pop(name, None)
                    elif not _may_be_ignored(name, checkpoint.shape):
                        raise UserError(f"{file} holds an unexpected tensor {name}; is config.json of another model?")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read ({error}); fetch it again") from error
    if missing:
        raise UserError(
            f"{checkpoint.path} lacks {len(missing)} tensors, such as {next(iter(missing))}; fetch it again"
        )
    return model


def load_model_for_generate(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, attention: str) -> Any:
    """The same checkpoint as ``transformers`` loads it, for its ``generate``. Raises UserError if it cannot be."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    _weight_files(checkpoint.path)  # refuses pickles before transformers would look for them
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, dtype=dtype, attn_implementation=attention, use_safetensors=True
        )
    except Exception as error:  # transformers raises many kinds here
        raise UserError(f"{checkpoint.path} cannot be loaded: {error}") from error
    # The checkpoint's own defaults (temperature, top-k, end of sequence) would apply wherever a request names none.
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.to(device).requires_grad_(False).eval()


def load_tokenizer(model: str) -> Any:
    """The ``transformers`` tokenizer of a directory or hub id. Raises UserError when there is none."""
    from transformers import AutoTokenizer

    path = resolve_model(model)
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers raises many kinds here
        raise UserError(f"{path} has no tokenizer that can be loaded ({error})") from error


def _fill(parameters: dict[str, Parameter], place: tuple[str, int, int], name: str, tensor: torch.Tensor) -> None:
    parameter, first, rows = place
    target = parameters[parameter].data[first : first + rows]
    if tensor.shape != target.shape:
        raise UserError(f"tensor {name} is {list(tensor.shape)}, config.json makes it {list(target.shape)}")
    target.copy_(tensor)


def _may_be_ignored(name: str, shape: Qwen2Shape) -> bool:
    return name.endswith("rotary_emb.inv_freq") or (shape.tied and name == "lm_head.weight")


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        files = [path / name for name in names]
        absent = [file.name for file in files if not file.exists()]
        if absent or not files:
            raise UserError(f"{path} lacks the shards {', '.join(absent) or '(none named)'}; fetch it again")
        return files
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise UserError(f"{path} has its weights as pickles, which can run code; convert them to safetensors first")
    raise UserError(f"{path} has no model.safetensors")


def _eos_token_ids(path: Path, config: dict[str, Any]) -> frozenset[int]:
    generation = path / "generation_config.json"
    eos = _read_json(generation).get("eos_token_id") if generation.exists() else None
    if eos is None:
        eos = config.get("eos_token_id")
    if eos is None:
        return frozenset()
    return frozenset(eos if isinstance(eos, list) else [eos])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; is {path.parent} a Hugging Face model directory?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is no JSON object")
    return found
