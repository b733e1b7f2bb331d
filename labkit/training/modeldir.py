"""The shipped model's directory: what plain ``transformers`` loads, written file by file, the configuration last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from labkit.errors import UserError
from labkit.files import write_atomic, writing_atomic
from labkit.training.network import Network, Shape, rope_tables
from labkit.training.tokenizer import CONTEXT, END_OF_TEXT, TURN_END, write_tokenizer


def write_model(network: Network, tokenizer: Tokenizer, directory: Path) -> None:
    """Writes weights (bf16, one ``model.safetensors``), tokenizer and configuration, which makes it a model, last.

    Raises OSError (disk full, no permission).
    """
    directory.mkdir(parents=True, exist_ok=True)
    # what stands there is no model while its files are replaced
    (directory / "config.json").unlink(missing_ok=True)
    weights = {
        f"model.{name}": value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in network.model.named_parameters()
    }
    _write_weights(weights, directory)
    write_tokenizer(tokenizer, directory)
    generation = {
        "do_sample": False,
        "eos_token_id": tokenizer.token_to_id(TURN_END),
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "max_new_tokens": 256,
    }
    write_atomic(directory / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    write_atomic(directory / "config.json", json.dumps(model_config(network.shape, tokenizer), indent=2) + "\n")


def _write_weights(weights: dict[str, torch.Tensor], directory: Path) -> None:
    for stale in (*directory.glob("model-*-of-*.safetensors"), directory / "model.safetensors.index.json"):
        stale.unlink(missing_ok=True)
    with writing_atomic(directory / "model.safetensors") as beside:
        save_tensors(weights, beside, {"format": "pt"})


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file that everyone may read. Raises OSError, also for an error of safetensors."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    path.chmod(0o644)


def model_config(shape: Shape, tokenizer: Tokenizer) -> dict[str, object]:
    """The ``config.json`` of a Qwen2 model of this shape, with the rope base where old and new readers look for it."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"},
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(TURN_END),
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def read_model(directory: Path, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> tuple[Network, Tokenizer]:
    """Reads back what ``write_model`` wrote, or the same in parts. Raises UserError if it is not such a directory."""
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} holds no model (no config.json); give the directory that `labkit train` wrote")
    try:
        shape = _shape_of(json.loads((directory / "config.json").read_text()))
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        weights: dict[str, torch.Tensor] = {}
        for file in sorted(directory.glob("model*.safetensors")):
            weights |= load_file(file)
        network = Network(shape).to(dtype)
        network.load_state_dict(weights)
    except UserError as error:
        raise UserError(f"{directory} is no ledger model: {error}") from error
    except Exception as error:  # tokenizers raises plain Exception
        # torch names what is missing in the second line
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])[:200] or type(error).__name__
        raise UserError(f"{directory} is damaged or incomplete ({reason}); train or copy it again") from error
    network.cos, network.sin = rope_tables(shape)
    return network.to(device), tokenizer


def _shape_of(config: dict[str, Any]) -> Shape:
    if config.get("model_type") != "qwen2" or not config.get("tie_word_embeddings"):
        raise UserError("its config.json is not of a qwen2 model with tied embeddings")
    return Shape(
        vocabulary=config["vocab_size"],
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        intermediate=config["intermediate_size"],
        context=config.get("max_position_embeddings", CONTEXT),
        rope_theta=config.get("rope_theta") or config["rope_parameters"]["rope_theta"],
        norm_eps=config["rms_norm_eps"],
    )
