"""The ``labkit bench`` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from labkit.errors import UserError
from labkit.interrupt import told_on_interrupt

SHAPES = Path(__file__).resolve().parent.parent.parent / "data" / "shapes"


def bench(
    workloads: Annotated[
        list[str] | None,
        typer.Argument(
            help="throughput, mix, decode, users, attention, elementwise, linear, training, quantization, serving: "
            "one or more."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="A Hugging Face directory; absent: the shipped model.")] = None,
    random_weights: Annotated[
        str | None, typer.Option(help="Instead, a shape of data/shapes with made-up weights.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="By default bfloat16 on a GPU, else float32.")
    ] = None,
    knobs: Annotated[list[str] | None, typer.Option("--set", help="One knob: NAME=VALUE. May be repeated.")] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="A line more with this knob off (or NAME=VALUE). May be repeated.")
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where all of it runs.")] = "auto",
    repeat: Annotated[int, typer.Option(min=1, help="Measurements of every line; slow peers are measured once.")] = 3,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="Requests of a workload (users: at each number of them; quantization: problems)."),
    ] = None,
    slo_ms: Annotated[float, typer.Option(min=1, help="users: the limit of P95 end-to-end latency.")] = 800.0,
    peers: Annotated[
        str, typer.Option(help="all that are installed, none (kernels too), or names with commas.")
    ] = "all",
    only: Annotated[
        list[str] | None,
        typer.Option(help="attention, elementwise, linear, training, serving: only cases with this in their name."),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also print the dearest kernels of each workload.")
    ] = False,
    profile_host: Annotated[
        bool, typer.Option("--profile-host", help="Also print the dearest Python functions of each workload.")
    ] = False,
    runs: Annotated[Path, typer.Option(help="Where the run is kept.")] = Path("runs"),
) -> None:
    """Measure the engine and its kernels in process, beside their peers and against this machine's ceilings.

    On a GPU the deployment is the one at full speed, without prefix cache: no two prompts begin alike.

    labkit bench mix --requests 16 --repeat 1

    labkit bench serving --only http/2 --set chunk_tokens=4

    labkit bench throughput decode --random-weights deepseek-r1-distill-qwen-1.5b --peers none
    """
    from labkit.bench.engine import Options
    from labkit.bench.peers import choose
    from labkit.bench.rows import rows_of, table
    from labkit.bench.run import bench as run_bench
    from labkit.bench.run import check_workloads
    from labkit.experiments.store import RunStore
    from labkit.runner.runner import torch_device
    from labkit.serving.knobs import deployment_from

    names = check_workloads(workloads or [])
    place = torch_device(device).type
    given = ["device=cpu"] if place == "cpu" else ["prefix_cache=false"]
    given += [f"dtype={dtype}"] if dtype else []
    if random_weights is not None:
        if model is not None:
            raise UserError("--model and --random-weights are two models; give one")
        model = shape_directory(random_weights)
        given.append("random_weights=true")
    deployment = deployment_from(model, knobs=[*given, *(knobs or [])], at_full_speed=place == "cuda")
    options = Options(
        workloads=names,
        deployment=deployment,
        without=tuple(ablation(knob) for knob in without or ()),
        repeat=repeat,
        requests=requests,
        slo_s=slo_ms / 1e3,
        peers=tuple(choose(peers)),
        profile=profile,
        profile_host=profile_host,
    )
    with told_on_interrupt(f"what was measured is kept under {runs}"):
        run = run_bench(options, RunStore(runs), lambda line: print(line, file=sys.stderr, flush=True), only or ())
    print(f"\n{table(rows_of(run))}")
    print(f"kept as {run.path}")


def shape_directory(name: str) -> str:
    """Raises UserError for a shape that the project does not have."""
    if not (SHAPES / name / "config.json").is_file():
        known = sorted(path.parent.name for path in SHAPES.glob("*/config.json"))
        raise UserError(f"no shape {name!r} under data/shapes; there are {', '.join(known) or 'none'}")
    return str(SHAPES / name)


def ablation(text: str) -> tuple[str, Any]:
    """``knob`` switches it off, ``knob=value`` gives it another value. Raises UserError for a knob that has no off."""
    import dataclasses

    from labkit.deployment import Deployment
    from labkit.serving.knobs import deployment_from

    name, equals, _ = text.partition("=")
    types = {field.name: str(field.type) for field in dataclasses.fields(Deployment)}
    if not equals and "bool" not in types.get(name, "bool"):
        raise UserError(f"{name} is not a switch; give --without {name}=VALUE")
    changed = deployment_from(None, knobs=[text if equals else f"{name}=false"])
    return name, getattr(changed, name)
