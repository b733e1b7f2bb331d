"""Exact match on unseen problems: greedy answers of a model directory, per bucket and family, with Wilson intervals."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from labkit.errors import UserError
from labkit.files import write_atomic
from labkit.training.curve import describe_machine
from labkit.training.decoding import greedy
from labkit.training.ledger import BUCKETS, FAMILIES, FIRST_TRAINING_SEED, Problem, is_correct, make_problem
from labkit.training.modeldir import read_model
from labkit.training.network import Network
from labkit.training.options import check_device
from labkit.training.tokenizer import TURN_END, prompt_text

MOST_TOKENS = 176
_WRONG_KEPT = 60
_REPORT_EVERY_S = 5.0
# prompt tokens decoded together: bounds the memory of the keys and values, and on a CPU how long a batch keeps silent
_BATCH_TOKENS = {"cpu": 8192, "cuda": 1_000_000}


Answers = Callable[[list[Problem]], Iterator[tuple[Problem, str]]]
"""Gives each problem of one bucket, in any order, with what a model wrote."""


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
    # the formula gives exactly 0 and 1 at the ends, floating point not quite
    return Share(right, asked, middle - half if right else 0.0, middle + half if right < asked else 1.0)


def evaluate(
    model: Path,
    problems: int,
    buckets: Iterable[str] = BUCKETS,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    result: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, object]:
    """Asks ``problems`` problems of every bucket and returns (and writes to ``result``) a JSON-ready account.

    ``dtype`` is bfloat16 on CUDA and float32 on the CPU unless given. Raises UserError for a directory without a
    model, an unknown bucket, a seed that training draws from, a missing device.
    """
    buckets = list(dict.fromkeys(buckets))
    check_wishes(problems, buckets, seed)
    check_device(device)
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    network, tokenizer = read_model(model, device, dtype)
    if result is not None:
        # a place that cannot be written to shows before the work, not after
        result.parent.mkdir(parents=True, exist_ok=True)

    def answers(listed: list[Problem]) -> Iterator[tuple[Problem, str]]:
        return _answers(network, tokenizer, listed, device)

    account = examine(answers, problems, buckets, seed, facts_of(dtype, device), say)
    if result is not None:
        write_atomic(result, json.dumps(account, indent=1) + "\n")
    return account


def facts_of(dtype: torch.dtype, device: str) -> dict[str, object]:
    """What an account says of how the model was run."""
    return {"dtype": str(dtype).removeprefix("torch."), "machine": describe_machine(device)}


def examine(
    answers: Answers,
    problems: int,
    buckets: list[str],
    seed: int,
    facts: dict[str, object],
    say: Callable[[str], None] = print,
) -> dict[str, object]:
    """Asks whatever ``answers``, and returns the account; ``facts`` are put into it.

    ``verdicts`` has of every bucket a character a problem, in order of its index: 1 for right, 0 for wrong.
    """
    asked = {bucket: [make_problem(seed, index, bucket) for index in range(problems)] for bucket in buckets}
    progress = Progress(say, sum(len(problem.prompt) for listed in asked.values() for problem in listed))
    verdicts: list[tuple[Problem, bool]] = []
    wrong: list[dict[str, object]] = []
    for bucket in buckets:
        for number, (problem, text) in enumerate(answers(asked[bucket]), start=1):
            right = is_correct(problem.answer, text)
            verdicts.append((problem, right))
            if not right and len(wrong) < _WRONG_KEPT:
                wrong.append(_mistake(problem, text))
            progress.add(len(problem.prompt), f"{bucket} {number}/{problems}")
    return {
        "problems": problems,
        "seed": seed,
        **facts,
        "elapsed_s": round(progress.elapsed(), 1),
        "buckets": {bucket: _account(v for p, v in verdicts if p.bucket == bucket) for bucket in buckets},
        "families": {
            bucket: {
                family: _account(v for p, v in verdicts if (p.bucket, p.family) == (bucket, family))
                for family in sorted({p.family for p, _ in verdicts if p.bucket == bucket})
            }
            for bucket in buckets
        },
        "wrong": wrong,
        "verdicts": {
            bucket: "".join("01"[v] for p, v in sorted(verdicts, key=lambda each: each[0].index) if p.bucket == bucket)
            for bucket in buckets
        },
    }


def table_rows(account: dict[str, object]) -> list[tuple[str, ...]]:
    """Cells of a table of ``account``: a header, a row for each family, one for all; right/asked, share, interval."""
    buckets: dict[str, dict[str, float]] = account["buckets"]  # type: ignore[assignment]
    families: dict[str, dict[str, dict[str, float]]] = account["families"]  # type: ignore[assignment]
    rows: list[tuple[str, ...]] = [("family", *buckets)]
    for family in FAMILIES:
        rows.append((family, *(share_text(families[bucket].get(family)) for bucket in buckets)))
    rows.append(("all", *(share_text(share) for share in buckets.values())))
    return rows


def share_text(share: dict[str, float] | None) -> str:
    """Such as ``974/1000  97.4 % (96.2 to 98.2)``; a dash if nothing was asked."""
    if share is None:
        return "–"
    low, high = 100 * share["low"], 100 * share["high"]
    return f"{share['right']:.0f}/{share['asked']:.0f}  {100 * share['share']:.1f} % ({low:.1f} to {high:.1f})"


def check_wishes(problems: int, buckets: list[str], seed: int) -> None:
    """Raises UserError for problems that cannot be asked."""
    if unknown := [bucket for bucket in buckets if bucket not in BUCKETS]:
        raise UserError(f"no bucket {unknown[0]!r}; there are {', '.join(BUCKETS)}")
    if problems < 1:
        raise UserError("--problems must be at least 1")
    if not 0 <= seed < FIRST_TRAINING_SEED:
        raise UserError(
            f"--seed must be at least 0 and below {FIRST_TRAINING_SEED}: from there on training draws its documents"
        )


class Progress:
    """Says every few seconds how far the work is; ``total`` and what is added are prompt sizes, which time follows."""

    def __init__(self, say: Callable[[str], None], total: int) -> None:
        self._say, self._total, self._done = say, total, 0
        self._began = self._said = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    def add(self, size: int, label: str) -> None:
        """Counts ``size`` more as done."""
        self._done += size
        if time.monotonic() - self._said >= _REPORT_EVERY_S:
            self._said = time.monotonic()
            left = self.elapsed() * (self._total / self._done - 1)
            self._say(f"{label}, {self.elapsed():.0f} s, about {left:.0f} s left")


def _answers(
    network: Network, tokenizer: Tokenizer, problems: list[Problem], device: str
) -> Iterator[tuple[Problem, str]]:
    prompts = [tokenizer.encode(prompt_text(problem.prompt), add_special_tokens=False).ids for problem in problems]
    # prompts of like length together; the longest first, so that too little memory shows at once
    order = sorted(range(len(problems)), key=lambda index: -len(prompts[index]))
    stop = tokenizer.token_to_id(TURN_END)
    if stop is None:
        raise UserError(f"the model's tokenizer has no {TURN_END}; this command is for ledger models")
    budget = _BATCH_TOKENS[device.split(":")[0]]
    while order:
        rows = max(1, budget // (len(prompts[order[0]]) + MOST_TOKENS))
        batch, order = order[:rows], order[rows:]
        for index, tokens in zip(batch, greedy(network, [prompts[i] for i in batch], stop, MOST_TOKENS), strict=True):
            yield problems[index], tokenizer.decode(tokens, skip_special_tokens=True)


def _mistake(problem: Problem, text: str) -> dict[str, object]:
    return {
        "bucket": problem.bucket,
        "family": problem.family,
        "index": problem.index,
        "wrote": text,
        "right": f"<think>{problem.thought}</think>{problem.answer}",
    }


def _account(verdicts: Iterable[bool]) -> dict[str, object]:
    listed = list(verdicts)
    share = wilson(sum(listed), len(listed))
    return {"right": share.right, "asked": share.asked, "share": share.value, "low": share.low, "high": share.high}
