"""The ``labkit`` command: a thin face on what is below. Every command imports what it needs when it is called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from labkit.bench.cli import bench
from labkit.errors import UserError
from labkit.evaluation.cli import evaluate
from labkit.interrupt import told_on_interrupt
from labkit.link.cli import link
from labkit.quantizer.cli import quantize
from labkit.training.cli import distill, train

LogLevel = Literal["debug", "info", "warning", "error"]

app = typer.Typer(
    name="labkit",
    help="An optimisation lab for LLM inference.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.command()(train)
app.command()(distill)
app.command()(evaluate)
app.command()(quantize)
app.command()(bench)
app.command()(link)


@app.callback()
def _options() -> None:
    """An optimisation lab for LLM inference."""


@app.command()
def load(
    url: Annotated[str, typer.Argument(help="Address of an OpenAI-compatible server, such as http://127.0.0.1:8000.")],
    users: Annotated[
        int | None, typer.Option(help="Closed loop: so many users, each waiting for an answer before asking again.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Open loop instead: so many requests per second, whatever the server does.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(help="Measured requests (40 unless a duration or a trace is given).")
    ] = None,
    duration: Annotated[float | None, typer.Option(help="Or measured seconds.")] = None,
    arrivals: Annotated[str | None, typer.Option(help="Open loop: poisson (default), constant or bursty.")] = None,
    cv: Annotated[float, typer.Option(help="Bursty: coefficient of variation of the gaps.")] = 3.0,
    trace: Annotated[
        str | None, typer.Option(help="JSONL of requests: t (s), and bucket or prompt (with answer, max_tokens).")
    ] = None,
    think: Annotated[float, typer.Option(help="Closed loop: seconds between an answer and the next request.")] = 0.0,
    ramp: Annotated[float, typer.Option(help="Seconds over which users or rate rise; not measured.")] = 0.0,
    warm_up: Annotated[float, typer.Option(help="Seconds after the ramp that are not measured.")] = 0.0,
    timeout: Annotated[
        float, typer.Option(help="Seconds after which a request has failed (the article's client: 5).")
    ] = 60.0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    mix: Annotated[str, typer.Option(help="Percent of short/medium/long prompts.")] = "60/30/10",
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Ask for streamed answers.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of prompts and arrivals.")] = 0,
    model: Annotated[str | None, typer.Option(help="Model to ask for; the server's first by default.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="LABKIT_API_KEY", help="Bearer token.")] = None,
    processes: Annotated[
        int | None, typer.Option(help="Client processes; as many as the traffic needs by default.")
    ] = None,
    transport: Annotated[
        str | None,
        typer.Option(help="http/1.1, 'http/1.1 close', http/2, http/3 or grpc, where the address leaves a choice."),
    ] = None,
    connections: Annotated[
        str | None, typer.Option(help="How many the streams share: a number, or 'each' for one a stream.")
    ] = None,
    cafile: Annotated[Path | None, typer.Option(help="Certificate to trust (labkit serve prints its own).")] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Measure the client itself afterwards (some 5 s).")
    ] = True,
    limit: Annotated[
        float | None, typer.Option(help="Latency limit in seconds: goodput, and is the P95 within it?")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the run.")] = "load",
    runs: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
    export_jmeter: Annotated[
        Path | None, typer.Option(help="Send nothing: write this .jmx, a plan that has JMeter send the same.")
    ] = None,
) -> None:
    """Send traffic (prompts of the ledger task) to a server, print what it did, and keep the run.

    labkit load http://127.0.0.1:8000 --users 8 --requests 40

    labkit load http://127.0.0.1:8000 --rate 5 --duration 60 --warm-up 10

    labkit load grpc://127.0.0.1:8000 --users 300 --connections 4

    labkit load http://127.0.0.1:8000 --users 300 --requests 1500 --export-jmeter plan.jmx
    """
    from labkit.experiments.record import record_load
    from labkit.experiments.store import RunStore
    from labkit.experiments.summary import summary_text
    from labkit.traffic.progress import showing_progress
    from labkit.traffic.target import Target, parse_connections
    from labkit.traffic.workload import Workload, parse_mix

    if sum(given is not None for given in (users, rate, trace)) > 1:
        raise UserError("give one of --users (closed loop), --rate (open loop) and --trace")
    if arrivals is not None and rate is None:
        raise UserError("--arrivals says how an open loop's requests come; give it with --rate")
    kind = "trace" if trace else "closed" if rate is None else (arrivals or "poisson")
    if requests is None and duration is None and trace is None:
        requests = 40
    try:
        workload = Workload(
            name=name, mix=parse_mix(mix), arrivals=kind, users=8 if users is None else users,  # type: ignore[arg-type]
            think_s=think, rate=1.0 if rate is None else rate, cv=cv, trace=trace, requests=requests,
            duration_s=duration, ramp_s=ramp, warmup_s=warm_up, timeout_s=timeout, max_tokens=max_tokens,
            stream=stream, seed=seed,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from error
    if export_jmeter is not None:
        from labkit.traffic.jmeter import export

        target = Target.parse(url, api_key, transport, parse_connections(connections), str(cafile) if cafile else None)
        print(export(export_jmeter, workload, target, model))
        return
    store = RunStore(runs)
    for rest in store.unfinished():
        print(f"labkit: an earlier run did not end: {rest}", file=sys.stderr)
    with told_on_interrupt("nothing of this run was kept"), showing_progress(name) as progress:
        run = record_load(
            url,
            workload,
            store,
            model,
            api_key=api_key,
            transport=transport,
            connections=parse_connections(connections),
            cafile=None if cafile is None else str(cafile),
            processes=processes,
            calibrated=calibrate,
            progress=progress,
        )
    print(summary_text(run, limit))
    print(f"kept as {run.path}")


@app.command()
def run(
    notebooks: Annotated[list[Path] | None, typer.Argument(help="Notebooks to execute; by default all.")] = None,
    profile: Annotated[str | None, typer.Option(help="quick, cpu or h200; by default LABKIT_PROFILE or quick.")] = None,
    timeout: Annotated[float | None, typer.Option(min=1, help="Seconds a notebook may take.")] = None,
    parameter: Annotated[
        list[str] | None, typer.Option("-p", "--parameter", help="name=value, the value YAML.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Directory of the notebooks.")] = Path("notebooks"),
    out: Annotated[Path, typer.Option(help="Directory for what comes of them.")] = Path("runs"),
) -> None:
    """Execute notebooks headless, each under a time limit; the others still run when one fails."""
    from labkit.report.execute import find_notebooks, run_notebooks
    from labkit.report.parameters import parse
    from labkit.report.profiles import load_profile
    from labkit.report.progress import summary

    chosen, given = load_profile(profile), parse(parameter or [])
    executions = run_notebooks(find_notebooks(notebooks or [], folder), chosen, out, given, timeout)
    summary(executions, sys.stdout)
    if any(execution.status != "succeeded" for execution in executions):
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[Path, typer.Option(help="Directory that `labkit run` filled.")] = Path("runs"),
    site: Annotated[Path, typer.Option(help="Directory for the site; what is in it is replaced.")] = Path("site"),
    show: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
    figure: Annotated[
        Path | None, typer.Option(help="Instead, draw the newest walk of the ladder into this SVG file.")
    ] = None,
) -> None:
    """Build the offline site from the executed notebooks."""
    if figure is not None:
        from labkit.experiments.store import RunStore
        from labkit.report.first_result import write_first_result

        write_first_result(RunStore(runs), figure)
        print(f"drawn: {figure}")
        return
    from labkit.report.site import build

    index = build(runs, site)
    print(f"the report is at {index.absolute().as_uri()}")
    if show:
        import webbrowser

        webbrowser.open(index.absolute().as_uri())


@app.command()
def ladder(
    model: Annotated[
        str | None, typer.Argument(help="A Hugging Face directory or hub id; absent: the shipped model.")
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the model runs.")] = "auto",
    users: Annotated[
        int, typer.Option(min=1, help="Concurrent users, each waiting for an answer before asking again.")
    ] = 8,
    requests: Annotated[int, typer.Option(min=1, help="Requests of every run.")] = 24,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of every rung, interleaved.")] = 2,
    rung: Annotated[list[str] | None, typer.Option(help="Only this rung, besides the first; may be repeated.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request has failed.")] = 300.0,
    runs: Annotated[Path, typer.Option(help="Where runs are kept; finished ones are not made again.")] = Path("runs"),
) -> None:
    """Walk from the deployment as first deployed to the best one, a knob at a time, under the article's traffic.

    labkit ladder --rung "continuous batching"
    """
    from labkit.deployment import SHIPPED_MODEL
    from labkit.experiments.ladder import choose, walk
    from labkit.experiments.ladder import ladder as all_rungs
    from labkit.experiments.store import RunStore
    from labkit.report.results import article_changes, steps_table, users_line
    from labkit.report.tables import change_table
    from labkit.runner.runner import torch_device
    from labkit.traffic.workload import Workload

    rungs = all_rungs(model or SHIPPED_MODEL, torch_device(device).type)
    try:
        chosen = choose(rungs, [rungs[0].name, *rung] if rung else [])
    except ValueError as error:
        raise UserError(str(error)) from error
    workload = Workload.article(users=users, requests=requests, timeout_s=timeout)
    walked = walk(chosen, workload, RunStore(runs), repeats)
    for table in (steps_table(walked), change_table(article_changes(walked), users_line(walked))):
        print(f"\n{table.text(width=200)}")


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Argument(help="A Hugging Face directory or hub id; absent: the shipped model.")
    ] = None,
    deployment: Annotated[str | None, typer.Option(help="A deployment as JSON, or a file that holds one.")] = None,
    as_first_deployed: Annotated[
        bool, typer.Option("--as-first-deployed", help="Start from the first deployment.")
    ] = False,
    at_full_speed: Annotated[
        bool, typer.Option("--at-full-speed", help="Start from the best one on a GPU: everything on, bfloat16.")
    ] = False,
    knobs: Annotated[list[str] | None, typer.Option("--set", help="One knob: NAME=VALUE. May be repeated.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one and prints it.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="LABKIT_API_KEY", help="Required of every request under /v1/.")
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model; absent: its last name.")
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option(help="PEM file of the server's certificate, for 'http/2 tls' and http/3; absent: one made here."),
    ] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file of the certificate's key.")] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Compute nothing: tokens come on a schedule, such as ttft_ms=50,itl_ms=20,tokens=256. "
            "For measuring the wire."
        ),
    ] = None,
    max_body_mb: Annotated[float, typer.Option(min=0.001, max=1024, help="Largest request body.")] = 4.0,
    log_level: Annotated[LogLevel, typer.Option(help="debug also logs every request.")] = "warning",
    die_with_parent: Annotated[
        bool, typer.Option("--die-with-parent", help="Stop when the starting process ends.")
    ] = False,
) -> None:
    """Serve a model over an OpenAI-compatible API; prints "ready on URL" once it is warm.

    The wire is a knob: --set transport=VALUE with http/1.1, "http/1.1 close" (a connection a request), http/2
    (cleartext, prior knowledge), "http/2 tls" (ALPN; prints the certificate that clients are to trust), http/3 (over
    QUIC, with HTTP/2 and HTTP/1.1 under TLS on the TCP port of the same number) or grpc
    (labkit/wire/generation.proto; health and metrics by HTTP on a port beside, which it prints).

    labkit serve --port 0 --set transport="http/2 tls"

    labkit serve --set transport=grpc --set chunk_tokens=8 --set chunk_ms=50 --schedule ttft_ms=50,itl_ms=20
    """
    from labkit.serving.knobs import deployment_from

    served = deployment_from(model, deployment, as_first_deployed, knobs or [], at_full_speed)
    from labkit.models.directory import name_of
    from labkit.serving.options import ServerOptions
    from labkit.serving.schedule import Schedule
    from labkit.serving.server import Where, default_temperature, end_process
    from labkit.serving.server import serve as run_server

    options = ServerOptions(
        model_name=served_model_name or name_of(served.model),
        api_key=api_key or None,
        max_body_bytes=int(max_body_mb * 2**20),
        default_temperature=default_temperature(served.model),
    )
    where = Where(host, port, certificate, key)
    plan = Schedule.parse(schedule) if schedule is not None else None
    end_process(run_server(served, options, where, log_level, die_with_parent, plan))


def main() -> None:
    """Entry point: a UserError or a failing disk becomes one clear line and exit code 1."""
    try:
        app()
    except UserError as error:
        print(f"labkit: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"labkit: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
