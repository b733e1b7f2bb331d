"""The gRPC client against peers that say exactly what a test wants, frame by frame."""

from __future__ import annotations

import asyncio

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, RequestReceived, StreamEnded

from labkit.traffic.answer import Record
from labkit.traffic.client import Client
from labkit.traffic.client_grpc import GrpcAnswer, Status
from labkit.traffic.grpc_messages import MOST_MESSAGE_BYTES, PREFIX_BYTES, framed
from labkit.traffic.target import Target
from labkit.wire.generation_pb2 import GenerateChunk, GenerateRequest, Usage

BODY = b'{"messages": [{"role": "user", "content": "?"}], "max_tokens": 5, "temperature": 0}'
HEAD = [(":status", "200"), ("content-type", "application/grpc")]
OK = [("grpc-status", "0")]
CHUNKS = [
    GenerateChunk(reasoning="r", tokens=1),
    GenerateChunk(text="a" * 300, tokens=3),
    GenerateChunk(finish_reason="stop", usage=Usage(prompt_tokens=7, completion_tokens=4)),
]
WHOLE = b"".join(framed(chunk.SerializeToString()) for chunk in CHUNKS)


class Peer(asyncio.Protocol):
    """Says ``act(h2, stream)`` when a request is in; ``request`` and ``sent`` are what came."""

    def __init__(self, act):
        self.act, self.sent = act, b""
        self.h2 = H2Connection(H2Configuration(client_side=False))

    def connection_made(self, transport):
        self.transport = transport
        self.h2.initiate_connection()
        transport.write(self.h2.data_to_send())

    def data_received(self, data):
        for event in self.h2.receive_data(data):
            if isinstance(event, RequestReceived):
                self.request = dict(event.headers)
            elif isinstance(event, DataReceived):
                self.sent += event.data
            elif isinstance(event, StreamEnded):
                self.act(self.h2, event.stream_id)
        self.transport.write(self.h2.data_to_send())


@pytest.fixture
def told(on_loop):
    """What the client says of one request to a peer that does ``act``, and the peer."""

    async def ask(act, timeout_s):
        peers = []

        def factory():
            peers.append(Peer(act))
            return peers[-1]

        server = await asyncio.get_running_loop().create_server(factory, "127.0.0.1", 0)
        target = Target.parse(f"grpc://127.0.0.1:{server.sockets[0].getsockname()[1]}", "KEY")
        client, record = Client(target), Record(6)
        await client.chat(BODY, record, timeout_s)
        await client.close()
        server.close()
        return record, peers[-1]

    return lambda act, timeout_s=2.0: on_loop(ask(act, timeout_s))


def says(*pieces, trailers=OK, head=HEAD):
    """Headers, each piece in a frame of its own, trailers."""

    def act(h2, stream):
        h2.send_headers(stream, head, end_stream=not pieces and not trailers)
        for piece in pieces:
            h2.send_data(stream, piece)
        if trailers:
            h2.send_headers(stream, trailers, end_stream=True)

    return act


def test_the_request_is_one_message_with_the_headers_of_grpc(told):
    record, peer = told(says(WHOLE))
    assert record.failure == ""
    heads = peer.request
    assert heads[b":method"] == b"POST" and heads[b":path"] == b"/labkit.v1.Generation/Generate"
    assert heads[b"te"] == b"trailers" and heads[b"content-type"] == b"application/grpc"
    assert heads[b"authorization"] == b"Bearer KEY" and b"content-length" not in heads
    assert heads[b"grpc-timeout"].endswith(b"m") and 1000 < int(heads[b"grpc-timeout"][:-1]) <= 2000
    assert peer.sent[:PREFIX_BYTES] == b"\0" + (len(peer.sent) - PREFIX_BYTES).to_bytes(4, "big")
    asked = GenerateRequest.FromString(peer.sent[PREFIX_BYTES:])
    assert asked.messages[0].content == "?" and asked.request_id == "6" and asked.HasField("temperature")


