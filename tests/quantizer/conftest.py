"""Tiny random models of every architecture, with a tokenizer, and a text to calibrate them on."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

MODELS = Path(__file__).parent.parent / "models"


def module(name: str) -> ModuleType:
    """A module of tests/models, which pytest would not find by its name from here."""
    spec = importlib.util.spec_from_file_location(f"labkit_tests_models_{name}", MODELS / f"{name}.py")
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look their module up
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="session")
def drive() -> ModuleType:
    """The module that drives a model by hand."""
    return module("drive")


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[..., Path]:
    """A function that gives the directory of a model of one of the families, in float32, by its name and what its
    config is to have besides; the same one every time."""
    import transformers

    folder, families = tmp_path_factory.mktemp("quantizer"), module("conftest")

    @cache
    def make(name: str, **changes: Any) -> Path:
        architecture, family = families.FAMILIES[name]
        path = folder / f"{name}-{len(list(folder.iterdir()))}"
        config = getattr(transformers, f"{architecture}Config")(**(families.COMMON | family | changes))
        torch.manual_seed(7)
        model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
        families.spread(model)
        model.save_pretrained(path)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_model / file, path)
        return path

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 6,000 words, as a text file."""
    generator = torch.Generator().manual_seed(1)
    words = (
        "the trade of account fee shares net position blotter buy sell largest quick brown fox 12 250 187.50".split()
    )
    drawn = torch.randint(len(words), (6000,), generator=generator).tolist()
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(" ".join(words[i] for i in drawn) + "\n", encoding="utf-8")
    return path
