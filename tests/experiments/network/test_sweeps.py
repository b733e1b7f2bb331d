from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from labkit.errors import UserError
from labkit.experiments.network import sweeps
from labkit.experiments.network.site import Site, open_site
from labkit.experiments.network.sweeps import DIRECT, EDGE, Way
from labkit.link import Leg, Link
from labkit.serving.schedule import Schedule

PLAN = Schedule(ttft_ms=30, itl_ms=10, tokens=5)
RTT_MS, ORIGIN_MS = 8.0, 4.0


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    far = Link(RTT_MS, hosts=("client", "edge", "origin"), origin_leg=Leg(ORIGIN_MS))
    with far as link:
        if link.mode == "delay only":
            pytest.skip("; ".join(link.notes))
        with open_site(link, PLAN, ["http/2 tls", "http/1.1"], calibration_s=0.5) as made:
            yield made


def test_a_run_knows_what_came_when_and_what_the_wire_carried(site):
    said: list[str] = []
    ways = [Way("http/2 tls", 1), Way("http/2 tls", "each")]
    table = sweeps.by_streams(site, [(way, 6) for way in ways], [Leg(RTT_MS)], PLAN, 2, said.append)
    assert list(table["way"]) == [str(way) for way in (*ways, *ways[::-1])]
    assert list(table["connections"]) == [1, 6, 6, 1] and (table["failures"] == 0).all()
    # A token cannot be there before it has travelled, and the first one not before a round trip and its time.
    assert (table["p50_ms"] >= (RTT_MS + ORIGIN_MS) / 2).all()
    assert (table["ttft_ms"] >= PLAN.ttft_ms + RTT_MS + ORIGIN_MS).all()
    assert (table["down_bytes"] > 6 * PLAN.tokens * 20).all() and (table["up_bytes"] > 6 * 60).all()
    assert said[-1].endswith("0 streams failed, 0 runs do not count") or table["invalid"].any()


def test_the_mix_is_asked_for_by_its_bytes(site):
    hello = sweeps.by_streams(site, [(Way("http/2 tls", 1), 10)], [Leg(RTT_MS)], PLAN, 1, print)
    mix = sweeps.by_mix(site, [Way("http/2 tls", 1)], 10, PLAN, 1, print)
    assert mix["failures"][0] == 0 and mix["up_bytes"][0] > hello["up_bytes"][0] + 5_000


def test_streams_that_fail_make_a_run_that_does_not_count(site):
    def row(model: str) -> dict[str, Any]:
        seen, wire = site.watched(lambda: site.caller.streams(site.target("http/2 tls"), 2, PLAN, model=model))
        as_asked = dataclasses.replace(wire, invalid="")  # on a slow machine the link is off, which would be said first
        return sweeps._row(Way("http/2 tls"), 2, 0, Leg(RTT_MS), seen, as_asked)

    whole, failed = row(""), row("another")
    assert whole["failures"] == 0 and whole["invalid"] == ""
    assert failed["failures"] == 2 and "such as: 4xx" in failed["invalid"]


def test_by_the_edge_and_directly(site):
    table = sweeps.by_the_edge(site, "http/2 tls", RTT_MS, [0.0], 3, PLAN, 2, print)
    assert list(table["way"]) == [DIRECT, EDGE, EDGE, DIRECT] and (table["failures"] == 0).all()
    # TCP, TLS 1.3 and the request: three round trips, of which two end at the edge; then nothing is saved.
    direct, edge = (table[table["way"] == way].min(numeric_only=True) for way in (DIRECT, EDGE))
    assert direct["cold_ms"] >= 3 * (RTT_MS + ORIGIN_MS) + PLAN.ttft_ms
    assert edge["cold_ms"] >= 3 * RTT_MS + ORIGIN_MS + PLAN.ttft_ms
    assert min(direct["warm_ms"], edge["warm_ms"]) >= RTT_MS + ORIGIN_MS + PLAN.ttft_ms


def test_a_prompt_goes_whole_and_in_chunks_as_its_pieces_come(site):
    table = sweeps.uploads(site, "http/1.1", 4000, 4, 60.0, 1, print)
    assert len(table) == 4 and (table["ttft_ms"] >= PLAN.ttft_ms + RTT_MS + ORIGIN_MS).all()
    waited = table[table["prompt"] == sweeps.AS_IT_COMES]
    # The answer cannot begin before the last piece of the question is there.
    assert (waited["ttft_ms"] >= 60 + PLAN.ttft_ms + RTT_MS + ORIGIN_MS).all()


def test_what_goes_wrong_at_the_client_is_said_here(site):
    with pytest.raises(UserError, match=r"on the client's host: .*refused"):
        site.caller.uploads(site.link.address("origin"), 1, 1, 100, 1, False, 0.0)


def test_without_namespaces_there_is_no_wire_to_look_at():
    said: list[str] = []
    with Link(1, mode="delay only") as link:
        bare = Site(link, None, {}, {}, 0.5)  # type: ignore[arg-type]
        assert sweeps.by_streams(bare, [(Way("grpc"), 1)], [Leg(1)], PLAN, 3, said.append).empty
    assert "nothing measured" in said[0] and "delay only" in said[0]
