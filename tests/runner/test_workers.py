"""An engine whose model is split over two processes, against one process and against what can happen to processes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from labkit.core import LabkitCore
from labkit.deployment import SHIPPED_MODEL, Deployment
from labkit.errors import UserError
from labkit.request import SamplingParams

GREEDY = SamplingParams(max_tokens=64, ignore_eos=True)
CROWDED: dict[str, Any] = {"token_budget": 33, "kv_blocks": 60, "async_scheduling": True}


def core(model: Path | str, device: str = "cpu", **knobs: Any) -> LabkitCore:
    return LabkitCore(Deployment(model=str(model), device=device, **knobs))  # type: ignore[arg-type]


def answers(engine: LabkitCore) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    while engine.has_work():
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
    return found


def workers() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if "labkit.runner.worker" in each.cmdline()]


def gone(processes: list[psutil.Process], within_s: float = 10.0) -> bool:
    return not psutil.wait_procs(processes, within_s)[1]


def test_two_processes_answer_as_one_does(tiny_model: Path, greedy_cases: Any) -> None:
    """Chunks, preemption and steps launched ahead; every fifth request is sampled."""
    cases = greedy_cases[:25]
    sampled = {i: SamplingParams(max_tokens=20, temperature=1.0, seed=i, ignore_eos=True) for i in range(0, 25, 5)}
    found = []
    for processes in (2, 1):
        engine = core(tiny_model, tensor_parallel=processes, **CROWDED)
        engine.warm_up()
        assert len(workers()) == processes - 1
        for i, case in enumerate(cases):
            engine.add(i, case.prompt_ids, sampled.get(i, GREEDY))
        found.append(answers(engine))
        assert engine.stats().preemptions > 0
        del engine
        assert not workers()
    assert found[0] == found[1]
    assert all(found[0][i] == cases[i].answer_ids for i in range(25) if i not in sampled)


def test_a_worker_that_is_lost_ends_the_engine_and_the_next_one_starts(tiny_model: Path) -> None:
    engine = core(tiny_model, tensor_parallel=2)
    engine.add(0, [5] * 20, GREEDY)
    engine.step()
    (worker,) = workers()
    worker.kill()
    began = time.monotonic()
    with pytest.raises(UserError, match="process 1 of 2 .* killed by SIGKILL"):
        answers(engine)
    assert time.monotonic() - began < 5
    with pytest.raises(UserError, match="killed by SIGKILL"):
        engine.step()
    del engine
    again = core(tiny_model, tensor_parallel=2, kv_blocks=40)
    again.add(0, [5] * 20, SamplingParams(max_tokens=3, ignore_eos=True))
    assert len(answers(again)[0]) == 3
    lost = workers()
    with pytest.raises(UserError, match="process 1 of 2 .*: AttributeError: .*no_such_method"):
        again.runner._everywhere("no_such_method")
    assert gone(lost)


def test_an_error_of_rank_0_ends_the_workers(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is: they are in the middle of a step that it will not finish."""
    engine, lost = core(tiny_model, tensor_parallel=2), workers()

    def too_small(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine.runner.model, "forward", too_small)
    engine.add(0, [5] * 20, GREEDY)
    with pytest.raises(UserError, match="process 0 of 2 .* CUDA out of memory"):
        engine.step()
    assert gone(lost)


def test_what_cannot_be_loaded_or_split_is_explained_and_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="4 attention heads cannot be split over 3 processes"):
        core(tiny_model, tensor_parallel=3)
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match="has no model.safetensors"):
        core(bare, tensor_parallel=2)
    assert not workers() and not torch.distributed.is_initialized()


ENDLESS = """
import sys, psutil
from labkit.core import LabkitCore
from labkit.deployment import Deployment
from labkit.request import SamplingParams

engine = LabkitCore(Deployment(model=sys.argv[1], device="cpu", tensor_parallel=2))
print(*(each.pid for each in psutil.Process().children()), flush=True)
while True:
    engine.add(0, [5, 6, 7], SamplingParams(max_tokens=100, ignore_eos=True))
    while engine.has_work():
        engine.step()
"""


def test_workers_die_with_an_engine_that_is_killed(tiny_model: Path, tmp_path: Path) -> None:
    with (tmp_path / "errors").open("w+") as errors:
        parent = subprocess.Popen(
            [sys.executable, "-c", ENDLESS, str(tiny_model)], stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert parent.stdout is not None
        left = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(left) == 1
        time.sleep(0.5)
        parent.kill()
        parent.communicate()
        assert gone(left)
        errors.seek(0)
        assert "Traceback" not in errors.read()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("knobs", [{}, {"cuda_graphs": False}, {"kv_blocks": 200, "token_budget": 100}], ids=str)
def test_two_gpus_answer_as_one_does(knobs: dict[str, Any]) -> None:
    found = []
    for processes in (2, 1):
        engine = core(SHIPPED_MODEL, "cuda", tensor_parallel=processes, max_batch=16, **knobs)
        engine.warm_up()
        for i in range(40):
            engine.add(i, [(7 * i + 11 * j) % 700 + 5 for j in range(1 + 9 * i)], GREEDY)
        found.append(answers(engine))
        if processes == 2:
            workers()[0].kill()
            engine.add(0, [5] * 20, GREEDY)
            began = time.monotonic()
            with pytest.raises(UserError, match="killed by SIGKILL"):
                answers(engine)
            assert time.monotonic() - began < 20
        del engine
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_processes_than_gpus_are_refused(tiny_model: Path) -> None:
    if torch.cuda.device_count() < 4:
        with pytest.raises(UserError, match="tensor_parallel is 4, but torch finds"):
            core(tiny_model, "cuda", tensor_parallel=4)
