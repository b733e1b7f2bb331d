"""Trains the ledger model: compiled steps fed by processes that write documents, checkpoints, a curve, quick probes."""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from labkit.errors import UserError
from labkit.training.checkpoint import Progress, load_checkpoint, newest_checkpoint, save_checkpoint
from labkit.training.curve import CurveRun, describe_machine, read_curve
from labkit.training.documents import LENGTHS, Batch, Feed
from labkit.training.ledger import BUCKETS
from labkit.training.modeldir import write_model
from labkit.training.network import Network, weighted_loss
from labkit.training.options import TrainOptions, check_room
from labkit.training.probe import Probe, make_probe, run_probe
from labkit.training.tokenizer import piece_table, train_tokenizer

_AHEAD = 48
# options that may change between sittings without changing what is learnt from which data
_FREE = ("steps", "max_seconds", "processes", "device", "compile", "checkpoint_every_s", "checkpoint_every_steps",
         "probe_every_s", "report_every_s", "curve_every")  # fmt: skip

Say = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """What ``train`` leaves behind."""

    model: Path
    run: Path
    progress: Progress


def train(options: TrainOptions, out: Path, checkpoints: Path, runs: Path, resume: bool = False, say: Say | None = None) -> Trained:
    """Trains a model into directory ``out``. ``say`` takes progress lines (standard error by default).

    Raises UserError for what the user can mend: no CUDA, no space, checkpoints in the way, options that do not fit them,
    a loss that is not finite.
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    began = time.monotonic()
    _check_surroundings(options, checkpoints, out)
    tokenizer = train_tokenizer()
    options = replace(options, shape=replace(options.shape, vocabulary=tokenizer.get_vocab_size()))
    progress, path = _where_to_start(options, checkpoints, resume, say)
    feed = Feed(piece_table(tokenizer), options.seed, options.processes)
    try:
        network = Network(options.shape, options.seed).to(options.device)
        optimizer = make_optimizer(network, options)
        if path is not None:
            load_checkpoint(path, network, optimizer)
        run = CurveRun(runs, asdict(options), describe_machine(options.device))
        progress.run = str(run.path)
        say(f"training {sum(p.numel() for p in network.parameters()) / 1e6:.1f}M parameters on {options.device}, run {run.path}")
        before, finished_before = progress.elapsed_s, progress.step
        sitting = _Sitting(options, network, optimizer, tokenizer, feed, run, checkpoints, progress, say, began, before)
        if not _is_done(options, progress):
            sitting.work()
        write_model(network, tokenizer, out)
        run.finish(
            steps=progress.step,
            resumed_at=finished_before,
            tokens=progress.tokens,
            elapsed_s=progress.elapsed_s,
            parameters=sum(p.numel() for p in network.parameters()),
            data_seed=options.seed,
        )
        say(f"{out}: model after {progress.step} steps, {progress.tokens / 1e6:.1f}M tokens, {progress.elapsed_s:.0f} s")
        return Trained(out, run.path, progress)
    finally:
        feed.close()


def make_optimizer(network: Network, options: TrainOptions) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, the embedding, norms and biases do not."""
    decayed = [p for name, p in network.named_parameters() if p.dim() == 2 and "embed" not in name]
    kept = [p for name, p in network.named_parameters() if p.dim() != 2 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)


def rate_at(options: TrainOptions, step: int, fraction: float) -> float:
    """Learning rate of ``step`` (from 0) when ``fraction`` of the training lies behind."""
    fraction = min(max(fraction, 0.0), 1.0)
    shape = {"constant": 1.0, "linear": 1.0 - fraction, "cosine": 0.5 * (1.0 + math.cos(math.pi * fraction))}
    factor = options.final_lr + (1.0 - options.final_lr) * shape[options.schedule]
    return options.lr * factor * min(1.0, (step + 1) / max(1, options.warm_up))


def bucket_at(options: TrainOptions, step: int, fraction: float) -> str:
    """The bucket of ``step``: short ones at first, the final shares after a quarter of the training."""
    way = min(1.0, 4.0 * fraction)
    shares = [first + way * (last - first) for first, last in zip(options.first_shares, options.shares, strict=True)]
    draw = random.Random(f"bucket/{options.seed}/{step}").random() * sum(shares)
    for bucket, share in zip(BUCKETS, shares, strict=True):
        draw -= share
        if draw < 0:
            return bucket
    return BUCKETS[-1]


