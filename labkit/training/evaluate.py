"""Exact match on unseen problems: greedy answers of a model directory, per bucket and family, with Wilson intervals."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from labkit.errors import UserError
from labkit.files import write_atomic
from labkit.training.curve import describe_machine
from labkit.training.decoding import greedy
from labkit.training.ledger import BUCKETS, FIRST_TRAINING_SEED, Problem, is_correct, make_problem
from labkit.training.modeldir import read_model
from labkit.training.network import rope_tables
from labkit.training.tokenizer import TURN_END, prompt_text

MOST_TOKENS = 176
# prompt tokens decoded together: bounds the memory of the keys and values
_BATCH_TOKENS = {"cpu": 16384, "cuda": 1_000_000}


@dataclass(frozen=True)
class Share:
    """``right`` of ``asked``, and the Wilson 95 % interval of the share."""

    right: int
    asked: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share itself."""
        return self.right / self.asked


def wilson(right: int, asked: int, z: float = 1.959964) -> Share:
    """Wilson score interval, 95 % by default. Raises ValueError if nothing was asked."""
    if asked < 1:
        raise ValueError("no problem was asked")
    share = right / asked
    middle = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z / (1 + z * z / asked) * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    return Share(right, asked, max(0.0, middle - half), min(1.0, middle + half))


def evaluate(model: Path, problems: int, buckets: Iterable[str] = BUCKETS, seed: int = 0, device: str = "cpu",
             dtype: torch.dtype = torch.bfloat16, result: Path | None = None,
             say: Callable[[str], None] = print) -> dict[str, object]:  # fmt: skip
    """Asks ``problems`` problems of every bucket and returns (and writes to ``result``) a JSON-ready account.

    Raises UserError for a directory without a model, an unknown bucket, a seed that training draws from, a missing device.
    """
    buckets = list(buckets)
    if unknown := [bucket for bucket in buckets if bucket not in BUCKETS]:
        raise UserError(f"no bucket {unknown[0]!r}; there are {', '.join(BUCKETS)}")
    if problems < 1:
        raise UserError("--problems must be at least 1")
    if not 0 <= seed < FIRST_TRAINING_SEED:
        raise UserError(f"--seed must be below {FIRST_TRAINING_SEED}: from there on training draws its documents")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device that torch can use; evaluate with --device cpu")
    network, tokenizer = read_model(model)
    network = network.to(device, dtype)
    network.cos, network.sin = (table.to(device) for table in rope_tables(network.shape))
    began = time.monotonic()
    verdicts: list[tuple[Problem, bool]] = []
    wrong: list[dict[str, object]] = []
    for bucket in buckets:
        asked = [make_problem(seed, index, bucket) for index in range(problems)]
        for number, (problem, text) in enumerate(_answers(network, tokenizer, asked, device)):
            right = is_correct(problem.answer, text)
            verdicts.append((problem, right))
            if not right and len(wrong) < 60:
                wrong.append({"bucket": bucket, "family": problem.family, "index": problem.index, "wrote": text,
                              "right": f"<think>{problem.thought}</think>{problem.answer}"})  # fmt: skip
        share = wilson(*_count(v for p, v in verdicts if p.bucket == bucket))
        say(f"{bucket}: {share.value:.1%} right ({share.low:.1%} to {share.high:.1%}), {time.monotonic() - began:.0f} s so far")
    account: dict[str, object] = {
        "problems": problems,
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "machine": describe_machine(device),
        "elapsed_s": round(time.monotonic() - began, 1),
        "buckets": {bucket: _account(v for p, v in verdicts if p.bucket == bucket) for bucket in buckets},
        "families": {
            bucket: {
                family: _account(v for p, v in verdicts if p.bucket == bucket and p.family == family)
                for family in sorted({p.family for p, _ in verdicts if p.bucket == bucket})
            }
            for bucket in buckets
        },
        "wrong": wrong,
    }
    if result is not None:
        write_atomic(result, json.dumps(account, indent=1) + "\n")
    return account


def _answers(network, tokenizer, problems: list[Problem], device: str) -> Iterable[tuple[Problem, str]]:  # type: ignore[no-untyped-def]
    prompts = [tokenizer.encode(prompt_text(problem.prompt), add_special_tokens=False).ids for problem in problems]
    order = sorted(range(len(problems)), key=lambda index: -len(prompts[index]))
    stop = tokenizer.token_to_id(TURN_END)
    budget = _BATCH_TOKENS[device.split(":")[0]]
    while order:
        rows = max(1, budget // (len(prompts[order[0]]) + MOST_TOKENS))
        batch, order = order[:rows], order[rows:]
        for index, tokens in zip(batch, greedy(network, [prompts[i] for i in batch], stop, MOST_TOKENS), strict=True):
            yield problems[index], tokenizer.decode(tokens, skip_special_tokens=True)


def _count(verdicts: Iterable[bool]) -> tuple[int, int]:
    listed = list(verdicts)
    return sum(listed), len(listed)


def _account(verdicts: Iterable[bool]) -> dict[str, object]:
    share = wilson(*_count(verdicts))
    return {"right": share.right, "asked": share.asked, "share": share.value, "low": share.low, "high": share.high}
