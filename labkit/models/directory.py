"""Where a model's files are and what it is called; without PyTorch, for which not everyone who asks wants to wait."""

from __future__ import annotations

from pathlib import Path

from labkit.errors import UserError

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt"]


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


def name_of(model: str) -> str:
    """What clients call a model: a directory's name, or the hub id."""
    return Path(model).resolve().name if Path(model).is_dir() else model
