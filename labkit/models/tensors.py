"""The files of a checkpoint. Only safetensors are read: a pickle can run code of its author."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from labkit.errors import UserError


class TensorFiles:
    """The tensors of a model directory by name, whichever of its files they are in. A context manager.

    Every method raises UserError for a file that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = ExitStack()
        self._homes: dict[str, tuple[Path, Any]] = {}

    def __enter__(self) -> TensorFiles:
        try:
            for file in weight_files(self.path):
                with _explained(file):
                    handle = self._stack.enter_context(safe_open(file, framework="pt"))
                    self._homes |= dict.fromkeys(handle.keys(), (file, handle))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """In the order of the files."""
        return list(self._homes)

    def __contains__(self, name: str) -> bool:
        return name in self._homes

    def shape(self, name: str) -> list[int]:
        file, handle = self._homes[name]
        with _explained(file):
            return list(handle.get_slice(name).get_shape())

    def part(self, name: str, part: tuple[slice, ...]) -> Tensor:
        """This part of a tensor, on the CPU; no other part is read."""
        file, handle = self._homes[name]
        with _explained(file):
            read: Tensor = handle.get_slice(name)[part]
            return read


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); fetch it again") from error


def weight_files(path: Path) -> list[Path]:
    """The safetensors of a model directory. Raises UserError when there are none, or some are missing."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
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


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError for a file that is missing or no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; is {path.parent} a Hugging Face model directory?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is no JSON object")
    return found
