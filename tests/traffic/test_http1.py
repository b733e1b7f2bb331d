from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.traffic.http1 import ProtocolError, ResponseParser, SseParser

payloads = st.lists(st.binary(min_size=1, max_size=40).filter(lambda b: b"\n" not in b and b"\r" not in b), max_size=6)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({min(c, len(data)) for c in cuts} | {0, len(data)})
    return [data[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def read(pieces: list[bytes]) -> tuple[ResponseParser, bytes]:
    parser = ResponseParser()
    return parser, b"".join([parser.feed(piece) for piece in pieces])


@given(
    chunks=st.lists(st.binary(min_size=1, max_size=50), max_size=6),
    cuts=st.lists(st.integers(0, 700), max_size=30),
    extension=st.sampled_from([b"", b";name=value"]),
    trailer=st.sampled_from([b"", b"X-Sum: 1\r\n"]),
    after=st.binary(max_size=10),
    interim=st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\n\r\n"]),
)
def test_a_chunked_response_reads_the_same_however_it_is_cut(chunks, cuts, extension, trailer, after, interim):
    wire = interim + b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-A: b\r\n\r\n"
    wire += b"".join(b"%X%b\r\n%b\r\n" % (len(c), extension, c) for c in chunks) + b"0\r\n" + trailer + b"\r\n" + after
    parser, body = read(cut(wire, cuts))
    assert (parser.status, parser.headers["x-a"], parser.done, parser.keep_alive) == (200, "b", True, True)
    assert body == b"".join(chunks)
    assert parser.rest == after


@given(body=st.binary(max_size=80), cuts=st.lists(st.integers(0, 200), max_size=20), after=st.binary(max_size=5))
def test_a_response_of_known_length_reads_the_same_however_it_is_cut(body, cuts, after):
    wire = b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body + after
    parser, got = read(cut(wire, cuts))
    assert (parser.status, parser.done, parser.keep_alive, got, parser.rest) == (404, True, False, body, after)


@given(body=st.binary(max_size=80), cuts=st.lists(st.integers(0, 200), max_size=20))
def test_a_response_without_length_ends_with_the_connection(body, cuts):
    parser, got = read(cut(b"HTTP/1.0 200 OK\r\nX: y\r\n\r\n" + body, cuts))
    assert not parser.done and got == body
    assert parser.eof() and parser.done and not parser.keep_alive


@given(st.binary(min_size=1, max_size=20), st.integers(1, 40))
def test_a_cut_off_chunked_response_is_never_done(body, missing):
    wire = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    parser, _ = read([wire[: max(0, len(wire) - missing)]])
    assert not parser.done and not parser.eof()


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=10))
def test_any_bytes_are_read_or_refused(data, cuts):
    try:
        read(cut(data, cuts))
    except ProtocolError:
        pass


@pytest.mark.parametrize(
    "wire",
    [
        b"220 smtp ready\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n",
    ],
)
def test_what_is_not_http_is_refused(wire):
    with pytest.raises(ProtocolError):
        read([wire])


@given(payloads=payloads, cuts=st.lists(st.integers(0, 500), max_size=30), ending=st.sampled_from([b"\n", b"\r\n"]))
def test_events_read_the_same_however_they_are_cut(payloads, cuts, ending):
    wire = b": comment" + ending + b"".join(b"event: x%bdata: %b%b%b" % (ending, p, ending, ending) for p in payloads)
    parser = SseParser()
    assert [event for piece in cut(wire, cuts) for event in parser.feed(piece)] == payloads


def test_several_data_lines_are_one_event():
    assert SseParser().feed(b"data: a\ndata:b\n\ndata: c\n") == [b"a\nb"]
