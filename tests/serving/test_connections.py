"""What clients do to a connection: leave, stop reading, dawdle, send what is no HTTP."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

import httpx
import pytest

from labkit.serving.options import ServerOptions

CHAT = "/v1/chat/completions"
HEAD = "Host: test\r\nContent-Type: application/json\r\n"


def leave(connection: socket.socket, how: str) -> None:
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def read(connection: socket.socket, until: bytes = b"", seconds: float = 10.0) -> bytes:
    """What comes up to ``until``, or to the end of the connection."""
    connection.settimeout(seconds)
    got = b""
    while not until or until not in got:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            break
        if not piece:
            break
        got += piece
    return got


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("fields", [{"stream": True}, {"stream": False}, {"stream": True, "n": 3}, {"n": 3}])
def test_a_client_that_leaves_frees_what_it_held(helpers: Any, url: str, engine: Any, how: str, fields: Any) -> None:
    engine.pieces, engine.gap_s = ("word ",) * 10_000, 0.005
    connection = helpers.connect(url)
    connection.sendall(helpers.raw_post(CHAT, json.dumps(helpers.chat(max_tokens=400, **fields)).encode()))
    assert helpers.eventually(lambda: engine.produced >= 3)
    if fields.get("stream"):
        assert b"word" in read(connection, until=b"word")
    assert httpx.get(url + "/stats").json()["kv_blocks_used"] == fields.get("n", 1)
    leave(connection, how)
    assert helpers.eventually(lambda: httpx.get(url + "/stats").json()["kv_blocks_used"] == 0, 2.0)
    assert 'outcome="cancelled"} 1.0' in httpx.get(url + "/metrics").text


def test_a_client_that_leaves_before_the_first_token(helpers: Any, url: str, engine: Any) -> None:
    engine.gap_s = 30.0
    connection = helpers.connect(url)
    connection.sendall(helpers.raw_post(CHAT, json.dumps(helpers.chat(stream=True)).encode()))
    assert helpers.eventually(lambda: engine.running == 1)
    leave(connection, "close")
    assert helpers.eventually(lambda: engine.running == 0, 2.0)


def test_a_client_that_leaves_in_the_middle_of_its_request(helpers: Any, url: str, engine: Any) -> None:
    whole = helpers.raw_post(CHAT, json.dumps(helpers.chat("x" * 10_000)).encode())
    for size in (10, 60, 200, len(whole) - 1):
        connection = helpers.connect(url)
        connection.sendall(whole[:size])
        leave(connection, "reset" if size % 20 else "close")
    assert httpx.post(url + CHAT, json=helpers.chat()).status_code == 200
    assert engine.running == 0 and len(engine.seen) == 1


def test_a_client_that_does_not_read_holds_little_and_not_for_long(helpers: Any, engine: Any) -> None:
    engine.core.max_context = 10**6
    engine.pieces = ("x" * 2_000,) * 20_000  # 40 MB, far more than sockets buffer
    with helpers.running(engine, ServerOptions(send_timeout_s=0.5)) as url:
        connection = helpers.connect(url)
        connection.sendall(helpers.raw_post(CHAT, json.dumps(helpers.chat(stream=True, max_tokens=20_000)).encode()))
        assert helpers.eventually(lambda: engine.running == 1)
        assert helpers.eventually(lambda: engine.running == 0, 10.0), "the request was not given up"
        assert engine.produced < 10_000, "an answer that nobody reads was taken in whole"
        assert 'kind="client_not_reading"} 1.0' in httpx.get(url + "/metrics").text
        assert b"[DONE]" not in read(connection)


def test_a_slow_reader_gets_everything(helpers: Any, engine: Any) -> None:
    engine.core.max_context = 10**6
    engine.pieces = ("x" * 2_000,) * 3_000
    with helpers.running(engine, ServerOptions(send_timeout_s=5.0)) as url:
        connection = helpers.connect(url)
        connection.sendall(helpers.raw_post(CHAT, json.dumps(helpers.chat(stream=True, max_tokens=3_000)).encode()))
        time.sleep(1.0)
        assert engine.running == 1
        got = read(connection, until=b"[DONE]", seconds=20)
    assert got.count(b"x" * 2_000) == 3_000


@pytest.mark.clock
def test_the_first_byte_comes_with_the_first_token_and_each_token_at_once(helpers: Any, url: str, engine: Any) -> None:
    engine.gap_s = 0.2
    connection = helpers.connect(url)
    sent = time.monotonic()
    connection.sendall(helpers.raw_post(CHAT, json.dumps(helpers.chat(stream=True)).encode()))
    for tokens, piece in ((1, b"HTTP/1.1 200"), (2, b" world"), (3, b"[DONE]")):
        read(connection, until=piece)
        # Not before its token was there, and before the next one was.
        assert 0.19 * tokens < time.monotonic() - sent < 0.2 * (tokens + 1)


def test_a_long_prompt_does_not_hold_up_the_others(helpers: Any, url: str, engine: Any, monkeypatch: Any) -> None:
    import threading

    begun, go = threading.Event(), threading.Event()
    original = engine.tokenizer.apply_chat_template

    def slow(messages: Any, **kwargs: Any) -> Any:
        if len(messages[0]["content"]) > 100_000:
            begun.set()
            assert go.wait(10)
        return original(messages, **kwargs)

    monkeypatch.setattr(engine.tokenizer, "apply_chat_template", slow)
    connection = helpers.connect(url)
    connection.sendall(helpers.raw_post(CHAT, json.dumps(helpers.chat("x " * 100_000)).encode()))
    try:
        assert begun.wait(10)
        assert httpx.post(url + CHAT, json=helpers.chat(), timeout=5).status_code == 200
    finally:
        go.set()
    assert read(connection, until=b"\r\n").startswith(b"HTTP/1.1 400")


def test_a_request_one_byte_at_a_time(helpers: Any, url: str) -> None:
    connection = helpers.connect(url)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in helpers.raw_post(CHAT, json.dumps(helpers.chat()).encode()):
        connection.sendall(bytes([byte]))
    assert read(connection, until=b"Hello world!").startswith(b"HTTP/1.1 200")


def test_a_body_that_never_comes(helpers: Any, engine: Any) -> None:
    with helpers.running(engine, ServerOptions(body_timeout_s=0.3)) as url:
        connection = helpers.connect(url)
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\n{HEAD}Content-Length: 100\r\n\r\n{{".encode())
        answer = read(connection)
    assert answer.startswith(b"HTTP/1.1 408") and b"0.3 s" in answer


def test_pipelined_requests_are_answered_in_order(helpers: Any, url: str, engine: Any) -> None:
    engine.script, engine.gap_s = None, 0.02
    connection = helpers.connect(url)
    bodies = [json.dumps(helpers.chat(max_tokens=count)).encode() for count in (1, 2, 3)]
    connection.sendall(b"".join(helpers.raw_post(CHAT, body) for body in bodies))
    answers = read(connection, until=b"Hello world!")
    assert answers.count(b"HTTP/1.1 200") == 3
    positions = [answers.index(text) for text in (b'"Hello"', b'"Hello world"', b'"Hello world!"')]
    assert positions == sorted(positions)


HOSTILE = {
    "not HTTP": b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03\r\n\r\n",
    "no host or version": b"GET /\r\n\r\n",
    "endless header": b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
    "many headers": b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 5_000 + b"\r\n",
    "bad chunk size": f"POST {CHAT} HTTP/1.1\r\n{HEAD}Transfer-Encoding: chunked\r\n\r\nZZ\r\nabc\r\n".encode(),
    "huge chunk size": f"POST {CHAT} HTTP/1.1\r\n{HEAD}Transfer-Encoding: chunked\r\n\r\n{'f' * 40}\r\nabc".encode(),
    "chunk over its size": f"POST {CHAT} HTTP/1.1\r\n{HEAD}Transfer-Encoding: chunked\r\n\r\n2\r\nabcdef\r\n".encode(),
    "negative length": f"POST {CHAT} HTTP/1.1\r\n{HEAD}Content-Length: -1\r\n\r\n".encode(),
    "two lengths": f"POST {CHAT} HTTP/1.1\r\n{HEAD}Content-Length: 2\r\nContent-Length: 3\r\n\r\nabc".encode(),
    "unknown coding": f"POST {CHAT} HTTP/1.1\r\n{HEAD}Transfer-Encoding: gzip\r\n\r\nabc".encode(),
    "length of digits": f"POST {CHAT} HTTP/1.1\r\n{HEAD}Content-Length: {'9' * 30}\r\n\r\nabc".encode(),
    "no body": f"POST {CHAT} HTTP/1.1\r\n{HEAD}\r\n".encode(),
    "path of bytes": b"GET /%ff%00%zz/../../etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "odd method": b"BREW /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_proper_request_gets_a_4xx_or_a_closed_connection(helpers: Any, url: str, name: str) -> None:
    connection = helpers.connect(url)
    try:
        connection.sendall(HOSTILE[name])
        connection.shutdown(socket.SHUT_WR)
    except (BrokenPipeError, ConnectionResetError, OSError):
        pass
    answer = read(connection)
    assert answer == b"" or answer.split(b" ", 2)[1].startswith(b"4"), answer[:100]
    assert httpx.post(url + CHAT, json=helpers.chat()).status_code == 200


def test_http_1_0_gets_a_stream_without_chunked_coding(helpers: Any, url: str) -> None:
    connection = helpers.connect(url)
    body = json.dumps(helpers.chat(stream=True)).encode()
    connection.sendall(helpers.raw_post(CHAT, body).replace(b"HTTP/1.1", b"HTTP/1.0"))
    head, _, content = read(connection).partition(b"\r\n\r\n")
    assert b"200" in head and b"chunked" not in head.lower()
    assert content.startswith(b"data: {") and content.endswith(b"data: [DONE]\n\n")


def test_a_large_body_refused_early_is_still_answered(helpers: Any, engine: Any) -> None:
    with helpers.running(engine, ServerOptions(max_body_bytes=1000)) as url:
        for _ in range(5):
            assert httpx.post(url + CHAT, json=helpers.chat("x" * 3_000_000)).status_code == 413


def test_hundreds_of_streams_at_once(helpers: Any, url: str, engine: Any) -> None:
    engine.pieces, engine.gap_s = ("a ",) * 20, 0.05
    body = helpers.raw_post(CHAT, json.dumps(helpers.chat(stream=True)).encode(), "Connection: close")
    connections = [helpers.connect(url) for _ in range(400)]
    for connection in connections:
        connection.sendall(body)
    assert helpers.eventually(lambda: engine.running == 400)
    for connection in connections:
        answer = read(connection, seconds=30)
        assert answer.count(b'"a "') == 20 and b"[DONE]" in answer
        connection.close()
    assert engine.running == 0
