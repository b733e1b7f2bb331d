"""How late tokens are found to be, over a real server."""

from __future__ import annotations

from pathlib import Path

import pytest

from labkit.bench.serving import Lateness, lateness
from labkit.deployment import Deployment
from labkit.serving.schedule import Schedule


@pytest.mark.parametrize("chunk", [1, 5])
def test_every_token_is_counted_and_coalescing_shows_as_lateness(tiny_model: Path, chunk: int) -> None:
    deployment = Deployment(model=str(tiny_model), transport="http/2", chunk_tokens=chunk)
    found = lateness(deployment, streams=4, schedule=Schedule(ttft_ms=50, itl_ms=20, tokens=15))
    assert found.tokens == 4 * 15 and found.failures == ()
    # Of five tokens that are sent together the third is the one in the middle: it waits for two more.
    waited = (chunk - 1) // 2 * 20
    assert waited - 1 < found.p50_ms < waited + 50
    assert 0 <= found.p50_ms <= found.p99_ms <= found.most_ms
    assert found.server_us > 0 and found.client_us > 0


def test_a_row_says_what_spoilt_it() -> None:
    none = Lateness(0.0, 0.0, 0.0, 0, ("shed: 429",), 0.0, 0.0, 0.0)
    assert none.row("grpc", 0).note == "shed: 429" and none.row("grpc", 0).figures == {}
    some = Lateness(1.0, 2.0, 3.0, 10, ("connect: gone",), 5.0, 5.0, 0.5).row("grpc", 1)
    assert some.figures["late P99 ms"] == 2.0 and "1 streams failed" in some.note and "waited for a core" in some.note
