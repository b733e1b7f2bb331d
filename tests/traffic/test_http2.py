from __future__ import annotations

import asyncio
import random

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, RequestReceived, StreamEnded, WindowUpdated

from labkit.traffic.answer import Record
from labkit.traffic.client import Client
from labkit.traffic.http2 import Outbox, not_http2, open_connection
from labkit.traffic.target import Target

BODY = b'{"model": "golden", "stream": true, "messages": []}'
HEADERS = [(b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"x"), (b":path", b"/")]


def test_data_waits_for_the_peers_windows_and_arrives_whole():
    """The peer, h2 as it comes, has the windows of the standard: 65,535 bytes a stream and the same a connection."""
    client, server = open_connection(client=True), H2Connection(H2Configuration(client_side=False))
    server.initiate_connection()
    client.receive_data(server.data_to_send())
    outbox, rng = Outbox(client), random.Random(0)
    bodies = {1: rng.randbytes(200_000), 3: rng.randbytes(65_535), 5: b"", 7: rng.randbytes(1)}
    for number, body in bodies.items():
        client.send_headers(number, HEADERS)
        outbox.put(number, body, end=True)
    got, ended = dict.fromkeys(bodies, b""), []
    while data := client.data_to_send():
        for event in server.receive_data(data):
            if isinstance(event, DataReceived):
                got[event.stream_id] += event.data
                server.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, StreamEnded):
                ended.append(event.stream_id)
        if any(isinstance(event, WindowUpdated) for event in client.receive_data(server.data_to_send())):
            outbox.windows_opened()
    assert got == bodies and sorted(ended) == [1, 3, 5, 7]


class Peer(asyncio.Protocol):
    """Does ``act(self, stream)`` when a request is in; h2 as it comes."""

    def __init__(self, act):
        self.act = act
        self.h2 = H2Connection(H2Configuration(client_side=False))

    def connection_made(self, transport):
        self.transport = transport
        self.h2.initiate_connection()
        transport.write(self.h2.data_to_send())

    def data_received(self, data):
        for event in self.h2.receive_data(data):
            if isinstance(event, RequestReceived):
                self.act(self, event.stream_id)
        self.transport.write(self.h2.data_to_send())


def told(on_loop, factory) -> Record:
    """What the client says of one request to a server of these protocols."""

    async def ask():
        server = await asyncio.get_running_loop().create_server(factory, "127.0.0.1", 0)
        client, record = Client(Target.parse(f"h2c://127.0.0.1:{server.sockets[0].getsockname()[1]}")), Record(0)
        await client.chat(BODY, record, 2.0)
        await client.close()
        server.close()
        return record

    return on_loop(ask())


def headers(peer, stream):
    peer.h2.send_headers(stream, [(":status", "200"), ("content-type", "text/event-stream")])
    peer.transport.write(peer.h2.data_to_send())


@pytest.mark.parametrize(
    ("code", "begun", "kind"),
    [
        (ErrorCodes.REFUSED_STREAM, False, "shed"),
        (ErrorCodes.ENHANCE_YOUR_CALM, False, "shed"),
        (ErrorCodes.INTERNAL_ERROR, False, "connect"),
        (ErrorCodes.CANCEL, True, "truncated"),
    ],
)
def test_a_reset_stream_is_named_by_its_reason(on_loop, code, begun, kind):
    def act(peer, stream):
        if begun:
            headers(peer, stream)
        peer.h2.reset_stream(stream, code)

    record = told(on_loop, lambda: Peer(act))
    assert record.failure == kind and code.name in record.message


@pytest.mark.parametrize(("begun", "kind"), [(False, "connect"), (True, "truncated")])
def test_a_connection_that_is_closed_ends_its_streams(on_loop, begun, kind):
    def act(peer, stream):
        if begun:
            headers(peer, stream)
        peer.transport.close()

    assert told(on_loop, lambda: Peer(act)).failure == kind


def test_a_server_that_always_goes_away_is_not_asked_for_ever(on_loop):
    asked = []

    def act(peer, stream):
        asked.append(stream)
        peer.h2.close_connection(last_stream_id=0)

    record = told(on_loop, lambda: Peer(act))
    assert record.failure == "connect" and "GOAWAY" in record.message and len(asked) == 3


def test_a_server_of_http1_is_told_apart_at_once(on_loop):
    class Old(asyncio.Protocol):
        def connection_made(self, transport):
            transport.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    record = told(on_loop, Old)
    assert record.failure == "protocol" and "does not speak HTTP/2" in record.message and "400 Bad" in record.message
    assert not not_http2(H2Connection(H2Configuration(client_side=True)).data_to_send() + b"\0\0")
