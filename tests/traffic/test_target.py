from __future__ import annotations

import socket
import sys

import pytest

from labkit.errors import UserError
from labkit.traffic import target
from labkit.traffic.golden import Golden
from labkit.traffic.target import Target, parse_connections


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://x:99999", "http://x:port"])
def test_a_bad_address_is_refused(url):
    with pytest.raises(UserError, match="not an address"):
        Target.parse(url)


def test_addresses_say_the_transport():
    assert Target.parse("http://h:81/a/v1/") == Target("h", 81, False, "/a")
    assert Target.parse("https://h") == Target("h", 443, True, transport="alpn")
    assert Target.parse("h2c://h:1").transport == "http/2" and Target.parse("grpc://h:1").transport == "grpc"
    assert Target.parse("http://h:1", transport="http/2") == Target("h", 1, transport="http/2")
    with pytest.raises(UserError, match="http:// address takes 'http/1.1' or 'http/1.1 close' or 'http/2'"):
        Target.parse("http://h", transport="grpc")


def test_connections_are_one_a_stream_over_http1_and_one_in_all_over_the_others():
    assert Target.parse("http://h").shared_by == "each"
    assert Target.parse("h2c://h").shared_by == Target.parse("grpc://h").shared_by == 1
    assert Target.parse("grpc://h", connections="each").shared_by == "each"
    assert (parse_connections(None), parse_connections("each"), parse_connections("12")) == (None, "each", 12)
    with pytest.raises(UserError, match="connections must be"):
        parse_connections("0")
    with pytest.raises(UserError, match="connections must be"):
        Target.parse("http://h", connections=0)


def test_the_connections_of_all_processes_are_those_asked_for():
    shared = Target.parse("h2c://h", connections=8)
    assert [shared.share(number, 3).connections for number in range(3)] == [3, 3, 2]
    each = Target.parse("http://h", connections="each")
    assert each.share(1, 3) == each


@pytest.mark.parametrize("transport", ["http/2 tls", "http/1.1"])
def test_a_server_with_tls_is_asked_what_it_speaks(tmp_path, certificate, transport):
    with Golden(transport=transport, certificate=certificate) as golden:
        assert golden.url.startswith("https://")
        assert Target.parse(golden.url, cafile=str(certificate.certificate)).settled().transport == transport
        with pytest.raises(UserError, match="is not trusted.*--cafile"):
            Target.parse(golden.url).settled()
        with pytest.raises(UserError, match="no file of certificates"):
            Target.parse(golden.url, cafile=str(tmp_path / "none")).settled()


def test_http3_is_asked_for_by_name_and_says_what_it_needs(monkeypatch):
    wanted = Target.parse("https://h", transport="http/3")
    assert wanted.settled() == wanted and (wanted.port, wanted.shared_by) == (443, 1)
    with pytest.raises(UserError, match="does not go with"):
        Target.parse("http://h", transport="http/3")
    monkeypatch.setitem(sys.modules, "aioquic", None)
    with pytest.raises(UserError, match=r"pip install 'labkit\[http3\]'"):
        Target.parse("https://h", transport="http/3")


def test_a_server_without_tls_or_none_at_all_is_said(monkeypatch):
    monkeypatch.setattr(target, "NEGOTIATION_TIMEOUT_S", 0.3)
    with Golden() as golden, pytest.raises(UserError, match="is it an https:// server"):
        Target.parse(golden.url.replace("http://", "https://")).settled()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match="no server listens"):
            Target.parse(f"https://127.0.0.1:{unused.getsockname()[1]}").settled()
