"""Models from Hugging Face directories and hub ids. Only safetensors are read: a pickle can run code of its author."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from labkit.errors import UserError
from labkit.kernels.rope import RopeTable
from labkit.models.decoder import Decoder, Layer
from labkit.models.directory import resolve_model
from labkit.models.parallel import Parallel
from labkit.models.quantized import (
    SUFFIXES,
    Quantization,
    QuantizedLinear,
    is_quantized,
    is_zero,
    pack_rounded,
    quantize_linears,
    read_dequantized,
    read_packed,
    stem_of,
)
from labkit.models.shape import ARCHITECTURES, ModelShape
from labkit.models.tensors import TensorFiles, read_json, weight_files
from labkit.models.weights import Place, checkpoint_places, may_be_ignored, random_tensors

ALONE = Parallel()
Target = Tensor | QuantizedLinear
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Checkpoint:
    """A model directory that has been looked at but not loaded."""

    path: Path
    shape: ModelShape
    eos_token_ids: frozenset[int]


def open_checkpoint(model: str) -> Checkpoint:
    """Reads the configuration. Raises UserError for a missing or broken config.json or an unsupported architecture."""
    from transformers import AutoConfig

    path = resolve_model(model)
    raw = read_json(path / "config.json")
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
    quantization: str = "none",
    int8_head: bool = False,
) -> Decoder:
    """The model, or this rank's part of it, with its weights on ``device`` in ``dtype``, for inference only.

    With ``random_weights`` they are made up, the same every time, and none are looked for. ``quantization`` and
    ``int8_head`` as in a Deployment. Raises UserError when tensors are missing, unexpected or of the wrong shape, when
    there are no safetensors, where the model cannot be split over the ranks, and for a quantised checkpoint that is to
    be quantised or made up.
    """
    shape = checkpoint.shape
    if shape.quantization and (quantization != "none" or random_weights):
        raise UserError(
            f"{checkpoint.path} is quantised already; leave out random_weights and quantization, or give the model "
            "it was made from"
        )
    places = checkpoint_places(shape, parallel)
    model = _empty_model(shape, device, dtype, parallel, _unquantized(checkpoint, places, quantization))
    targets = parameter_targets(model)
    if random_weights:
        for name, tensor in random_tensors(places, device, dtype):
            _fill(targets, name, places[name], tensor[places[name].part])
    else:
        read_weights(checkpoint, targets, places, parallel)
    if int8_head:
        model.round_head()
    return model


def empty_layer(shape: ModelShape, index: int, device: torch.device, dtype: torch.dtype) -> Layer:
    """One layer of a model, for inference only; its parameters hold whatever the memory held, see ``read_weights``."""
    with torch.device("meta"):
        layer = Layer(shape, ALONE, index)
    return _on_device(layer, device, dtype)


def parameter_targets(module: nn.Module) -> dict[str, Target]:
    """The name of each parameter and buffer, and of each weight in 4 bits -> what ``read_weights`` fills."""
    quantized = {f"{name}.weight": part for name, part in module.named_modules() if isinstance(part, QuantizedLinear)}
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers()) | quantized


def read_weights(
    checkpoint: Checkpoint, targets: Mapping[str, Target], places: dict[str, Place], parallel: Parallel = ALONE
) -> None:
    """Fills ``targets``, by the names in a Decoder, with the tensors that ``places`` names, and reads no others.

    ``places``: all or some of ``checkpoint_places(checkpoint.shape, parallel)``, such as one layer's. Weights in levels
    are multiplied out unless their target is a QuantizedLinear, which rounds those of 16 or 32 bits. Raises UserError
    when tensors are missing or do not fit the config, and when the checkpoint holds one that no such model has.
    """
    quantization = checkpoint.shape.quantization
    with TensorFiles(checkpoint.path) as files:
        _refuse_unexpected(files, checkpoint.shape, parallel)
        missing = [name for name in places if name not in files and not (quantization and is_quantized(name, files))]
        if missing:
            raise UserError(f"{checkpoint.path} lacks {len(missing)} tensors, such as {missing[0]}; fetch it again")
        for name in files.names:
            if place := places.get(name):
                _check_shape(name, files.shape(name), place)
                _fill(targets, name, place, files.part(name, place.part))
        for name in (name for name in places if name not in files):
            assert quantization
            _fill_quantized(targets, name, places[name], files, quantization)


def _unquantized(checkpoint: Checkpoint, places: dict[str, Place], quantization: str) -> set[str] | None:
    """The parameters that are not to be in 4 bits although linear maps are: of those in a checkpoint that is quantised,
    the ones of which it holds a part in 16 or 32 bits. None where no linear map is to be."""
    if quantization == "int4":
        return set()
    if checkpoint.shape.quantization is None or checkpoint.shape.quantization.bits != 4:
        return None
    with TensorFiles(checkpoint.path) as files:
        return {place.parameter for name, place in places.items() if not is_quantized(name, files)}


def _refuse_unexpected(files: TensorFiles, shape: ModelShape, parallel: Parallel) -> None:
    places = checkpoint_places(shape, parallel)
    known = set(places)
    if shape.quantization:
        stems = [stem_of(name) for name in places if is_quantized(name, files)]
        known |= {stem + suffix for stem in stems for suffix in SUFFIXES}
        # Some writers add a bias of zeros to every linear map.
        known |= {bias for stem in stems if is_zero(bias := f"{stem}.bias", files)}
    for name in files.names:
        if name not in known and not may_be_ignored(name, shape, parallel):
            raise UserError(f"{files.path} holds an unexpected tensor {name}; is config.json of another model?")


def _empty_model(
    shape: ModelShape,
    device: torch.device,
    dtype: torch.dtype,
    parallel: Parallel,
    unquantized: set[str] | None,
) -> Decoder:
    """The model with parameters that hold whatever the memory held, and its table of rotary angles. ``unquantized`` as
    of the function of this name."""
    with torch.device("meta"):
        model = Decoder(shape, parallel)
    if unquantized is not None:
        quantize_linears(model, unquantized, device, dtype)
    _on_device(model, device, dtype)
    if shape.tied:  # to_empty gives each its own storage
        model.head = model.embed
    model.cos_sin = RopeTable.build(shape.rope, shape.rotary_dim, shape.max_positions, device).cos_sin
    return model


def _on_device(module: M, device: torch.device, dtype: torch.dtype) -> M:
    """A module on the meta device with memory, for inference; parameters of ``dtype``, but buffers as they are: those
    are float32 whatever the weights are."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module.to_empty(device=device).requires_grad_(False).eval()


