"""The commands ``labkit train`` and ``labkit distill``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from labkit.errors import UserError
from labkit.interrupt import told_on_interrupt

Steps = Annotated[int | None, typer.Option(help="Optimizer steps at most.")]
MaxSeconds = Annotated[float | None, typer.Option(help="Seconds at most, compiling included.")]
Rate = Annotated[float | None, typer.Option(help="Highest learning rate.")]
WarmUp = Annotated[int | None, typer.Option(help="Steps of rising learning rate.")]
BatchTokens = Annotated[int | None, typer.Option(help="Tokens in a micro-batch.")]
MicroBatch = Annotated[int | None, typer.Option(help="Sequences in a micro-batch, instead of --batch-tokens.")]
Accumulate = Annotated[int | None, typer.Option(help="Micro-batches in a step.")]
Checkpointing = Annotated[
    str | None,
    typer.Option(help="What is worked out again, not kept, for the backward pass: none, all, half, attention, mlp."),
]
Seed = Annotated[int | None, typer.Option(help="Seed of data and initial weights.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Autocast = Annotated[bool, typer.Option(help="Compute in bfloat16 where that is safe, and fast on this device.")]
Compile = Annotated[bool | None, typer.Option("--compile/--no-compile", help="torch.compile; by default on CUDA.")]
Processes = Annotated[int | None, typer.Option(help="Processes that write documents; by default all cores but two.")]
Checkpoints = Annotated[Path | None, typer.Option(help="Directory for checkpoints; OUT-checkpoints by default.")]
CheckpointEvery = Annotated[float, typer.Option(help="Seconds between checkpoints.")]
CheckpointEverySteps = Annotated[int | None, typer.Option(help="Steps between checkpoints, besides.")]
Runs = Annotated[Path, typer.Option(help="Run store, for the loss curve.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")]


def train(
    out: Annotated[Path, typer.Option(help="Directory for the model.")] = Path("build/ledger-r1"),
    preset: Annotated[str, typer.Option(help="ledger-r1 (how the shipped model is trained) or article.")] = "ledger-r1",
    steps: Steps = None,
    max_seconds: MaxSeconds = None,
    lr: Rate = None,
    betas: Annotated[tuple[float, float] | None, typer.Option(help="AdamW betas.")] = None,
    eps: Annotated[float | None, typer.Option(help="AdamW epsilon.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW weight decay of the matrices.")] = None,
    warm_up: WarmUp = None,
    schedule: Annotated[str | None, typer.Option(help="cosine, linear or constant.")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest gradient norm.")] = None,
    batch_tokens: BatchTokens = None,
    micro_batch: MicroBatch = None,
    accumulate: Accumulate = None,
    optimizer: Annotated[str | None, typer.Option(help="How AdamW is carried out: fused, foreach, loop.")] = None,
    checkpointing: Checkpointing = None,
    seed: Seed = None,
    device: Device = "auto",
    autocast: Autocast = True,
    compile_steps: Compile = None,
    processes: Processes = None,
    checkpoints: Checkpoints = None,
    checkpoint_every: CheckpointEvery = 60.0,
    checkpoint_every_steps: CheckpointEverySteps = None,
    runs: Runs = Path("runs"),
    resume: Resume = False,
) -> None:
    """Train the ledger model from nothing, or go on where a training was killed.

    labkit train --steps 10300 --device cuda
    """
    from labkit.training.options import pick_device
    from labkit.training.options import preset as make_options
    from labkit.training.trainer import train as run_training

    device = pick_device(device)
    options = make_options(
        preset,
        steps=steps,
        max_seconds=max_seconds,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        warm_up=warm_up,
        schedule=schedule,
        clip=clip,
        batch_tokens=batch_tokens,
        micro_batch=micro_batch,
        accumulate=accumulate,
        optimizer=optimizer,
        checkpointing=checkpointing,
        seed=seed,
        device=device,
        autocast=autocast,
        checkpoint_every_s=checkpoint_every,
        checkpoint_every_steps=checkpoint_every_steps,
        compile=_compiles(device, compile_steps),
        processes=_writers(processes),
    )
    kept = checkpoints or _beside(out)
    with told_on_interrupt(_to_go_on(kept)):
        run_training(options, out, kept, runs, resume, say=_say)


def distill(
    teacher: Annotated[Path, typer.Argument(help="Directory of the ledger model to learn from.")],
    out: Annotated[Path, typer.Option(help="Directory for the student.")] = Path("build/ledger-r1-mini"),
    preset: Annotated[str, typer.Option(help="How the shipped student is taught.")] = "ledger-r1-mini",
    layers: Annotated[int | None, typer.Option(help="Layers of the student.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Its width.")] = None,
    heads: Annotated[int | None, typer.Option(help="Its attention heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Its heads of keys and values.")] = None,
    intermediate: Annotated[int | None, typer.Option(help="Width of its feed-forward.")] = None,
    copy_layers: Annotated[
        str | None,
        typer.Option(help="Layers of the teacher that it begins as, such as 0,7, or none; by default spread evenly."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="By which the logits of both are divided.")] = None,
    soft: Annotated[float | None, typer.Option(help="Weight of the divergence from the teacher.")] = None,
    hard: Annotated[float | None, typer.Option(help="Weight of the right tokens' cross-entropy.")] = None,
    on_policy: Annotated[
        float | None, typer.Option(help="Share of batches whose completions the student writes itself.")
    ] = None,
    hints: Annotated[
        float | None,
        typer.Option(help="Weight of the distance between states of the layers, in the first part of the training."),
    ] = None,
    steps: Steps = None,
    max_seconds: MaxSeconds = None,
    lr: Rate = None,
    warm_up: WarmUp = None,
    batch_tokens: BatchTokens = None,
    micro_batch: MicroBatch = None,
    accumulate: Accumulate = None,
    checkpointing: Checkpointing = None,
    seed: Seed = None,
    device: Device = "auto",
    autocast: Autocast = True,
    compile_steps: Compile = None,
    processes: Processes = None,
    checkpoints: Checkpoints = None,
    checkpoint_every: CheckpointEvery = 60.0,
    checkpoint_every_steps: CheckpointEverySteps = None,
    runs: Runs = Path("runs"),
    resume: Resume = False,
) -> None:
    """Teach a smaller ledger model what a larger one knows, or go on where that was killed.

    labkit distill data/models/ledger-r1 --steps 16000 --device cuda
    """
    from labkit.training.distillation import distill as run_distillation
    from labkit.training.distillation import student
    from labkit.training.options import pick_device

    device = pick_device(device)
    options = student(
        preset,
        {"layers": layers, "hidden": hidden, "heads": heads, "kv_heads": kv_heads, "intermediate": intermediate},
        {
            "temperature": temperature,
            "soft": soft,
            "hard": hard,
            "on_policy": on_policy,
            "hints": hints,
            "copy_layers": _layers(copy_layers),
        },
        steps=steps,
        max_seconds=max_seconds,
        lr=lr,
        warm_up=warm_up,
        batch_tokens=batch_tokens,
        micro_batch=micro_batch,
        accumulate=accumulate,
        checkpointing=checkpointing,
        seed=seed,
        device=device,
        autocast=autocast,
        checkpoint_every_s=checkpoint_every,
        checkpoint_every_steps=checkpoint_every_steps,
        compile=_compiles(device, compile_steps),
        processes=_writers(processes),
    )
    kept = checkpoints or _beside(out)
    with told_on_interrupt(_to_go_on(kept)):
        run_distillation(options, teacher, out, kept, runs, resume, say=_say)


def _layers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if text == "none":
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--copy-layers takes numbers with commas, such as 0,7, or none; got {text!r}") from None


def _compiles(device: str, asked: bool | None) -> bool:
    return device.startswith("cuda") if asked is None else asked


def _writers(asked: int | None) -> int:
    return max(0, (os.cpu_count() or 1) - 2) if asked is None else asked


def _beside(out: Path) -> Path:
    return out.with_name(out.name + "-checkpoints")


def _say(line: str) -> None:
    print(line, flush=True)


def _to_go_on(checkpoints: Path) -> str:
    return f"--resume goes on from the newest checkpoint in {checkpoints}"
