"""The ladder: from the deployment as first deployed to the best one, one knob at a time, and the walk along it."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from labkit.deployment import SHIPPED_MODEL, Deployment
from labkit.experiments.measure import measure
from labkit.experiments.provenance import code_version, machine
from labkit.experiments.store import Run, RunStore
from labkit.traffic.calibrate import Calibration
from labkit.traffic.progress import showing_progress
from labkit.traffic.workload import Workload


@dataclass(frozen=True)
class Rung:
    """A step of the ladder. ``knob`` is what it turns against the rung before; empty for the first."""

    name: str
    deployment: Deployment
    why: str
    knob: str = ""


CUDA_STEPS: list[tuple[str, str, Any, str]] = [
    ("bfloat16", "dtype", "bfloat16", "half the bytes to move, and Tensor Cores"),
    ("own attention kernels", "attention", "triton", "keys and values are read where they lie in the paged cache"),
    ("CUDA graphs", "cuda_graphs", True, "one launch for a step's hundreds of kernels"),
    ("asynchronous scheduling", "async_scheduling", True, "the next step is prepared while the GPU computes this one"),
    ("prefix cache", "prefix_cache", True, "what prompts have in common at their beginning is computed once"),
    ("batches of hundreds", "max_batch", 1024, "a decode step reads the weights once, for however many"),
    ("longer steps", "token_budget", 8192, "prompts fill the GPU's matrix units"),
    ("larger KV blocks", "kv_block_size", 64, "a tile of keys is one piece of memory"),
]


def ladder(model: str = SHIPPED_MODEL, device: str = "cpu", **knobs: Any) -> list[Rung]:
    """The rungs in order; each differs from the one before in exactly one knob. ``knobs`` hold all the way up.

    On ``device`` "cuda" it ends in ``Deployment.at_full_speed``. What only a GPU can do is a rung only there; so is
    bfloat16, for few CPUs compute in it faster than in float32.
    """
    first = Deployment.as_first_deployed(model, device=device, **knobs)
    steps: list[tuple[str, str, Any, str]] = [
        ("fused attention", "attention", "sdpa", "PyTorch's fused kernels never hold the n x n scores in memory"),
        ("own engine", "engine", "labkit", "packed tokens and a paged KV cache: no padding is computed"),
        ("dynamic window", "batching", "dynamic", "waits up to 50 ms for a fuller batch, as the article proposes"),
        (
            "continuous batching",
            "batching",
            "continuous",
            "requests join and leave at every step; nobody waits for the longest",
        ),
        (
            "continuous + chunked prefill",
            "chunked_prefill",
            True,
            "a long prompt no longer stops everybody else's tokens",
        ),
        ("larger batches", "max_batch", 256, "the batch is bounded by memory and not by a constant"),
    ]
    if device == "cuda":
        steps += CUDA_STEPS
    rungs = [Rung("as first deployed", first, "transformers generate, eager attention, float32, static batches of 32")]
    for name, knob, value, why in steps:
        before = rungs[-1].deployment
        if knob not in knobs and getattr(before, knob) != value:
            rungs.append(Rung(name, replace(before, **{knob: value}), why, knob))
    check(rungs)
    return rungs


def device_here() -> str:
    """The device for a ``ladder`` on this machine: "cuda" where PyTorch can use a GPU, otherwise "cpu"."""
    if not machine()["gpus"]:
        return "cpu"  # said without PyTorch, which takes seconds to load
    from labkit.runner.runner import torch_device

    return torch_device("auto").type


def check(rungs: Sequence[Rung]) -> None:
    """Raises ValueError unless every rung differs from the one before in the one knob it names, and no name comes
    twice."""
    for before, after in zip(rungs, rungs[1:], strict=False):
        turned = list(before.deployment.differs_in(after.deployment))
        if turned != [after.knob]:
            raise ValueError(
                f"rung {after.name!r} must turn exactly the knob {after.knob!r} against {before.name!r}; "
                f"it turns {', '.join(turned) or 'none'}"
            )
    names = [rung.name for rung in rungs]
    if len(set(names)) < len(names):
        raise ValueError("rungs need names of their own")


def choose(rungs: Sequence[Rung], names: Sequence[str]) -> list[Rung]:
    """The rungs of those names, in the order of the ladder; all of them for no names.

    A rung whose neighbours below were left out turns their knobs too (``knob`` names all, separated by commas) and has
    their reasons too, unless a later one turned the same knob again.
    Raises ValueError for a name that is no rung.
    """
    known = [rung.name for rung in rungs]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no such rung: {', '.join(unknown)}; the ladder has {', '.join(known)}")
    chosen = [rung for rung in rungs if rung.name in names] if names else list(rungs)
    found = [replace(rung, knob="") for rung in chosen[:1]]
    for before, after in zip(chosen, chosen[1:], strict=False):
        between = rungs[known.index(before.name) + 1 : known.index(after.name) + 1]
        last = {rung.knob: rung.why for rung in between}
        turned = list(before.deployment.differs_in(after.deployment))
        found.append(
            replace(after, knob=", ".join(turned), why="; ".join(last[knob] for knob in last if knob in turned))
        )
    return found


def run_key(deployment: Deployment, workload: Workload, repeat: int, code: dict[str, Any]) -> str:
    """What makes a finished run stand for one that is to be made: deployment, workload, repeat, code and machine."""
    return _digest([deployment.to_json(), workload.to_json(), repeat, code, machine()])


def walk(
    rungs: Sequence[Rung],
    workload: Workload,
    store: RunStore,
    repeats: int = 3,
    *,
    hz: float = 5.0,
    calibration: Calibration | None = None,
    say: Callable[[str], None] = print,
    measure: Callable[..., Run] = measure,
) -> list[Run]:
    """Measures every rung ``repeats`` times, interleaved (up the ladder, down, up …) so that drift hits all alike.

    Valid runs that are in the store already, made by the same code on the same machine, are taken as they are: a walk
    that was killed goes on where it was, and all its runs have one ``manifest["walk"]``. ``say`` gets a line a run
    with the time left. Runs come in order of rung and repeat.
    """
    check_repeats(repeats)
    for rest in store.unfinished():
        say(f"an earlier run did not end: {rest}")
    code = code_version()
    same_walk = _digest([workload.to_json(), code, machine()])
    finished = {run.manifest.get("key"): run for run in store.list() if run.valid}
    plan = [(repeat, rung) for repeat in range(repeats) for rung in (rungs if repeat % 2 == 0 else rungs[::-1])]
    keys = {(repeat, rung.name): run_key(rung.deployment, workload, repeat, code) for repeat, rung in plan}
    made: dict[tuple[int, str], Run] = {}
    took: dict[str, float] = {}
    for number, (repeat, rung) in enumerate(plan):
        position, label = (repeat, rung.name), f"[{number + 1}/{len(plan)}] {rung.name}, repeat {repeat + 1}"
        if keys[position] in finished:
            made[position] = finished[keys[position]]
            say(f"{label}: already measured ({made[position].name})")
            continue
        left = [other.name for later, other in plan[number:] if keys[later, other.name] not in finished]
        say(f"{label}{_time_left(left, took)}")
        began = time.monotonic()
        notes = {"rung": rung.name, "repeat": repeat, "key": keys[position], "walk": same_walk}
        with showing_progress(label) as progress:
            made[position] = measure(
                rung.deployment, workload, store, name=_file_name(rung.name), hz=hz, calibration=calibration,
                progress=progress, notes=notes,
            )  # fmt: skip
        took[rung.name] = time.monotonic() - began
    return [made[repeat, rung.name] for rung in rungs for repeat in range(repeats)]


def runs_by_rung(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of a walk under the name of their rung, in order."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.manifest["rung"], []).append(run)
    return groups


def check_repeats(repeats: int) -> None:
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1; got {repeats}")


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _time_left(names: Sequence[str], took: dict[str, float]) -> str:
    if not took:
        return ""
    typical = sum(took.values()) / len(took)
    seconds = sum(took.get(name, typical) for name in names)
    return f": about {seconds / 60:.0f} min left" if seconds >= 90 else f": about {seconds:.0f} s left"


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", name)