@pytest.mark.parametrize("size", [1, 4, 5, 6, 100, 1000])
def test_messages_may_come_in_any_pieces(told, size):
    record, _ = told(says(*(WHOLE[at : at + size] for at in range(0, len(WHOLE), size))))
    assert record.failure == "" and (record.reasoning, record.text) == ("r", "a" * 300)
    assert [(tokens, part) for _, tokens, part in record.chunks] == [(1, "reasoning"), (3, "answer")]
    assert (record.finish_reason, record.prompt_tokens, record.completion_tokens) == ("stop", 7, 4)


@pytest.mark.parametrize(
    ("act", "kind", "words"),
    [
        (says(b"\1" + WHOLE[1:]), "protocol", "compressed"),
        (says(b"\0" + (MOST_MESSAGE_BYTES + 1).to_bytes(4, "big")), "protocol", f"at most {MOST_MESSAGE_BYTES}"),
        (says(framed(b"\xff\xff")), "protocol", "no GenerateChunk"),
        (says(WHOLE[:-1]), "truncated", "inside a message"),
        (says(framed(CHUNKS[1].SerializeToString())), "truncated", "finish_reason"),
        (says(trailers=[], head=HEAD), "connect", "without a grpc-status"),
        (says(trailers=[("grpc-status", "x")]), "protocol", "invalid literal"),
        (says(trailers=[("grpc-status", "99"), ("grpc-message", "?")]), "5xx", "UNKNOWN: ?"),
        (says(trailers=[], head=[*HEAD, ("grpc-status", "14"), ("grpc-message", "50%25 %C3%A4")]), "shed", ": 50% ä"),
        (says(WHOLE, trailers=[("grpc-status", "13")]), "stream_error", "INTERNAL"),
        (says(trailers=[], head=[(":status", "200"), ("content-type", "text/html")]), "protocol", "text/html"),
        (says(trailers=[], head=[(":status", "404")]), "4xx", "UNIMPLEMENTED: HTTP status 404"),
        (says(trailers=[], head=[(":status", "502")]), "shed", "UNAVAILABLE"),
    ],
)
def test_what_is_not_a_whole_answer_has_its_name(told, act, kind, words):
    record, _ = told(act)
    assert record.failure == kind and words in record.message


@pytest.mark.parametrize(
    ("code", "pieces", "kind"),
    [
        (ErrorCodes.REFUSED_STREAM, 0, "shed"),
        (ErrorCodes.ENHANCE_YOUR_CALM, 0, "shed"),
        (ErrorCodes.INTERNAL_ERROR, 0, "connect"),
        (ErrorCodes.CANCEL, 1, "truncated"),
    ],
)
def test_a_reset_stream_is_named_by_its_reason_and_by_whether_a_chunk_came(told, code, pieces, kind):
    def act(h2, stream):
        says(*[framed(CHUNKS[0].SerializeToString())] * pieces, trailers=[])(h2, stream) if pieces else None
        h2.reset_stream(stream, code)

    record, _ = told(act)
    assert record.failure == kind and code.name in record.message


def test_a_deadline_that_passes_is_a_timeout_and_cancels_the_call(told):
    record, _ = told(says(WHOLE[:10], trailers=[]), timeout_s=0.2)
    assert record.failure == "timeout"


@pytest.mark.parametrize(
    ("code", "words", "kind", "after"),
    [
        (Status.CANCELLED, "gone", "connect", "truncated"),
        (Status.UNAVAILABLE, "the model is loading", "shed", "stream_error"),
        (Status.INTERNAL, "CUDA error", "5xx", "stream_error"),
        (Status.NOT_FOUND, "no such model", "4xx", "stream_error"),
        (Status.DEADLINE_EXCEEDED, "Deadline Exceeded", "timeout", "timeout"),
    ],
)
def test_a_status_of_grpc_is_a_kind_of_failure(on_loop, code, words, kind, after):
    async def failure(begun):
        answer = GrpcAnswer(Record(0), asyncio.get_running_loop())
        if begun:
            answer.chunk(GenerateChunk(text="a", tokens=1), 1.0)
        answer.refused(code, words, 2.0)
        return answer.record.failure

    assert (on_loop(failure(False)), on_loop(failure(True))) == (kind, after)
