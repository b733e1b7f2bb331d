"""Trains the ledger model: steps fed by processes that write documents, checkpoints, a curve, quick probes."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from labkit.errors import UserError
from labkit.training.checkpoint import Progress, load_checkpoint, newest_checkpoint, save_checkpoint
from labkit.training.curve import CurveRun, describe_machine, read_curve
from labkit.training.documents import Batch, Feed
from labkit.training.ledger import BUCKETS
from labkit.training.modeldir import write_model
from labkit.training.network import Network
from labkit.training.objective import NextToken, Objective
from labkit.training.options import TrainOptions, check_device, check_room, has_bf16
from labkit.training.probe import Probe, make_probe, run_probe
from labkit.training.schedule import bucket_at, fraction_done, is_done, rate_at, rows_of, seconds_left
from labkit.training.steps import Stepper
from labkit.training.tokenizer import piece_table, train_tokenizer

_AHEAD = 48
# options that may change between sittings without changing what is learnt from which data
_FREE = (
    "steps", "max_seconds", "processes", "device", "compile", "checkpoint_every_s", "checkpoint_every_steps",
    "probe_every_s", "report_every_s", "curve_every", "optimizer", "checkpointing",
)  # fmt: skip

Say = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """What ``train`` leaves behind."""

    model: Path
    run: Path
    progress: Progress


def train(
    options: TrainOptions,
    out: Path,
    checkpoints: Path,
    runs: Path,
    resume: bool = False,
    say: Say | None = None,
    teach: Callable[[Network], Objective] = NextToken,
) -> Trained:
    """Trains a model into directory ``out``. ``say`` takes progress lines (standard error by default).

    ``teach`` is given the network as it begins, on its device, may change its weights, and says what it shall learn.

    Raises UserError for what the user can mend: no CUDA, no space, checkpoints in the way, options that do not fit
    them, a loss that is not finite, a process that died.
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    began = time.monotonic()
    _check_surroundings(options, checkpoints, out)
    tokenizer = train_tokenizer()
    options = replace(options, shape=replace(options.shape, vocabulary=tokenizer.get_vocab_size()))
    if options.autocast and not has_bf16(options.device):
        say(f"{options.device} has no fast bfloat16: training in float32")
        options = replace(options, autocast=False)
    progress, path = _where_to_start(options, checkpoints, resume, say)
    network = Network(options.shape, options.seed).to(options.device)
    objective = teach(network)
    stepper = Stepper(network, options, objective)
    parameters = sum(parameter.numel() for parameter in network.model.parameters())
    if path is not None:
        load_checkpoint(path, stepper.network, stepper.optimizer)
    resumed_at, before = progress.step, progress.elapsed_s
    run = _open_run(options, runs, progress)
    say(f"training {parameters / 1e6:.1f}M parameters on {options.device}, run {run.path}")
    sitting = _Sitting(
        options=options,
        stepper=stepper,
        feed=Feed(piece_table(tokenizer), options.seed, options.processes),
        run=run,
        checkpoints=checkpoints,
        progress=progress,
        elapsed=lambda: before + time.monotonic() - began,
        say=say,
        probe=make_probe(tokenizer, options.device) if options.device != "cpu" else None,
    )
    try:
        sitting.work()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that writes documents was killed, probably for want of memory; "
            "go on with --resume and fewer --processes"
        ) from error
    finally:
        sitting.feed.close()
    write_model(stepper.network, tokenizer, out)
    run.finish(
        steps=progress.step,
        resumed_at=resumed_at,
        tokens=progress.tokens,
        elapsed_s=progress.elapsed_s,
        parameters=parameters,
        data_seed=options.seed,
        **objective.facts(),
    )
    say(f"{out}: model after {progress.step} steps, {progress.tokens / 1e6:.1f}M tokens, {progress.elapsed_s:.0f} s")
    return Trained(out, run.path, progress)


def _check_surroundings(options: TrainOptions, checkpoints: Path, out: Path) -> None:
    check_device(options.device)
    size = sum(p.numel() for p in Network(options.shape).parameters())
    # float32 weights and two moments, three checkpoints while the oldest is not yet removed
    check_room(checkpoints, 3 * 12 * size)
    check_room(out, 3 * size)


def _where_to_start(options: TrainOptions, checkpoints: Path, resume: bool, say: Say) -> tuple[Progress, Path | None]:
    # as they come back from JSON, where a tuple is a list
    facts = {key: value for key, value in json.loads(json.dumps(asdict(options))).items() if key not in _FREE}
    found = newest_checkpoint(checkpoints) if checkpoints.is_dir() else None
    if found is None:
        if resume:
            say(f"no checkpoint in {checkpoints}: starting from the beginning")
        return Progress(taken=dict.fromkeys(BUCKETS, 0), options=facts), None
    path, progress = found
    if not resume:
        raise UserError(
            f"{checkpoints} holds a training at step {progress.step}; "
            "add --resume to go on with it, or name another directory with --checkpoints"
        )
    if changed := [key for key in facts if progress.options.get(key) != facts[key]]:
        raise UserError(
            f"{path} was trained with other options ({', '.join(changed)}); give the same ones or another directory"
        )
    reached = max((int(str(row["step"])) for row in read_curve(Path(progress.run))), default=progress.step)
    lost = f"steps {progress.step + 1} to {reached} are lost and done again"
    say(
        f"resuming from {path} at step {progress.step}; "
        + (lost if reached > progress.step else "nothing on record is lost")
    )
    return progress, path


def _open_run(options: TrainOptions, runs: Path, progress: Progress) -> CurveRun:
    """A new run that begins with what the one before it, if any, recorded up to the checkpoint."""
    run = CurveRun(runs, asdict(options), describe_machine(options.device))
    for row in read_curve(Path(progress.run)) if progress.run else []:
        if int(str(row["step"])) <= progress.step:
            run.add(row)
    progress.run = str(run.path)
    return run


