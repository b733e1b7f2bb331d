"""The generated code is what protoc makes of the definition."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ("generation_pb2.py", "generation_pb2.pyi", "generation_pb2_grpc.py")


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wire")
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT), f"--python_out={out}", f"--pyi_out={out}"]
    subprocess.run([*command, f"--grpc_python_out={out}", "labkit/wire/generation.proto"], check=True, cwd=ROOT)
    return out / "labkit" / "wire"


@pytest.mark.parametrize("name", FILES)
def test_the_generated_code_is_made_from_the_definition(generated: Path, name: str) -> None:
    assert (ROOT / "labkit" / "wire" / name).read_text() == (generated / name).read_text()


def test_the_fields_have_the_numbers_that_clients_were_built_with() -> None:
    from labkit.wire import generation_pb2

    numbers = {
        name: {field.name: field.number for field in message.fields}
        for name, message in generation_pb2.DESCRIPTOR.message_types_by_name.items()
    }
    assert numbers == {
        "Message": {"role": 1, "content": 2},
        "GenerateRequest": {
            "messages": 1,
            "prompt": 2,
            "max_tokens": 3,
            "temperature": 4,
            "ignore_eos": 5,
            "model": 6,
            "request_id": 7,
        },
        "Usage": {"prompt_tokens": 1, "completion_tokens": 2},
        "GenerateChunk": {"reasoning": 1, "text": 2, "tokens": 3, "finish_reason": 4, "usage": 5},
    }
    (method,) = generation_pb2.DESCRIPTOR.services_by_name["Generation"].methods
    assert (method.name, method.client_streaming, method.server_streaming) == ("Generate", False, True)
