"""The gRPC server, over a real channel: the rules of HTTP, the codes of gRPC."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from prometheus_client.parser import text_string_to_metric_families

from labkit.engine import EngineFailed, QueueFull
from labkit.errors import UserError
from labkit.serving.grpc_server import SERVICE, GrpcServer
from labkit.serving.intake import Service
from labkit.serving.options import ServerOptions
from labkit.wire import generation_pb2 as pb
from labkit.wire import generation_pb2_grpc

CHAT = "/v1/chat/completions"


def hello(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(messages=[pb.Message(role="user", content="hello")], **fields)


@contextmanager
def stub(helpers: Any, engine: Any, options: ServerOptions | None = None) -> Iterator[Any]:
    with helpers.running(engine, options, "grpc") as url:
        with grpc.insecure_channel(url.removeprefix("grpc://")) as channel:
            yield generation_pb2_grpc.GenerationStub(channel)


def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return caught.value.code(), caught.value.details()


def test_chunks_carry_their_tokens_and_the_last_one_the_usage(helpers: Any, engine: Any) -> None:
    engine.pieces, engine.gap_s = ("<think>", "add", "</think>", "\n", "42"), 0.02
    with stub(helpers, engine) as service:
        call = service.Generate(hello(request_id="r-7", max_tokens=5, temperature=0.5, model="tiny"))
        chunks = list(call)
        assert dict(call.initial_metadata())["x-request-id"] == "r-7"
    assert [(each.reasoning, each.text, each.tokens) for each in chunks] == [("add", "", 2), ("", "42", 3)]
    assert [each.finish_reason for each in chunks] == ["", "stop"] and not chunks[0].HasField("usage")
    ids, sampling = engine.seen[0]
    assert chunks[1].usage == pb.Usage(prompt_tokens=len(ids), completion_tokens=5)
    assert (sampling.temperature, sampling.max_tokens, sampling.ignore_eos) == (0.5, 5, False)


def test_a_prompt_is_continued_as_it_stands(helpers: Any, engine: Any) -> None:
    with stub(helpers, engine) as service:
        chunks = list(service.Generate(pb.GenerateRequest(prompt="1 + 2 =", max_tokens=3, ignore_eos=True)))
    assert "".join(each.text for each in chunks) == "Hello world!"
    assert engine.seen[0][0] == engine.tokenizer("1 + 2 =", add_special_tokens=False)["input_ids"]
    assert engine.seen[0][1].ignore_eos and engine.seen[0][1].temperature == 1.0


@pytest.mark.parametrize(
    ("request_", "http"),
    [
        (hello(max_tokens=-1), {"max_tokens": -1}),
        (hello(max_tokens=10**6), {"max_tokens": 10**6}),
        (hello(temperature=3.0), {"temperature": 3.0}),
        (hello(model="other"), {"model": "other"}),
    ],
)
def test_what_http_refuses_is_refused_in_the_same_words(helpers: Any, engine: Any, request_: Any, http: Any) -> None:
    with stub(helpers, engine) as service, helpers.running(engine) as url:
        code, details = refused(service.Generate(request_))
        answer = httpx.post(url + CHAT, json=helpers.chat(**http))
    assert details == answer.json()["error"]["message"]
    assert code.name == {400: "INVALID_ARGUMENT", 404: "NOT_FOUND"}[answer.status_code]
    assert engine.seen == []


def test_nothing_to_answer_and_two_things_to_answer(helpers: Any, engine: Any) -> None:
    with stub(helpers, engine) as service:
        for request in (pb.GenerateRequest(), hello(prompt="x")):
            assert refused(service.Generate(request))[0] == grpc.StatusCode.INVALID_ARGUMENT
        too_large = refused(service.Generate(pb.GenerateRequest(prompt="x " * (3 << 20))))
        assert too_large[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert list(service.Generate(hello()))[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"refusal": QueueFull("5 wait")}, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ({"refusal": RuntimeError("secret")}, grpc.StatusCode.INTERNAL),
        ({"ready": False}, grpc.StatusCode.UNAVAILABLE),
        ({"failed": "out of memory"}, grpc.StatusCode.UNAVAILABLE),
        ({"fail_after": 1, "failure": EngineFailed("gone")}, grpc.StatusCode.UNAVAILABLE),
        ({"finish_reason": "error"}, grpc.StatusCode.UNAVAILABLE),
    ],
)
def test_the_engines_troubles_have_codes(helpers: Any, engine: Any, changes: Any, code: Any) -> None:
    for name, value in changes.items():
        setattr(engine, name, value)
    with stub(helpers, engine) as service:
        got, details = refused(service.Generate(hello()))
    assert got == code and "secret" not in details
    assert engine.running == 0


def test_a_key_is_asked_for(helpers: Any, engine: Any) -> None:
    with stub(helpers, engine, ServerOptions(model_name="tiny", api_key="k")) as service:
        for metadata in ((), (("authorization", "Bearer no"),)):
            assert refused(service.Generate(hello(), metadata=metadata))[0] == grpc.StatusCode.UNAUTHENTICATED
        assert list(service.Generate(hello(), metadata=(("authorization", "Bearer k"),)))


@pytest.mark.parametrize("how", ["cancel", "channel", "deadline", "not reading"])
def test_a_client_that_leaves_frees_what_it_held(helpers: Any, engine: Any, how: str) -> None:
    engine.core.max_context = 10**6
    engine.pieces, engine.gap_s = ("word ",) * 10_000, 0.005
    if how == "not reading":
        engine.pieces, engine.gap_s = ("x" * 2_000,) * 20_000, 0.0
    with stub_and_metrics(helpers, engine) as (channel, outcomes):
        service = generation_pb2_grpc.GenerationStub(channel)
        call = service.Generate(hello(max_tokens=20_000), timeout=2.0 if how == "deadline" else None)
        assert next(call).text
        assert engine.running == 1
        if how == "cancel":
            call.cancel()
        elif how == "channel":
            channel.close()
        assert helpers.eventually(lambda: engine.running == 0, 10.0)
        assert engine.produced < 15_000, "an answer that nobody reads was taken in whole"
        kind = "client_not_reading" if how == "not reading" else "client_gone"
        assert helpers.eventually(lambda: outcomes() == {("cancelled",): 1, (kind,): 1})


@contextmanager
def stub_and_metrics(helpers: Any, engine: Any) -> Iterator[tuple[Any, Any]]:
    made: list[Service] = []
    original = Service.of.__func__  # type: ignore[attr-defined]

    def keep(cls: Any, *arguments: Any) -> Service:
        made.append(original(cls, *arguments))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Service, "of", classmethod(keep))
        with helpers.running(engine, ServerOptions(model_name="tiny", send_timeout_s=0.5), "grpc") as url:

            def outcomes() -> dict[tuple[str, ...], int]:
                families = text_string_to_metric_families(made[0].metrics.render().decode())
                samples = [each for family in families for each in family.samples if each.labels and each.value]
                wanted = ("labkit_requests_total", "labkit_failures_total")
                return {tuple(each.labels.values()): int(each.value) for each in samples if each.name in wanted}

            with grpc.insecure_channel(url.removeprefix("grpc://")) as channel:
                yield channel, outcomes


def test_health_follows_the_engine_and_reflection_tells_the_service(helpers: Any, engine: Any) -> None:
    engine.ready = False
    kind = health_pb2.HealthCheckResponse
    with helpers.running(engine, None, "grpc") as url, grpc.insecure_channel(url.removeprefix("grpc://")) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        def says(status: int) -> bool:
            names = ("", SERVICE)
            return all(health.Check(health_pb2.HealthCheckRequest(service=each)).status == status for each in names)

        assert helpers.eventually(lambda: says(kind.NOT_SERVING))
        engine.ready = True
        assert helpers.eventually(lambda: says(kind.SERVING))
        engine.failed = "gone"
        assert helpers.eventually(lambda: says(kind.NOT_SERVING))
        reflected = ProtoReflectionDescriptorDatabase(channel)
        assert SERVICE in reflected.get_services()
        assert reflected.FindFileContainingSymbol(SERVICE).name == "labkit/wire/generation.proto"


def test_a_port_in_use_is_an_error(helpers: Any, engine: Any) -> None:
    import asyncio

    async def second(port: int) -> None:
        with pytest.raises(UserError, match="cannot listen on"):
            GrpcServer(Service.of(engine, ServerOptions()), "127.0.0.1", port)

    with helpers.running(engine, None, "grpc") as url:
        asyncio.run(second(int(url.rpartition(":")[2])))
