"""The ``labkit evaluate`` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory or hub id.")],
    problems: Annotated[
        int | None, typer.Option(min=0, help="Ledger problems per bucket; by default 1000, with --text none.")
    ] = None,
    buckets: Annotated[str, typer.Option(help="Buckets, separated by commas.")] = "short,medium,long",
    seed: Annotated[int, typer.Option(help="Seed of the problems.")] = 0,
    reference: Annotated[
        str | None,
        typer.Option(help="A model to be compared with, or the --result of an earlier evaluation."),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 file whose perplexity to measure.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest answer of a model that is no ledger model, in tokens.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    result: Annotated[Path | None, typer.Option(help="JSON file for the account.")] = None,
) -> None:
    """Ask a model unseen ledger problems, count the exactly right answers with Wilson 95 % intervals, and measure how
    likely it finds the right completions, or a text; with a reference, how far the two agree and who is better.

    labkit evaluate data/models/ledger-r1 --problems 50 --buckets short,medium

    labkit evaluate build/ledger-r1-mini --reference data/models/ledger-r1

    labkit evaluate Qwen/Qwen2.5-0.5B-Instruct --text book.txt
    """
    from rich.console import Console
    from rich.table import Table

    from labkit.evaluation.evaluate import Wishes
    from labkit.evaluation.evaluate import evaluate as run_evaluation
    from labkit.evaluation.show import tables
    from labkit.training.options import pick_device

    if problems is None:
        problems = 1000 if text is None else 0
    chosen = tuple(bucket.strip() for bucket in buckets.split(","))
    account = run_evaluation(
        model,
        Wishes(problems, chosen, seed, text, reference, max_tokens),
        pick_device(device),
        result=result,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    # a log or a pipe has no width of its own, and figures broken over lines are hard to read
    console = Console(width=None if sys.stdout.isatty() else 120)
    for number, (header, *rows) in enumerate(tables(account)):
        table = Table(*header, box=None, pad_edge=False, header_style="bold")
        for row in rows:
            table.add_row(*row)
        if number:
            print()
        console.print(table)
    if result is not None:
        print(f"written to {result}")
