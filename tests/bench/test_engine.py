"""The engine workloads on a tiny model, whose answers must be those that transformers gives."""

from __future__ import annotations

import json
import shutil

import pytest

from labkit.bench.ceilings import Ceilings
from labkit.bench.engine import EngineBench, Options
from labkit.bench.peers import PEERS, Peer, choose
from labkit.bench.rows import Row
from labkit.deployment import Deployment
from labkit.errors import UserError

CEILINGS = Ceilings(1e10, 1e11, "")


class Rows(list):
    add = list.append


@pytest.fixture(scope="module")
def long_model(tiny_model, tmp_path_factory):
    """The tiny model with room for the longest prompt of the mix."""
    path = tmp_path_factory.mktemp("long") / "model"
    shutil.copytree(tiny_model, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 5120}))
    return path


def run(model, *workloads: str, said: list[str] | None = None, **options) -> list[Row]:
    book = Rows()
    knobs = options.pop("knobs", {})
    deployment = Deployment(str(model), device="cpu", max_batch=32, **knobs)
    options = {"repeat": 1, **options}
    said = [] if said is None else said
    EngineBench(Options(workloads=workloads, deployment=deployment, **options), CEILINGS, book, said.append).run()
    return book


def test_repeats_and_ablations_go_to_and_fro(tiny_model):
    rows = run(tiny_model, "decode", repeat=2, without=(("chunked_prefill", False), ("kv_block_size", 8)))
    ours, first, second = "labkit", "chunked_prefill=False", "kv_block_size=8"
    assert [row.name for row in rows] == [ours, first, second, second, first, ours]
    assert [row.repeat for row in rows] == [0, 0, 0, 1, 1, 1]
    assert [row.note for row in rows[:3]] == ["", "same answers 1/1", "same answers 1/1"]
    figures = rows[0].figures
    assert next(iter(figures)) == "output tokens/s"
    assert figures["output tokens/s"] == pytest.approx(256 / figures["seconds"])
    assert figures["tokens/s"] == pytest.approx(384 / figures["seconds"])
    assert figures["steps"] >= 256 and figures["ms/step"] == pytest.approx(1e3 * figures["seconds"] / figures["steps"])
    assert 0 < figures["TFLOP/s"] and figures["of matmul"] == pytest.approx(figures["TFLOP/s"] * 1e12 / 1e11)
    assert 0 < figures["TB/s"] and figures["of copy"] == pytest.approx(figures["TB/s"] * 1e12 / 1e10)


def test_peers_do_the_same_work_and_one_that_fails_does_not_end_the_bench(long_model):
    def falls(target):
        raise RuntimeError("no such backend\nat line 3")

    peers = (*choose("transformers-static"), Peer("broken", "torch", True, falls))
    ours, static, broken = run(long_model, "mix", requests=3, peers=peers)
    assert static.note == "same answers 3/3" and static.figures["requests/s"] > 0 and "TB/s" not in static.figures
    assert ours.figures.keys() > static.figures.keys()
    assert broken.note == "failed: no such backend" and not broken.figures


def test_random_weights_are_no_common_work(long_model):
    peers = tuple(choose("transformers-static"))
    ours, static = run(long_model, "mix", requests=2, peers=peers, knobs={"random_weights": True})
    assert static.note == ours.note == "" and static.figures["output tokens/s"] > 0


@pytest.mark.slow
def test_the_continuous_batching_of_transformers_does_the_same_work(long_model):
    _, continuous = run(long_model, "mix", requests=6, peers=tuple(choose("transformers-continuous")))
    assert continuous.note == "same answers 6/6"


def test_users_are_found_for_both_lengths_of_answers(long_model):
    rows = run(long_model, "users", requests=2, slo_s=1e-4)
    assert [(row.workload, row.name) for row in rows] == [
        (f"users, {new} new tokens", name) for new in (128, 32) for name in ("labkit, 1 users", "labkit, most users")
    ]
    assert rows[0].figures["E2E P95 ms"] > rows[0].figures["TTFT P95 ms"] > 0
    assert rows[1].figures == {"users": 0.0}


def test_profiles_are_said(tiny_model):
    said: list[str] = []
    run(tiny_model, "decode", said=said, profile=True, profile_host=True)
    text = "\n".join(said)
    assert "aten::" in text and ".py:" in text


def test_a_shape_too_large_for_a_cpu_is_refused_with_what_to_do(tiny_model, tmp_path):
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 4096, "num_hidden_layers": 48}))
    with pytest.raises(UserError, match="too many for a CPU; run it on a GPU machine"):
        run(tmp_path, "decode")


def test_a_context_too_short_for_the_mix_is_refused(tiny_model):
    with pytest.raises(UserError, match="the model takes 512"):
        run(tiny_model, "mix", requests=20)


def test_peers_are_chosen_by_name():
    assert choose("none") == [] and [peer.name for peer in choose("all")] == [p.name for p in PEERS if p.installed]
    assert [peer.name for peer in choose("transformers-static")] == ["transformers-static"]
    with pytest.raises(UserError, match="no peer 'sglang'; there are transformers-static"):
        choose("sglang")
    absent = next(peer for peer in PEERS if peer.name == "vllm")
    if not absent.installed:
        with pytest.raises(UserError, match="needs the package vllm"):
            choose("vllm")
