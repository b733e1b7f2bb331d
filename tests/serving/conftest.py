"""A server in a thread, in front of an engine whose answers are scripted."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import pytest

from labkit.deployment import Deployment
from labkit.engine import Delta
from labkit.request import EngineStats, SamplingParams
from labkit.serving.app import create_app
from labkit.serving.grpc_server import GrpcServer
from labkit.serving.http import listen, serve_app
from labkit.serving.http3 import listen_http3, serve_http3
from labkit.serving.intake import Service
from labkit.serving.options import ServerOptions
from labkit.serving.tls import Certificate, own_certificate


@dataclasses.dataclass
class ScriptedEngine:
    """Answers every request with ``pieces``, one token each, ``gap_s`` apart; a running request holds one KV block."""

    tokenizer: Any
    deployment: Deployment = dataclasses.field(default_factory=Deployment)
    core: Any = dataclasses.field(default_factory=lambda: SimpleNamespace(max_context=512))
    ready: bool = True
    failed: str | None = None
    pieces: tuple[str, ...] = ("Hello", " world", "!")
    gap_s: float = 0.0
    refusal: Exception | None = None
    fail_after: int | None = None
    failure: Exception | None = None
    finish_reason: str = "stop"
    script: Callable[[list[int], SamplingParams], list[Delta]] | None = None
    running: int = 0
    produced: int = 0
    seen: list[tuple[list[int], SamplingParams]] = dataclasses.field(default_factory=list)

    async def stream(self, prompt_ids: list[int], sampling: SamplingParams) -> AsyncIterator[Delta]:
        self.seen.append((prompt_ids, sampling))
        if self.refusal is not None:
            raise self.refusal
        self.running += 1
        try:
            answer = self.script(prompt_ids, sampling) if self.script else self._scripted(sampling)
            for position, delta in enumerate(answer):
                if self.fail_after is not None and position >= self.fail_after and self.failure is not None:
                    raise self.failure
                await asyncio.sleep(self.gap_s)
                self.produced += 1
                yield delta
        finally:
            self.running -= 1

    def _scripted(self, sampling: SamplingParams) -> list[Delta]:
        pieces = self.pieces[: sampling.max_tokens]
        reason = "length" if len(pieces) < len(self.pieces) else self.finish_reason
        return [
            Delta(text=piece, token_ids=(7,), logprobs=(), finish_reason=reason if last else None)
            for piece, last in ((p, i == len(pieces) - 1) for i, p in enumerate(pieces))
        ]

    def stats(self) -> EngineStats:
        return EngineStats(running=self.running, kv_blocks_used=self.running, kv_blocks_total=100)


@contextmanager
def running(
    engine: Any, options: ServerOptions | None = None, transport: str = "http/1.1", tls: Certificate | None = None
) -> Iterator[str]:
    """The URL of a server in front of ``engine``, for as long as the block lasts."""
    service = Service.of(engine, options or ServerOptions(model_name="tiny"))
    started = threading.Event()
    handle: dict[str, Any] = {}

    async def main() -> None:
        handle["loop"], handle["stop"] = asyncio.get_running_loop(), asyncio.Event()
        if transport == "grpc":
            server = GrpcServer(service, "127.0.0.1", 0)
            handle["url"] = f"grpc://127.0.0.1:{server.port}"
            serving = server.serve(handle["stop"])
        elif transport == "http/3":
            assert tls is not None
            listener, udp = listen_http3("127.0.0.1", 0)
            handle["url"] = f"https://127.0.0.1:{listener.getsockname()[1]}"
            serving = serve_http3(create_app(service), udp, listener, handle["stop"], False, tls, drain_s=1.0)
        else:
            listener = listen("127.0.0.1", 0)
            handle["url"] = f"http{'s' if tls else ''}://127.0.0.1:{listener.getsockname()[1]}"
            serving = serve_app(create_app(service), listener, handle["stop"], transport=transport, tls=tls)
        started.set()
        await serving

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    assert started.wait(10)
    _wait_until_served(handle["url"], tls)
    try:
        yield handle["url"]
    finally:
        handle["loop"].call_soon_threadsafe(handle["stop"].set)
        thread.join(15)
    assert not thread.is_alive(), "the server did not stop"


def _wait_until_served(url: str, tls: Certificate | None) -> None:
    if url.startswith("grpc"):
        with grpc.insecure_channel(url.removeprefix("grpc://")) as channel:
            grpc.channel_ready_future(channel).result(10)
        return
    verify = ssl.create_default_context(cafile=str(tls.certificate)) if tls else True
    for _ in range(200):
        try:
            httpx.get(url + "/openapi.json", timeout=5, verify=verify)
            return
        except httpx.TransportError:
            time.sleep(0.02)
    raise AssertionError("the server did not come up")


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def engine(tokenizer: Any) -> ScriptedEngine:
    return ScriptedEngine(tokenizer)


@pytest.fixture
def url(engine: ScriptedEngine) -> Iterator[str]:
    with running(engine) as address:
        yield address


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return own_certificate(directory=tmp_path_factory.mktemp("tls"))


def chat(content: Any = "hello", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **fields}


def events(response: httpx.Response) -> list[Any]:
    """The payloads of an event stream; the last one is ``[DONE]`` where the stream ended as it should."""
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks[-1] == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks[:-1])
    payloads = [block.removeprefix("data: ") for block in blocks[:-1]]
    return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.settimeout(10)
    return connection


def raw_post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: test",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


@pytest.fixture(scope="session")
def helpers() -> Any:
    """The functions above, for the tests of this folder."""
    names = (ScriptedEngine, running, chat, events, connect, raw_post, eventually)
    return SimpleNamespace(**{each.__name__: each for each in names})