def rows_of(options: TrainOptions, bucket: str) -> int:
    """Documents in one micro-batch of ``bucket``."""
    return options.micro_batch or max(1, options.batch_tokens // LENGTHS[bucket])


def _check_surroundings(options: TrainOptions, checkpoints: Path, out: Path) -> None:
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device that torch can use; train with --device cpu, or on a GPU machine")
    size = sum(p.numel() for p in Network(options.shape).parameters())
    check_room(checkpoints, 3 * 12 * size)
    check_room(out, 3 * size)


def _where_to_start(options: TrainOptions, checkpoints: Path, resume: bool, say: Say) -> tuple[Progress, Path | None]:
    facts = {key: value for key, value in _plain(asdict(options)).items() if key not in _FREE}
    found = newest_checkpoint(checkpoints) if checkpoints.is_dir() else None
    if found is None:
        if resume:
            say(f"no checkpoint in {checkpoints}: starting from the beginning")
        return Progress(taken=dict.fromkeys(BUCKETS, 0), options=facts), None
    path, progress = found
    if not resume:
        raise UserError(f"{checkpoints} holds a training at step {progress.step}; add --resume to go on with it, or name another directory")
    changed = [key for key in facts if progress.options.get(key) != facts[key]]
    if changed:
        raise UserError(f"{path} was trained with other options ({', '.join(changed)}); give the same ones or another directory")
    reached = progress.step
    if (Path(progress.run) / "curve.jsonl").is_file():
        reached = max((int(str(row["step"])) for row in read_curve(Path(progress.run))), default=reached)
    lost = f"steps {progress.step + 1} to {reached} are lost and done again" if reached > progress.step else "nothing on record is lost"
    say(f"resuming from {path} at step {progress.step}; {lost}")
    return progress, path


def _plain(value: dict[str, object]) -> dict[str, object]:
    """``value`` as it comes back from JSON, where a tuple is a list."""
    import json

    plain: dict[str, object] = json.loads(json.dumps(value))
    return plain


def _is_done(options: TrainOptions, progress: Progress) -> bool:
    by_steps = options.steps is not None and progress.step >= options.steps
    return by_steps or (options.max_seconds is not None and progress.elapsed_s >= options.max_seconds)


class _Sitting:
    """One uninterrupted stretch of a training."""

    def __init__(self, options: TrainOptions, network: Network, optimizer: torch.optim.Optimizer, tokenizer: Tokenizer,
                 feed: Feed, run: CurveRun, checkpoints: Path, progress: Progress, say: Say, began: float, before: float) -> None:  # fmt: skip
        self.options, self.network, self.optimizer, self.feed = options, network, optimizer, feed
        self.run, self.checkpoints, self.progress, self.say = run, checkpoints, progress, say
        self.began, self.before = began, before
        self.tokenizer = tokenizer
        self.loss: Callable[[Tensor, Tensor], Tensor] = lambda ids, weights: weighted_loss(network, ids, weights)
        if options.compile:
            self.loss = torch.compile(self.loss, dynamic=False)
        self.asked_steps, self.asked = progress.step, dict(progress.taken)

    def elapsed(self) -> float:
        """Seconds over all sittings."""
        return self.before + time.monotonic() - self.began

    def fraction(self, step: int) -> float:
        """How much of the training lies behind at ``step``, by the limit that is nearer."""
        by_steps = step / self.options.steps if self.options.steps else 0.0
        by_time = self.elapsed() / self.options.max_seconds if self.options.max_seconds else 0.0
        return max(by_steps, by_time)

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 autocast where asked for."""
        return torch.autocast(torch.device(self.options.device).type, torch.bfloat16, enabled=self.options.autocast)

    def work(self) -> None:
        """Steps until the end, with curve, probes, progress lines and checkpoints on the way."""
        options, progress = self.options, self.progress
        if options.compile:
            self._compile()
        probe = make_probe(self.tokenizer, options.device) if options.probe_every_s and options.device != "cpu" else None
        saved = probed = told = time.monotonic()
        window = _Window(time.monotonic())
        while not _is_done(options, progress):
            fraction = self.fraction(progress.step)
            rate = rate_at(options, progress.step, fraction)
            bucket, loss, norm, waited = self._step(rate)
            window.add(loss, norm, rows_of(options, bucket) * LENGTHS[bucket] * options.accumulate, waited)
            progress.elapsed_s = self.elapsed()
            now = time.monotonic()
            last = _is_done(options, progress)
            if progress.step % options.curve_every == 0 or last:
                row = window.close(now)
                self._record(row | {"lr": rate, "bucket": bucket})
                if now - told >= options.report_every_s or last:
                    self._tell(row)
                    told = now
                window = _Window(time.monotonic())
            due = options.checkpoint_every_steps and progress.step % options.checkpoint_every_steps == 0
            if due or now - saved >= options.checkpoint_every_s or last:
                save_checkpoint(self.checkpoints, self.network, self.optimizer, progress)
                saved = time.monotonic()
            if probe is not None and (now - probed >= options.probe_every_s or last):
                self._probe(probe)
                probed = time.monotonic()

    def _step(self, rate: float) -> tuple[str, Tensor, Tensor, float]:
        """One optimizer step; returns its bucket, loss and gradient norm (tensors, so that nothing waits), seconds starved."""
        options = self.options
        self._ask_ahead()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total: Tensor | float = 0.0
        starved = 0.0
        for _ in range(options.accumulate):
            batch, waited = self.feed.take()
            starved += waited
            ids, weights = self._move(batch)
            with self.autocast():
                loss = self.loss(ids, weights) / options.accumulate
            loss.backward()
            total = total + loss.detach()
            self.progress.taken[batch.bucket] += 1
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.tokens += batch.ids.size * options.accumulate
        assert isinstance(total, Tensor)
        return batch.bucket, total, norm, starved

    def _ask_ahead(self) -> None:
        """Keeps the feed ahead of the steps. Which bucket a step gets is settled when its batches are asked for."""
        options = self.options
        while len(self.feed) < options.accumulate or len(self.feed) < _AHEAD and options.processes:
            if options.steps is not None and self.asked_steps >= options.steps:
                break
            bucket = bucket_at(options, self.asked_steps, self.fraction(self.asked_steps))
            for _ in range(options.accumulate):
                self.feed.request(bucket, self.asked[bucket], rows_of(options, bucket))
                self.asked[bucket] += 1
            self.asked_steps += 1

    def _move(self, batch: Batch) -> tuple[Tensor, Tensor]:
        ids, weights = torch.from_numpy(batch.ids), torch.from_numpy(batch.weights)
        if self.options.device.startswith("cuda"):
            ids, weights = ids.pin_memory(), weights.pin_memory()
        return ids.to(self.options.device, non_blocking=True).long(), weights.to(self.options.device, non_blocking=True)

    def _compile(self) -> None:
        """Compiles every shape before the first step; if the compiler fails, the training goes on without it."""
        self._ask_ahead()
        began = time.monotonic()
        plain: Callable[[Tensor, Tensor], Tensor] = lambda ids, weights: weighted_loss(self.network, ids, weights)  # noqa: E731
        try:
            for bucket in BUCKETS:
                shape = (rows_of(self.options, bucket), LENGTHS[bucket])
                ids = torch.zeros(shape, dtype=torch.int64, device=self.options.device)
                weights = torch.ones(shape, dtype=torch.uint8, device=self.options.device)
                with self.autocast():
                    self.loss(ids, weights).backward()
                self.say(f"compiled for {bucket} documents {shape} after {time.monotonic() - began:.0f} s")
        except Exception as error:  # noqa: BLE001 - whatever the compiler raises, uncompiled steps still train
            self.say(f"torch.compile failed ({str(error).splitlines()[0][:200]}); training without it, slower")
            self.loss = plain
        self.optimizer.zero_grad(set_to_none=True)

    def _record(self, row: dict[str, object]) -> None:
        progress = self.progress
        if not math.isfinite(float(str(row["loss"]))):
            raise UserError(f"the loss is {row['loss']} at step {progress.step}; lower --lr or --clip and resume from the last checkpoint")
        self.run.add({"step": progress.step, "tokens": progress.tokens, "elapsed_s": round(progress.elapsed_s, 2), **row})

    def _tell(self, row: dict[str, object]) -> None:
        fraction = max(self.fraction(self.progress.step), 1e-9)
        left = (self.elapsed() - self.before) * (1 / fraction - 1) if not self.options.max_seconds else self.options.max_seconds - self.elapsed()
        self.say(
            f"step {self.progress.step}  loss {row['loss']:.4f}  norm {row['norm']:.2f}  {float(str(row['tokens_per_s'])) / 1e3:.0f}k tokens/s  "
            f"starved {row['starved']:.0%}  {fraction:.0%}, {max(left, 0):.0f} s left"
        )

    def _probe(self, probe: Probe) -> None:
        with self.autocast():
            result = run_probe(self.network, probe)
        self.run.add({"step": self.progress.step, "probe": result})
        self.say("probe " + "  ".join(f"{name} {share:.0%}" for name, share in result.items()))


class _Window:
    """Steps between two lines of the curve."""

    def __init__(self, began: float) -> None:
        self.began, self.steps, self.tokens, self.starved = began, 0, 0, 0.0
        self.loss: Tensor | float = 0.0
        self.norm: Tensor | float = 0.0

    def add(self, loss: Tensor, norm: Tensor, tokens: int, starved: float) -> None:
        self.steps, self.tokens, self.starved = self.steps + 1, self.tokens + tokens, self.starved + starved
        self.loss, self.norm = self.loss + loss, self.norm + norm

    def close(self, now: float) -> dict[str, object]:
        """Means over the window. Waits for the device."""
        loss, norm = float(self.loss) / self.steps, float(self.norm) / self.steps
        seconds = max(time.monotonic() - self.began, 1e-9)
        return {"loss": loss, "norm": norm, "tokens_per_s": self.tokens / seconds, "starved": self.starved / seconds}
