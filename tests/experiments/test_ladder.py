from __future__ import annotations

import dataclasses

import pytest
import torch

from labkit.deployment import Deployment
from labkit.experiments import ladder as module
from labkit.experiments.ladder import Rung, check, choose, ladder, run_key, runs_by_rung, walk
from labkit.experiments.store import RunStore
from labkit.traffic.events import events_table
from labkit.traffic.workload import Workload

WORKLOAD = Workload.article(requests=4)


@pytest.mark.parametrize("device", ["cpu", "cuda", "auto"])
def test_each_rung_turns_one_knob_from_the_first_deployment_to_the_best(device):
    rungs = ladder("some/model", device)
    assert rungs[0].deployment == Deployment.as_first_deployed("some/model", device=device)
    for before, after in zip(rungs, rungs[1:], strict=False):
        assert list(before.deployment.differs_in(after.deployment)) == [after.knob]
        assert after.why
    best, default = rungs[-1].deployment, Deployment("some/model", device=device)
    if device == "cuda":
        assert best == Deployment.at_full_speed("some/model")
    else:
        gpu_only = {"attention", "cuda_graphs", "async_scheduling"}
        assert set(best.differs_in(default)) == gpu_only, "these make no difference here"


@pytest.mark.parametrize(
    ("gpus", "found", "device"), [([], "cuda", "cpu"), (["one"], "cuda", "cuda"), (["one"], "cpu", "cpu")]
)
def test_the_device_is_what_pytorch_finds_where_there_is_a_gpu(monkeypatch, gpus, found, device):
    monkeypatch.setattr(module, "machine", lambda: {"gpus": gpus})
    monkeypatch.setattr("labkit.runner.runner.torch_device", lambda name: torch.device(found))
    assert module.device_here() == device


def test_knobs_hold_all_the_way_up():
    rungs = ladder("some/model", max_batch=8, max_context=512)
    assert {rung.deployment.max_batch for rung in rungs} == {8} and {rung.deployment.max_context for rung in rungs} == {
        512
    }
    assert "larger batches" not in [rung.name for rung in rungs]


def test_a_ladder_that_turns_two_knobs_is_refused():
    first = Rung("a", Deployment(), "")
    two = Rung("b", dataclasses.replace(Deployment(), max_batch=2, token_budget=64), "", "max_batch")
    with pytest.raises(ValueError, match="turns max_batch, token_budget"):
        check([first, two])
    with pytest.raises(ValueError, match="turns none"):
        check([first, Rung("b", Deployment(), "", "max_batch")])
    with pytest.raises(ValueError, match="names"):
        check([first, Rung("a", Deployment(max_batch=2), "", "max_batch")])


def test_chosen_rungs_name_every_knob_between_them():
    rungs = ladder("some/model")
    ends = choose(rungs, ["larger batches", "as first deployed", "own engine"])
    assert [rung.name for rung in ends] == ["as first deployed", "own engine", "larger batches"]
    assert [rung.knob for rung in ends] == ["", "engine, attention", "batching, max_batch, chunked_prefill"]
    by_name = {rung.name: rung.why for rung in rungs}
    assert ends[1].why == f"{by_name['fused attention']}; {by_name['own engine']}"
    assert by_name["dynamic window"] not in ends[2].why and by_name["continuous batching"] in ends[2].why
    assert choose(rungs, []) == rungs
    with pytest.raises(ValueError, match="no such rung: fast; the ladder has as first deployed"):
        choose(rungs, ["fast"])


@pytest.fixture
def code(monkeypatch):
    """The version of the code, held still while others edit it."""
    fixed = {"commit": "c0ffee", "changes": None}
    monkeypatch.setattr(module, "code_version", lambda: fixed)
    return fixed


def test_a_key_changes_with_what_makes_a_run_another(code):
    base = run_key(Deployment(), WORKLOAD, 0, code)
    assert base == run_key(Deployment(), WORKLOAD, 0, dict(code))
    others = [run_key(Deployment(max_batch=2), WORKLOAD, 0, code), run_key(Deployment(), WORKLOAD.but(seed=1), 0, code)]
    others += [run_key(Deployment(), WORKLOAD, 1, code), run_key(Deployment(), WORKLOAD, 0, {**code, "changes": "x"})]
    assert len({base, *others}) == 5


class FakeMeasure:
    """Writes runs without a server; dies after ``most``."""

    def __init__(self, most=99, valid=True):
        self.calls, self.most, self.valid = [], most, valid

    def __call__(self, deployment, workload, store, *, name, notes, **_):
        if len(self.calls) == self.most:
            raise KeyboardInterrupt
        self.calls.append((notes["rung"], notes["repeat"]))
        with store.create(name) as draft:
            return draft.finish({"window": [0, 1], "valid": self.valid, "reasons": [], **notes}, events_table([]))


def test_a_walk_interleaves_and_goes_on_where_it_was_killed(tmp_path, code):
    store, rungs, said = RunStore(tmp_path), ladder("m")[:3], []
    names = [rung.name for rung in rungs]
    cut = FakeMeasure(most=4)
    with pytest.raises(KeyboardInterrupt):
        walk(rungs, WORKLOAD, store, 2, measure=cut, say=said.append)
    assert cut.calls == [(names[0], 0), (names[1], 0), (names[2], 0), (names[2], 1)]

    rest = FakeMeasure()
    runs = walk(rungs, WORKLOAD, store, 2, measure=rest, say=said.append)
    assert rest.calls == [(names[1], 1), (names[0], 1)]
    assert [(run.manifest["rung"], run.manifest["repeat"]) for run in runs] == [(n, k) for n in names for k in (0, 1)]
    assert {name: len(group) for name, group in runs_by_rung(runs).items()} == dict.fromkeys(names, 2)
    assert sum("already measured" in line for line in said) == 4 and any("left" in line for line in said)

    again = FakeMeasure()
    assert walk(rungs, WORKLOAD, store, 2, measure=again, say=said.append) == runs and again.calls == []
    assert len({run.manifest["walk"] for run in runs}) == 1
    other = walk(rungs[:1], WORKLOAD.but(seed=1), store, 1, measure=again, say=said.append)
    assert other[0].manifest["walk"] != runs[0].manifest["walk"]


def test_a_run_that_gave_no_verdict_is_made_again(tmp_path, code):
    store, rungs = RunStore(tmp_path), ladder("m")[:1]
    walk(rungs, WORKLOAD, store, 1, measure=FakeMeasure(valid=False), say=lambda _: None)
    again = FakeMeasure()
    walk(rungs, WORKLOAD, store, 1, measure=again, say=lambda _: None)
    assert len(again.calls) == 1
    with pytest.raises(ValueError, match="repeats"):
        walk(rungs, WORKLOAD, store, 0)
