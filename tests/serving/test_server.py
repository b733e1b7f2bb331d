"""The server as a process: start, address, signals, an end in every case."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from labkit.cli import app
from labkit.errors import UserError
from labkit.models.directory import name_of
from labkit.serving.http import listen
from labkit.serving.server import default_temperature

START = [sys.executable, "-m", "labkit.cli", "serve"]


@contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.wait(10)
        if child.stdout is not None:
            child.stdout.close()


def url_of(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    lines = []
    for line in child.stdout:
        lines.append(line)
        if found := re.search(r"^labkit: ready on (http://127\.0\.0\.1:\d+)$", line):
            return found[1]
    raise AssertionError("".join(lines))


def gone(url: str) -> bool:
    try:
        httpx.get(url + "/health", timeout=2)
    except httpx.ConnectError:
        return True
    except httpx.TransportError:
        return False
    return False


def test_a_server_from_start_to_sigterm(helpers: Any, tiny_model: Path) -> None:
    with process(*START, str(tiny_model), "--port", "0", "--set", "max_batch=4", "--api-key", "k") as child:
        url = url_of(child)
        key = {"authorization": "Bearer k"}
        assert httpx.get(url + "/health").status_code == 200
        assert httpx.get(url + "/v1/models", headers=key).json()["data"][0]["id"] == "tiny"
        answer = httpx.post(url + "/v1/chat/completions", json=helpers.chat(max_tokens=4), headers=key).json()
        assert answer["usage"]["completion_tokens"] <= 4
        # Far more work than the server lets run on once it is told to stop.
        body = helpers.chat(stream=True, n=128, max_tokens=480, ignore_eos=True)
        with httpx.stream("POST", url + "/v1/chat/completions", json=body, headers=key, timeout=30) as response:
            lines = response.iter_lines()
            assert json.loads(next(lines).removeprefix("data: "))["choices"]
            asked = time.monotonic()
            child.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        assert child.wait(20) == 0
        assert time.monotonic() - asked < 8
        assert "error" in json.loads(last.removeprefix("data: "))
        assert gone(url)


def test_a_server_does_not_outlive_the_process_that_measures_it(tiny_model: Path) -> None:
    start = [*START, str(tiny_model), "--port", "0", "--die-with-parent"]
    code = f"import subprocess; subprocess.run({start!r})"
    with process(sys.executable, "-c", code) as parent:
        url = url_of(parent)
        os.kill(parent.pid, signal.SIGKILL)
        deadline = time.monotonic() + 8
        while not gone(url):
            assert time.monotonic() < deadline, "the server still answers"
            time.sleep(0.05)


def test_a_model_that_cannot_be_loaded_ends_the_server(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with process(*START, str(tmp_path / "broken"), "--port", "0") as child:
        output, _ = child.communicate(timeout=60)
    assert child.returncode == 1
    assert output.strip().splitlines()[-1].startswith(f"labkit: cannot serve {tmp_path}/broken: ")
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["/nowhere/model"], "'/nowhere/model'"),
        (["{empty}"], "config.json"),
        (["{model}", "--set", "max_batch=0"], "at least 1"),
        (["{model}", "--host", "203.0.113.7"], "203.0.113.7"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    tiny_model: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    filled = [each.replace("{model}", str(tiny_model)).replace("{empty}", str(tmp_path)) for each in arguments]
    result = CliRunner().invoke(app, ["serve", *filled])
    assert isinstance(result.exception, UserError)
    assert says in str(result.exception) and "\n" not in str(result.exception)


def test_a_port_in_use_is_an_error_and_port_0_is_free() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert port > 0
        with pytest.raises(UserError, match=f"127.0.0.1:{port}.*in use"):
            listen("127.0.0.1", port)


def test_no_token_waits_for_an_acknowledgement() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        listener.setblocking(True)
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def test_the_default_temperature_is_the_models(tmp_path: Path) -> None:
    assert default_temperature(str(tmp_path)) == 1.0
    for config, expected in (({"do_sample": False}, 0.0), ({"do_sample": True}, 1.0), ({}, 1.0), ([], 1.0)):
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
        assert default_temperature(str(tmp_path)) == expected


def test_a_models_name(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert name_of(f"{tmp_path}/mine/") == "mine"
    assert name_of("org/model-7b") == "org/model-7b"
