"""Models from Hugging Face directories and hub ids. Only safetensors are read: a pickle can run code of its author."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from labkit.errors import UserError
from labkit.kernels.rope import RopeTable
from labkit.models.decoder import Decoder
from labkit.models.parallel import Parallel
from labkit.models.shape import ARCHITECTURES, ModelShape
from labkit.models.weights import Place, checkpoint_places, may_be_ignored, random_tensors

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
ALONE = Parallel()


@dataclass(frozen=True)
class Checkpoint:
    """A model directory that has been looked at but not loaded."""

    path: Path
    shape: ModelShape
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
    if named[0] not in ARCHITECTURES:
        raise UserError(f"{path} is a {named[0]}; supported are: {', '.join(ARCHITECTURES)}")
    try:
        config = AutoConfig.from_pretrained(path)
        shape = ModelShape.from_config(config)
    except UserError:
        raise
    except Exception as error:  # transformers validates with several exception types
        raise UserError(f"{path / 'config.json'} cannot be used: {error}") from error
    return Checkpoint(path, shape, _eos_token_ids(path, raw))


def load_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    parallel: Parallel = ALONE,
    random_weights: bool = False,
) -> Decoder:
    """The model, or this rank's part of it, with its weights on ``device`` in ``dtype``, for inference only.

    With ``random_weights`` they are made up, the same every time, and none are looked for. Raises UserError when
    tensors are missing, unexpected or of the wrong shape, when there are no safetensors, and where the model cannot be
    split over the ranks.
    """
    shape = checkpoint.shape
    model = _empty_model(shape, device, dtype, parallel)
    places = checkpoint_places(shape, parallel)
    targets = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    if random_weights:
        for name, tensor in random_tensors(places, device, dtype):
            _fill(targets, places[name], tensor)
    else:
        _read_weights(checkpoint, targets, places, parallel)
    return model


def _empty_model(shape: ModelShape, device: torch.device, dtype: torch.dtype, parallel: Parallel) -> Decoder:
    """The model with parameters of ``dtype`` that hold whatever the memory held, and its table of rotary angles."""
    with torch.device("meta"):
        model = Decoder(shape, parallel)
    for parameter in model.parameters():  # but not the buffers, which are float32 whatever the weights are
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device).requires_grad_(False).eval()
    if shape.tied:  # to_empty gives each its own storage
        model.head = model.embed
    model.cos_sin = RopeTable.build(shape.rope, shape.rotary_dim, shape.max_positions, device).cos_sin
    return model


def _read_weights(
    checkpoint: Checkpoint, targets: dict[str, Tensor], places: dict[str, Place], parallel: Parallel
) -> None:
    missing = dict(places)
    for file in _weight_files(checkpoint.path):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if place := places.get(name):
                        _check_shape(name, tensors.get_slice(name).get_shape(), place)
                        _fill(targets, place, tensors.get_slice(name))
                        missing.pop(name, None)
                    elif not may_be_ignored(name, checkpoint.shape, parallel):
                        raise UserError(f"{file} holds an unexpected tensor {name}; is config.json of another model?")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read ({error}); fetch it again") from error
    if missing:
        raise UserError(
            f"{checkpoint.path} lacks {len(missing)} tensors, such as {next(iter(missing))}; fetch it again"
        )


def _check_shape(name: str, found: list[int], place: Place) -> None:
    if found != list(place.shape):
        raise UserError(f"tensor {name} is {found}, config.json makes it {list(place.shape)}")


def _fill(targets: dict[str, Tensor], place: Place, tensor: Any) -> None:
    """Copies this rank's part of ``tensor``, a Tensor or a safetensors slice, to its place."""
    part = tensor[place.part]
    target = targets[place.parameter].data
    if place.expert is not None:
        target = target[place.expert]
    target[place.first : place.first + len(part)].copy_(part)


def load_model_for_generate(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, attention: str, random_weights: bool = False
) -> Any:
    """The same checkpoint as ``transformers`` loads it, for its ``generate``. With ``random_weights`` they are those
    that ``transformers`` initialises a model with, which are not those of ``load_model``. Raises UserError if it cannot
    be loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    if not random_weights:
        _weight_files(checkpoint.path)  # refuses pickles before transformers would look for them
    model: Any
    try:
        if random_weights:
            config = AutoConfig.from_pretrained(checkpoint.path)
            with device:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        else:
            model = AutoModelForCausalLM.from_pretrained(
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
