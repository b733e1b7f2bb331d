"""What depends on how far a training has come: its end, the learning rate, which bucket a step draws."""

from __future__ import annotations

import math
import random

from labkit.training.documents import LENGTHS
from labkit.training.ledger import BUCKETS
from labkit.training.options import TrainOptions


def is_done(options: TrainOptions, step: int, elapsed_s: float) -> bool:
    """True if ``step`` steps or ``elapsed_s`` seconds reach a limit."""
    by_steps = options.steps is not None and step >= options.steps
    return by_steps or (options.max_seconds is not None and elapsed_s >= options.max_seconds)


def fraction_done(options: TrainOptions, step: int, elapsed_s: float) -> float:
    """How much of the training lies behind, by the limit that is nearer."""
    by_steps = step / options.steps if options.steps else 0.0
    by_time = elapsed_s / options.max_seconds if options.max_seconds else 0.0
    return max(by_steps, by_time)


def seconds_left(options: TrainOptions, step: int, elapsed_s: float) -> float:
    """How long the training will still take at its pace so far, 0 at the end."""
    fraction = max(fraction_done(options, step, elapsed_s), 1e-9)
    return max(elapsed_s * (1 / fraction - 1), 0.0)


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
