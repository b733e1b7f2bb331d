from __future__ import annotations

import socket

import pytest

from labkit.errors import UserError
from labkit.traffic.ask import get_json, server_model
from labkit.traffic.golden import Golden
from labkit.traffic.target import TLS_ALWAYS, TRANSPORTS, Target


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_server_names_its_model_over_every_transport(certificate, transport):
    tls = certificate if transport in TLS_ALWAYS else None
    with Golden(transport=transport, certificate=tls) as golden:
        target = Target.parse(golden.url, None, transport, cafile=str(certificate.certificate))
        assert server_model(target) == ("" if transport == "grpc" else "golden")
        if transport != "grpc":
            assert get_json(target, "/health") == (200, {}) and get_json(target, "/nothing")[0] == 404


@pytest.mark.parametrize(("scheme", "transport"), [("http", None), ("h2c", None), ("https", "http/3"), ("grpc", None)])
def test_a_server_that_is_not_there_is_said(scheme, transport):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match="no server listens"):
            server_model(Target.parse(f"{scheme}://127.0.0.1:{unused.getsockname()[1]}", transport=transport))


def test_a_certificate_over_http3_that_is_not_trusted_is_said(certificate, capfd):
    with Golden(transport="http/3", certificate=certificate) as golden:
        with pytest.raises(UserError, match="is not trusted: self-signed certificate; .* --cafile"):
            server_model(Target.parse(golden.url, transport="http/3"))
    assert capfd.readouterr().err == ""


def test_the_wrong_protocol_is_said():
    with Golden() as golden, pytest.raises(UserError, match="answer over http/2: .* what it speaks"):
        get_json(Target.parse(golden.url.replace("http:", "h2c:")), "/health", timeout_s=0.5)
    with Golden(transport="http/2") as golden, pytest.raises(UserError, match="answer over http/1.1: "):
        get_json(Target.parse(golden.url.replace("h2c:", "http:")), "/health", timeout_s=0.5)
    with Golden() as golden, pytest.raises(UserError, match="answer over grpc: .* what it speaks"):
        server_model(Target.parse(golden.url.replace("http:", "grpc:")))
