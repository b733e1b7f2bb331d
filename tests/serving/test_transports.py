"""The same answers over every wire, each token as it comes."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from typing import Any

import httpx
import pytest

from labkit.deployment import Deployment
from labkit.probes.engine import EngineProbe
from labkit.serving.options import ServerOptions
from labkit.serving.tls import Certificate
from labkit.traffic.answer import Record
from labkit.traffic.client import Client
from labkit.traffic.target import TLS_ALWAYS, TRANSPORTS, Target

CHAT = "/v1/chat/completions"
PIECES = ("<think>", "add", " them", "</think>", "\n", "é", "世", "!")


def ask(url: str, transport: str, tls: Certificate | None, bodies: list[dict[str, Any]]) -> list[Record]:
    """What the load generator's client makes of the answers, all asked for at once."""
    target = Target.parse(url, transport=transport, cafile=str(tls.certificate) if tls else None)
    records = [Record(index) for index in range(len(bodies))]

    async def main() -> None:
        client = Client(target)
        asked = zip(bodies, records, strict=True)
        await asyncio.gather(*(client.chat(json.dumps(body).encode(), record, 30) for body, record in asked))
        await client.close()

    asyncio.run(main())
    return records


@pytest.fixture(params=TRANSPORTS)
def wire(request: Any, certificate: Certificate) -> tuple[str, Certificate | None]:
    return request.param, certificate if request.param in TLS_ALWAYS else None


def test_the_transports_of_a_deployment_are_those_of_the_client() -> None:
    for transport in TRANSPORTS:
        assert Deployment(transport=transport).transport == transport  # type: ignore[arg-type]


def test_the_same_answer_over_every_transport(helpers: Any, engine: Any, wire: Any) -> None:
    engine.pieces = PIECES
    with helpers.running(engine, None, *wire) as url:
        records = ask(url, *wire, [helpers.chat(stream=True, max_tokens=64)] * 20)
    for record in records:
        assert (record.failure, record.message) == ("", "")
        assert (record.reasoning, record.text, record.finish_reason) == ("add them", "é世!", "stop")
        assert record.completion_tokens == len(PIECES) and record.prompt_tokens == len(engine.seen[0][0])
    assert engine.running == 0 and {tuple(ids) for ids, _ in engine.seen} == {tuple(engine.seen[0][0])}


@pytest.mark.clock
def test_each_token_is_sent_at_once_over_every_transport(helpers: Any, engine: Any, wire: Any) -> None:
    engine.gap_s = 0.15
    with helpers.running(engine, None, *wire) as url:
        (record,) = ask(url, *wire, [helpers.chat(stream=True)])
    assert record.sent is not None and record.text == "Hello world!"
    arrived = [at - record.sent for at, _, _ in record.chunks]
    assert len(arrived) == 3
    for tokens, seconds in enumerate(arrived, 1):
        # Not before its token was there, and before the next one was.
        assert 0.15 * tokens - 0.01 < seconds < 0.15 * (tokens + 1)


@pytest.mark.parametrize(("transport", "kept"), [("http/1.1", True), ("http/1.1 close", False)])
def test_a_connection_is_kept_or_closed(helpers: Any, engine: Any, transport: str, kept: bool) -> None:
    with helpers.running(engine, None, transport) as url, helpers.connect(url) as connection:
        request = helpers.raw_post(CHAT, json.dumps(helpers.chat()).encode())
        connection.sendall(request)
        got = b""
        while b"Hello world!" not in got:
            got += connection.recv(65536)
        assert (b"connection: close" in got) is not kept
        if kept:
            connection.sendall(request)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        else:
            connection.settimeout(5)
            assert connection.recv(65536) in (b"", b"0\r\n\r\n")


def test_tls_agrees_on_http2_and_takes_http1_too(helpers: Any, engine: Any, certificate: Certificate) -> None:
    trusted = ssl.create_default_context(cafile=str(certificate.certificate))
    with helpers.running(engine, None, "http/2 tls", certificate) as url:
        with httpx.Client(http2=True, verify=trusted) as client:
            answer = client.get(url + "/health")
            assert (answer.http_version, answer.status_code) == ("HTTP/2", 200)
        assert httpx.get(url + "/health", verify=trusted).http_version == "HTTP/1.1"
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            httpx.get(url + "/health")
        probe = EngineProbe(url, cafile=str(certificate.certificate))
        assert probe.read()["kv_blocks_total"] == 100
        assert EngineProbe(url).read() == {"answered": 0.0}


def test_refusals_over_http2_are_those_of_http1(helpers: Any, engine: Any) -> None:
    bodies = [b"{", b'{"messages": []}', json.dumps(helpers.chat("x" * 3000)).encode(), b'{"no": 1}']
    options = ServerOptions(model_name="tiny", max_body_bytes=2000)
    with helpers.running(engine, options, "http/2") as url:
        with httpx.Client(http1=False, http2=True) as over2, httpx.Client() as over1:
            for body in bodies:
                headers = {"content-type": "application/json"}
                answers = [each.post(url + CHAT, content=body, headers=headers) for each in (over1, over2)]
                assert [each.http_version for each in answers] == ["HTTP/1.1", "HTTP/2"]
                assert answers[0].status_code == answers[1].status_code in (400, 413)
                assert answers[0].json() == answers[1].json()


@pytest.mark.parametrize("transport", ["http/1.1", "http/2"])
def test_a_body_may_come_in_chunks_and_is_bounded(helpers: Any, engine: Any, transport: str) -> None:
    body = json.dumps(helpers.chat("y" * 1500)).encode()
    engine.core.max_context = 10**5
    with helpers.running(engine, ServerOptions(model_name="tiny", max_body_bytes=2000), transport) as url:
        with httpx.Client(http1=transport == "http/1.1", http2=transport == "http/2") as client:

            def post(count: int, pause_s: float = 0.0) -> httpx.Response:
                def chunks() -> Any:
                    for start in range(0, len(body) * count, 100):
                        time.sleep(pause_s)
                        yield (body * count)[start : start + 100]

                return client.post(url + CHAT, content=chunks(), headers={"content-type": "application/json"})

            assert post(1).json()["choices"][0]["message"]["content"] == "Hello world!"
            assert post(1, 0.01).status_code == 200
            too_large = post(2)
            assert too_large.status_code == 413 and "2000 bytes" in too_large.json()["error"]["message"]
    assert len(engine.seen) == 2
