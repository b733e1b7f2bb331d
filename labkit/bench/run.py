"""One ``labkit bench``: ceilings, then the engine's workloads, then the kernels'; each row is kept once it is known."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from labkit.bench.ceilings import measure_ceilings
from labkit.bench.engine import ENGINE_WORKLOADS, OURS, EngineBench, Options
from labkit.bench.operators import Case, run_case
from labkit.bench.peers import PEERS, free
from labkit.bench.quantization import measure_quantization
from labkit.bench.rows import keeping
from labkit.bench.serving import measure_serving
from labkit.bench.training import measure_training
from labkit.errors import UserError
from labkit.experiments.provenance import machine, versions
from labkit.experiments.store import Run, RunStore
from labkit.probes.others import OtherLoad, disturbance
from labkit.runner.runner import DTYPES, torch_device

KERNEL_WORKLOADS = ("attention", "elementwise", "linear")
TRAINING, QUANTIZATION, SERVING = "training", "quantization", "serving"
WORKLOADS = (*ENGINE_WORKLOADS, *KERNEL_WORKLOADS, TRAINING, QUANTIZATION, SERVING)


def bench(options: Options, store: RunStore, say: Callable[[str], None], only: Sequence[str] = ()) -> Run:
    """Measures and returns the run. ``only``: of the kernel workloads, the cases whose name holds one of these words.

    Raises UserError for what cannot be run here, and KeyboardInterrupt when interrupted, in both cases after what was
    measured before is kept.
    """
    device, dtype, load = torch_device(options.deployment.device), DTYPES[options.deployment.dtype], OtherLoad()
    for rest in store.unfinished():
        say(f"an earlier run did not end: {rest}")
    say(where(options.deployment.device))
    ceilings = measure_ceilings(device)
    free()
    say(f"ceilings: {ceilings}")
    facts: dict[str, Any] = {
        "deployment": dataclasses.asdict(options.deployment),
        "without": [list(pair) for pair in options.without],
        "workload": {"bench": list(options.workloads), "requests": options.requests, "repeat": options.repeat},
        "seed": 0,
        "ceilings": dataclasses.asdict(ceilings),
    }
    with keeping(store, facts) as (book, made):
        if any(name in ENGINE_WORKLOADS for name in options.workloads):
            EngineBench(options, ceilings, book, say).run()
        if TRAINING in options.workloads:
            measure_training(device, book, say, only, options.repeat)
        if SERVING in options.workloads:
            measure_serving(options.deployment, book, say, only, options.repeat)
        if QUANTIZATION in options.workloads:
            measure_quantization(options.deployment.model, device, book, say, bool(options.peers), options.requests)
        cases = [case for name in options.workloads for case in _cases(name, device, dtype)]
        wanted = [case for case in cases if not only or any(word in f"{case.workload}, {case.size}" for word in only)]
        if not options.peers:
            wanted = [ours_alone(case) for case in wanted]
        began = time.monotonic()
        for done, case in enumerate(wanted):
            left = (time.monotonic() - began) / done * (len(wanted) - done) if done else 0.0
            say(
                f"[{done + 1}/{len(wanted)}] {case.workload}, {case.size}{f': about {left:.0f} s left' if left else ''}"
            )
            run_case(case, device, ceilings, book, say)
        facts["other_cores"] = load.cores()
        if problem := disturbance(facts["other_cores"], machine()["cores"]):
            say(problem)
    return made[0]


def ours_alone(case: Case) -> Case:
    return dataclasses.replace(
        case, contestants={name: call for name, call in case.contestants.items() if name.startswith(OURS)}
    )


def check_workloads(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once. Raises UserError for one that is no workload, or for none."""
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown or not names:
        problem = f"no workload {unknown[0]!r}" if unknown else "name a workload"
        raise UserError(f"{problem}; there are {', '.join(WORKLOADS)}")
    return tuple(dict.fromkeys(names))


def where(device: str) -> str:
    """One line: the machine, its driver, and the versions that bear on speed."""
    facts, found = machine(), versions()
    gpus = [f"{gpu['name']}, driver {gpu['driver']}" for gpu in facts["gpus"]]
    place = gpus[0] if torch_device(device).type == "cuda" and gpus else f"{facts['cpu']}, {facts['cores']} cores"
    packages = ("torch", "triton", *dict.fromkeys(peer.package for peer in PEERS))
    return f"{place}; " + ", ".join(f"{name} {_version(name, found) or 'absent'}" for name in packages)


def _version(name: str, found: dict[str, str | None]) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return found[name] if name in found else version(name)
    except PackageNotFoundError:
        return None


def _cases(name: str, device: Any, dtype: Any) -> list[Any]:
    if name == "attention":
        from labkit.bench.attention import cases
    elif name == "elementwise":
        from labkit.bench.elementwise import cases
    elif name == "linear":
        from labkit.bench.linear import cases
    else:
        return []
    return cases(device, dtype)
