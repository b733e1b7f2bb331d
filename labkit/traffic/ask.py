"""Asking a server about itself, blocking: is it ready, and which model does it have?"""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from labkit.errors import UserError
from labkit.traffic.target import Target, tls_context

ASK_TIMEOUT_S = 10.0


def server_model(target: Target) -> str:
    """The first model that the server names; "" over gRPC, which means the one that it has.

    Raises UserError when nothing (useful) answers or it is not ready yet.
    """
    if target.transport == "grpc":
        _grpc_health(target)
        return ""
    status, _ = get_json(target, "/health")
    if status == 503:
        raise UserError(f"the server at {target.authority} is not ready yet (its /health says 503); try again later")
    status, answer = get_json(target, "/v1/models")
    try:
        return str(answer["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{target.authority} answered {status} to /v1/models and named no model; "
            "is that an OpenAI-compatible server? (--model skips this question)"
        ) from error


def get_json(target: Target, path: str, timeout_s: float = ASK_TIMEOUT_S) -> tuple[int, Any]:
    """Status and JSON body (None where there is none) over the target's HTTP. Raises UserError when nothing answers."""
    gets = {"http/2": _get_http2, "http/2 tls": _get_http2, "http/3": _get_http3}
    try:
        status, body = gets.get(target.transport, _get_http1)(target, path, timeout_s)
    except ConnectionRefusedError as error:
        raise UserError(
            f"no server listens at {target.authority}; start one (labkit serve) or mend the address"
        ) from error
    except socket.gaierror as error:
        raise UserError(f"the host {target.host} is not known: {error.strerror}; mend the address") from error
    except (OSError, http.client.HTTPException) as error:
        why = str(error) or type(error).__name__
        raise _silent(target, why) from error
    try:
        return status, json.loads(body)
    except ValueError:
        return status, None


def _silent(target: Target, why: str) -> UserError:
    return UserError(
        f"the server at {target.authority} does not answer over {target.transport}: {why}; "
        "is that what it speaks? (http://, h2c://, https:// or grpc://)"
    )


def _get_http1(target: Target, path: str, timeout_s: float) -> tuple[int, bytes]:
    connection: http.client.HTTPConnection
    if target.tls:
        context = tls_context(target, "http/1.1")
        connection = http.client.HTTPSConnection(target.host, target.port, timeout=timeout_s, context=context)
    else:
        connection = http.client.HTTPConnection(target.host, target.port, timeout=timeout_s)
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    try:
        connection.request("GET", target.base + path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _get_http2(target: Target, path: str, timeout_s: float) -> tuple[int, bytes]:
    from h2.events import ConnectionTerminated, DataReceived, ResponseReceived, StreamEnded, StreamReset
    from h2.exceptions import ProtocolError

    from labkit.traffic.http2 import not_http2, open_connection

    talk: socket.socket | ssl.SSLSocket = socket.create_connection((target.host, target.port), timeout_s)
    deadline = time.monotonic() + timeout_s
    try:
        if target.tls:
            talk = tls_context(target, "h2").wrap_socket(talk, server_hostname=target.host)
        h2 = open_connection(client=True, ENABLE_PUSH=0)
        headers = [
            (b":method", b"GET"),
            (b":scheme", b"https" if target.tls else b"http"),
            (b":authority", target.authority.encode()),
            (b":path", f"{target.base}{path}".encode()),
        ]
        if target.api_key:
            headers.append((b"authorization", f"Bearer {target.api_key}".encode()))
        h2.send_headers(1, headers, end_stream=True)
        status, body, first = 0, b"", b""
        while True:
            talk.sendall(h2.data_to_send())
            talk.settimeout(max(0.001, deadline - time.monotonic()))
            data = talk.recv(65536)
            first += data[: 4 - len(first)]
            if wrong := not_http2(first + data[4:]):
                raise ConnectionError(wrong)
            for event in h2.receive_data(data):
                if isinstance(event, ResponseReceived):
                    status = int(dict(event.headers)[b":status"])
                elif isinstance(event, DataReceived):
                    body += event.data or b""
                elif isinstance(event, StreamEnded):
                    return status, body
                elif isinstance(event, (StreamReset, ConnectionTerminated)):
                    raise ConnectionError("it broke the answer off")
            if not data:
                raise ConnectionError("it closed the connection")
    except ProtocolError as error:
        raise ConnectionError(f"it does not speak HTTP/2 ({error or type(error).__name__})") from error
    finally:
        talk.close()


def _get_http3(target: Target, path: str, timeout_s: float) -> tuple[int, bytes]:
    from labkit.traffic.client_http3 import get

    # In a thread of its own: whoever asks may be on an event loop.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, get(target, path, timeout_s)).result()


def _grpc_health(target: Target) -> None:
    """Raises UserError unless the server's health service says that it serves."""
    import grpc
    from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

    metadata = (("authorization", f"Bearer {target.api_key}"),) if target.api_key else ()
    # A channel shares what it knows of a server with others of the process; one that was refused must not be believed.
    with grpc.insecure_channel(target.authority, options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=HealthCheckRequest.SerializeToString,
            response_deserializer=HealthCheckResponse.FromString,
        )
        try:
            answer = check(HealthCheckRequest(), timeout=ASK_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            code, words = error.code(), error.details() or ""
            if code is grpc.StatusCode.UNIMPLEMENTED:  # no health service: nothing to be said against it
                return
            if "connection refused" in words.lower():
                raise UserError(
                    f"no server listens at {target.authority}; start one (labkit serve) or mend the address"
                ) from error
            raise _silent(target, words) from error
    if answer.status != HealthCheckResponse.SERVING:
        raise UserError(
            f"the server at {target.authority} is not ready yet (its health service says so); try again later"
        )
