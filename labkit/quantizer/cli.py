"""The command ``labkit quantize``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from labkit.interrupt import told_on_interrupt

if TYPE_CHECKING:
    from labkit.quantizer.report import Report


def quantize(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory or hub id, in 16 or 32 bits.")],
    out: Annotated[Path, typer.Argument(help="Directory for the quantised model; it must not exist yet.")],
    bits: Annotated[int, typer.Option(help="Of a weight: 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale: 32, 64, 128, or -1 for all.")] = 128,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text like what the model will be used for, plain or JSONL; absent: ledger problems."),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Calibration sequences, at most.")] = 128,
    length: Annotated[
        int | None, typer.Option(help="Tokens of each; by default 2048, or whole ledger problems.")
    ] = None,
    damping: Annotated[float, typer.Option(help="Added to the Hessian's diagonal, as a share of its mean.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Seed of the ledger problems.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Of activations; by default bfloat16 on a GPU.")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="MODEL is a shape of data/shapes, its weights and text made up.")
    ] = False,
) -> None:
    """Quantise a model to 4 or 8 bits by GPTQ, into a checkpoint that every reader of that format takes.

    When it was killed, the same command goes on after the last finished layer.

    labkit quantize data/models/ledger-r1 build/ledger-r1-4bit --sequences 24
    """
    from labkit.quantizer.quantize import Options
    from labkit.quantizer.quantize import quantize as run_quantization
    from labkit.training.options import pick_device

    if random_weights and not Path(model).is_dir():
        from labkit.bench.cli import shape_directory

        model = shape_directory(model)
    chosen = pick_device(device)
    options = Options(
        model=model,
        out=out,
        bits=bits,
        group_size=group_size,
        calibration=calibration,
        sequences=sequences,
        length=length,
        damping=damping,
        seed=seed,
        device=chosen,
        dtype=dtype or ("bfloat16" if chosen.startswith("cuda") else "float32"),
        random_weights=random_weights,
    )
    with told_on_interrupt("the same command goes on after the last finished layer"):
        report = run_quantization(options, say=lambda line: print(line, file=sys.stderr, flush=True))
    _show(report)
    print(f"written to {out}")


def _show(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    from labkit.quantizer.report import COLUMNS, table_rows

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number == 1 else "right")
    for row in table_rows(report.lines):
        table.add_row(*row)
    # a log or a pipe has no width of its own, and figures broken over lines are hard to read
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    for fallback in report.fallbacks:
        print(f"rounded to nearest: {fallback}")
    peak = "" if report.peak_bytes is None else f", {report.peak_bytes / 2**30:.1f} GiB of GPU memory at most"
    made_up = " (weights and text made up)" if report.random_weights else ""
    print(f"{report.tokens:,} calibration tokens, {report.seconds:.0f} s{peak}{made_up}")