def _check_shape(name: str, found: list[int], place: Place) -> None:
    if found != list(place.shape):
        raise UserError(f"tensor {name} is {found}, config.json makes it {list(place.shape)}")


def _fill(targets: Mapping[str, Target], name: str, place: Place, part: Tensor) -> None:
    """Puts this rank's part of the checkpoint's tensor ``name`` in its place."""
    target = targets[place.parameter]
    if isinstance(target, QuantizedLinear):
        target.take(place.first, pack_rounded(name, part.to(target.device), place))
        return
    target = target.data
    if place.expert is not None:
        target = target[place.expert]
    target[place.first : place.first + len(part)].copy_(part)


def _fill_quantized(
    targets: Mapping[str, Target], name: str, place: Place, files: TensorFiles, quantization: Quantization
) -> None:
    target = targets[place.parameter]
    if isinstance(target, QuantizedLinear):
        target.take(place.first, read_packed(files, name, place, quantization, target.device))
    else:
        _fill(targets, name, place, read_dequantized(files, name, place, quantization, target.device, target.dtype))


def load_model_for_generate(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, attention: str, random_weights: bool = False
) -> Any:
    """The same checkpoint as ``transformers`` loads it, for its ``generate``. With ``random_weights`` they are those
    that ``transformers`` initialises a model with, which are not those of ``load_model``. Raises UserError if it cannot
    be loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    if not random_weights:
        weight_files(checkpoint.path)  # refuses pickles before transformers would look for them
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


def _eos_token_ids(path: Path, config: dict[str, Any]) -> frozenset[int]:
    generation = path / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    if eos is None:
        eos = config.get("eos_token_id")
    if eos is None:
        return frozenset()
    return frozenset(eos if isinstance(eos, list) else [eos])
