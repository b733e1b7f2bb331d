"""The tokenizer of a server that runs no model, without ``transformers``, which takes seconds to load PyTorch.

It reads tokenizer.json and the chat template itself. ``transformers`` puts the rules of a model's family for splitting
text in place of the file's, so that a few words may fall into other tokens there: that matters to a model, but not to
who only counts them. Where these files are not enough, ``transformers`` is loaded after all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from labkit.models.directory import resolve_model

_GIVEN = {"messages", "add_generation_prompt"}


class LightTokenizer:
    """As much of a tokenizer of ``transformers``, by its names, as serving needs where no model runs."""

    unk_token_id: int | None = None
    """A text that is no token has no id here."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError for a template that only ``transformers`` can fill in, and whatever the files raise."""
        config = json.loads((path / "tokenizer_config.json").read_text())
        self.backend_tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        beside = path / "chat_template.jinja"
        self.chat_template: str | None = beside.read_text() if beside.exists() else config.get("chat_template")
        self._names = _special_tokens(config) | {"tools": None, "documents": None}
        self._template = _compiled(self.chat_template, _GIVEN | set(self._names)) if self.chat_template else None

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.backend_tokenizer.token_to_id(token)

    def apply_chat_template(
        self, messages: list[dict[str, str]], add_generation_prompt: bool, tokenize: bool = False
    ) -> str:
        """The prompt as text, so ``tokenize`` is False. Raises TemplateError for messages that the template refuses."""
        assert self._template is not None and not tokenize
        return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **self._names)


def light_tokenizer(model: str) -> Any:
    """The tokenizer of a directory or hub id, by ``transformers`` only where there is no other way. Raises UserError
    when there is none."""
    path = resolve_model(model)
    try:
        return LightTokenizer(path)
    except Exception:  # tokenizers raises no kinds of its own; transformers loads it, or says what is wrong with it
        from labkit.models.loading import load_tokenizer

        return load_tokenizer(str(path))


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """By the names under which templates ask for them."""
    tokens = {name: value for name, value in config.items() if name.endswith("_token") and value}
    return {name: value["content"] if isinstance(value, dict) else value for name, value in tokens.items()}


def _compiled(text: str, given: set[str]) -> Template:
    """A chat template as ``transformers`` compiles it. Raises ValueError for one that needs more than is there."""
    # Whoever made the model wrote it: it may do no more here than it may there.
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.globals["raise_exception"] = _refuse
    unknown = meta.find_undeclared_variables(sandbox.parse(text)) - given - set(sandbox.globals)
    if unknown or "tojson" in text:  # theirs writes other JSON than Jinja's
        raise ValueError(f"the chat template needs {', '.join(sorted(unknown)) or 'tojson'}")
    return sandbox.from_string(text)


def _refuse(message: str) -> None:
    raise TemplateError(message)