@dataclass
class _Sitting:
    """One uninterrupted stretch of a training. ``elapsed`` is in seconds over all sittings."""

    options: TrainOptions
    stepper: Stepper
    feed: Feed
    run: CurveRun
    checkpoints: Path
    progress: Progress
    elapsed: Callable[[], float]
    say: Say
    probe: Probe | None

    def __post_init__(self) -> None:
        self._asked_steps, self._asked = self.progress.step, dict(self.progress.taken)

    def work(self) -> None:
        """Steps until the end, with curve, probes, progress lines and checkpoints on the way."""
        options, progress = self.options, self.progress
        if is_done(options, progress.step, self.elapsed()):
            return
        if options.compile:
            self._ask_ahead()
            self.stepper.compile(self.say)
        saved = probed = told = time.monotonic()
        window = _Window()
        last = False
        while not last:
            done = self._fraction(progress.step)
            rate = rate_at(options, progress.step, done)
            batches, starved = self._take()
            window.add(*self.stepper.step(batches, rate, done), sum(batch.ids.size for batch in batches), starved)
            self._count(batches)
            now = time.monotonic()
            last = is_done(options, progress.step, progress.elapsed_s)
            due = options.checkpoint_every_steps and progress.step % options.checkpoint_every_steps == 0
            if due or now - saved >= options.checkpoint_every_s or last:
                self._check(window)
                save_checkpoint(self.checkpoints, self.stepper.network, self.stepper.optimizer, progress)
                saved = time.monotonic()
            if progress.step % options.curve_every == 0 or last:
                self._check(window)
                row = window.close()
                self._record(row | {"lr": rate, "bucket": batches[0].bucket})
                if now - told >= options.report_every_s or last:
                    self._tell(row)
                    told = now
                window = _Window()
            if self.probe is not None and (now - probed >= options.probe_every_s or last):
                self._run_probe(self.probe)
                probed = time.monotonic()

    def _fraction(self, step: int) -> float:
        return fraction_done(self.options, step, self.elapsed())

    def _take(self) -> tuple[list[Batch], float]:
        """The micro-batches of the next step, and the seconds waited for them."""
        self._ask_ahead()
        taken = [self.feed.take() for _ in range(self.options.accumulate)]
        return [batch for batch, _ in taken], sum(waited for _, waited in taken)

    def _ask_ahead(self) -> None:
        """Keeps the feed ahead of the steps. Which bucket a step gets is settled when its batches are asked for."""
        options = self.options
        while len(self.feed) < options.accumulate or (len(self.feed) < _AHEAD and options.processes):
            if options.steps is not None and self._asked_steps >= options.steps:
                break
            bucket = bucket_at(options, self._asked_steps, self._fraction(self._asked_steps))
            for _ in range(options.accumulate):
                self.feed.request(bucket, self._asked[bucket], rows_of(options, bucket))
                self._asked[bucket] += 1
            self._asked_steps += 1

    def _count(self, batches: list[Batch]) -> None:
        progress = self.progress
        progress.step += 1
        for batch in batches:
            progress.taken[batch.bucket] += 1
            progress.tokens += batch.ids.size
        progress.elapsed_s = self.elapsed()

    def _check(self, window: _Window) -> None:
        if not window.is_finite():
            raise UserError(
                f"loss or gradients are not finite near step {self.progress.step}; "
                "go on from the last checkpoint with --resume, or start anew with a lower --lr or --clip"
            )

    def _record(self, row: dict[str, object]) -> None:
        progress = self.progress
        where = {"step": progress.step, "tokens": progress.tokens, "elapsed_s": round(progress.elapsed_s, 2)}
        self.run.add({**where, **row})

    def _tell(self, row: dict[str, float]) -> None:
        step, elapsed = self.progress.step, self.elapsed()
        self.say(
            f"step {step}  loss {row['loss']:.4f}  norm {row['norm']:.2f}  {row['tokens_per_s'] / 1e3:.0f}k tokens/s  "
            f"starved {row['starved']:.0%}  {self._fraction(step):.0%}, "
            f"{seconds_left(self.options, step, elapsed):.0f} s left"
        )

    def _run_probe(self, probe: Probe) -> None:
        with self.stepper.autocast():
            result = run_probe(self.stepper.network, probe)
        self.run.add({"step": self.progress.step, "probe": result})
        self.say("probe " + "  ".join(f"{name} {share:.0%}" for name, share in result.items()))


class _Window:
    """Steps between two lines of the curve."""

    def __init__(self) -> None:
        self.began, self.steps, self.tokens, self.starved = time.monotonic(), 0, 0, 0.0
        self.loss: Tensor | float = 0.0
        self.norm: Tensor | float = 0.0

    def add(self, loss: Tensor, norm: Tensor, tokens: int, starved: float) -> None:
        self.steps, self.tokens, self.starved = self.steps + 1, self.tokens + tokens, self.starved + starved
        self.loss, self.norm = self.loss + loss, self.norm + norm

    def is_finite(self) -> bool:
        """Waits for the device. A norm that is not finite means weights that are not."""
        return math.isfinite(float(self.loss)) and math.isfinite(float(self.norm))

    def close(self) -> dict[str, float]:
        """Means over the window. Waits for the device."""
        loss, norm = float(self.loss) / self.steps, float(self.norm) / self.steps
        seconds = max(time.monotonic() - self.began, 1e-9)
        return {
            "loss": loss,
            "norm": norm,
            "tokens_per_s": self.tokens / seconds,
            "starved": self.starved / seconds,
        }
