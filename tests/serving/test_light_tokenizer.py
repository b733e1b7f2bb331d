"""The tokenizer without ``transformers``: the same tokens where it stands in, and ``transformers`` where it cannot."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jinja2 import TemplateError

from labkit.deployment import SHIPPED_MODEL
from labkit.errors import UserError
from labkit.models.loading import load_tokenizer
from labkit.serving.light_tokenizer import LightTokenizer, light_tokenizer
from labkit.serving.pieces import _single_token
from labkit.serving.prompts import token_ids

CHAT = [
    {"role": "system", "content": "Answer <|im_end|> briefly.\n"},
    {"role": "user", "content": "Which <b>fee</b> is “largest” on 100 shares of AAPL?  \n"},
    {"role": "assistant", "content": "<think>1 + 1</think>2"},
    {"role": "user", "content": ""},
]


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.mark.parametrize("shipped", [True, False])
def test_it_gives_what_transformers_gives(tiny_model: Path, shipped: bool) -> None:
    model = SHIPPED_MODEL if shipped else str(tiny_model)
    light, full = light_tokenizer(model), load_tokenizer(model)
    assert isinstance(light, LightTokenizer) and len(light) == len(full)
    for add in (True, False):
        text = light.apply_chat_template(CHAT, add_generation_prompt=add)
        assert text == full.apply_chat_template(CHAT, add_generation_prompt=add, tokenize=False)
        assert token_ids(light, text) == token_ids(full, text)
    for text in ("</think>", "<|im_end|>", "no token"):
        assert _single_token(light, text) == _single_token(full, text)


def test_a_server_of_a_schedule_loads_no_pytorch() -> None:
    code = (
        "import sys, labkit.serving.server as server\n"
        "from labkit.deployment import Deployment\n"
        "from labkit.serving.schedule import Schedule\n"
        "server._engine(Deployment(), Schedule())\n"
        "print(*{'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_template_may_ask_for_special_tokens_and_refuse(model: Path) -> None:
    _configure(model, bos_token={"content": "<|im_start|>", "__type": "AddedToken"})
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (model / "chat_template.jinja").write_text(
        refusal + "{{ bos_token }}{% for m in messages if not tools %}{{ m.content }}{% endfor %}"
    )
    light = light_tokenizer(str(model))
    assert isinstance(light, LightTokenizer)
    assert light.apply_chat_template([{"role": "user", "content": "a"}], True) == "<|im_start|>a"
    with pytest.raises(TemplateError, match="no system"):
        light.apply_chat_template(CHAT, True)


@pytest.mark.parametrize("template", ["{{ messages | tojson }}", "{{ strftime_now('%Y') }}", "{{ bos_token }}"])
def test_a_template_that_needs_more_is_left_to_transformers(model: Path, template: str) -> None:
    (model / "chat_template.jinja").write_text(template)
    found = light_tokenizer(str(model))
    assert not isinstance(found, LightTokenizer) and found.chat_template == template


def test_without_a_tokenizer_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no tokenizer that can be loaded"):
        light_tokenizer(str(tmp_path))


def _configure(model: Path, **changes: object) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
