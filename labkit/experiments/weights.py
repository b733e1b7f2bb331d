"""Weights of 4 bits: the same problems asked of a model before and after, and what that cost (claim C27)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from labkit.bench.peers import free
from labkit.deployment import Deployment
from labkit.engine import Engine
from labkit.errors import UserError
from labkit.evaluation.answers import prompt_ids
from labkit.evaluation.paired import Paired, compare
from labkit.experiments.claims import Evidence, Verdict, judge_limit
from labkit.experiments.intervals import Estimate
from labkit.models.loading import load_tokenizer
from labkit.quantizer.quantize import Options, quantize
from labkit.quantizer.report import Report
from labkit.request import SamplingParams
from labkit.training.evaluate import MOST_TOKENS
from labkit.training.ledger import is_correct, make_problem

ORIGINAL, RTN, GPTQ = "original", "RTN, 4 bits", "GPTQ, 4 bits"
GPTQ_HEAD = f"{GPTQ}, head of 8"
ROUNDED = (RTN, GPTQ, GPTQ_HEAD)
"""The last where there is a kernel for a head of 8 bits: on a GPU."""
_BATCH = {"cpu": 16, "cuda": 256}


def original(model: str, device: str, **knobs: Any) -> Deployment:
    """The model at the best that ``device`` can do: bfloat16 on CUDA, float32 on the CPU."""
    if device == "cuda":
        return Deployment.at_full_speed(model, **({"prefix_cache": False} | knobs))
    return Deployment(model=model, device="cpu", **knobs)


def quantize_to(
    out: Path, model: str, device: str, sequences: int, length: int | None = None, random_weights: bool = False
) -> Report:
    """GPTQ of ``model`` into ``out``, 4 bits in groups of 128, here and now; the account of it (see
    ``labkit.quantizer``). ``length`` cuts the calibration sequences off. Raises UserError as ``quantize``."""
    options = Options(
        model=model,
        out=out,
        sequences=sequences,
        length=length,
        device=device,
        dtype="bfloat16" if device == "cuda" else "float32",
        random_weights=random_weights,
    )
    with redirect_stderr(sys.stdout):  # its progress is no error, and a notebook would paint it as one
        report = quantize(options)
    free()
    return report


def in_four_bits(deployment: Deployment, gptq: Path | str) -> dict[str, Deployment]:
    """The deployment itself; rounded to nearest when it is loaded; the checkpoint that GPTQ made of its model; on CUDA
    that with the output head in 8 bits besides."""
    quantized = replace(deployment, model=str(gptq), random_weights=False)
    ways = {ORIGINAL: deployment, RTN: replace(deployment, quantization="int4"), GPTQ: quantized}
    if deployment.device == "cuda":
        ways[GPTQ_HEAD] = replace(quantized, int8_head=True)
    return ways


def ask(
    deployments: Mapping[str, Deployment],
    problems: Mapping[str, int],
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Asks every deployment the same ledger problems, of which none was seen in training, greedily.

    ``problems``: how many of each bucket. One row an answer: deployment (str), bucket (str), index (int), right (bool).
    Raises UserError for a model that cannot be loaded, and for an engine that gives a problem up.
    """
    rows: list[tuple[str, str, int, bool]] = []
    asked = {bucket: [make_problem(seed, i, bucket) for i in range(count)] for bucket, count in problems.items()}
    for name, deployment in deployments.items():
        engine = _engine(deployment, [problem.prompt for listed in asked.values() for problem in listed])
        for bucket, listed in asked.items():
            began = time.monotonic()
            ids = [prompt_ids(engine.tokenizer, problem) for problem in listed]
            completions = engine.generate(ids, SamplingParams(max_tokens=MOST_TOKENS))
            for problem, completion in zip(listed, completions, strict=True):
                if completion.error is not None:
                    raise UserError(f"{name} could not answer a {bucket} problem: {completion.error}")
                rows.append((name, bucket, problem.index, is_correct(problem.answer, completion.text)))
            right = sum(row[3] for row in rows[len(rows) - len(listed) :])
            say(f"{name}: {right} of {len(listed)} {bucket} problems right, {time.monotonic() - began:.0f} s")
        del engine
        free()
    return pd.DataFrame(rows, columns=["deployment", "bucket", "index", "right"])


def pair(answers: pd.DataFrame, after: str, before: str = ORIGINAL, bucket: str | None = None) -> Paired:
    """Two deployments on the same problems, of one bucket or of all. Raises ValueError if they were asked others."""
    chosen = answers if bucket is None else answers[answers["bucket"] == bucket]
    one, other = (
        chosen[chosen["deployment"] == name].set_index(["bucket", "index"])["right"].sort_index()
        for name in (after, before)
    )
    if not one.index.equals(other.index):
        raise ValueError(f"{after} and {before} were asked different problems")
    return compare(one.tolist(), other.tolist())


def loss_of_accuracy(paired: Paired) -> Estimate:
    """The share of problems lost, that is percentage points, with its interval; below 0 where accuracy was gained."""
    return Estimate(0.0 - paired.difference, 0.0 - paired.high, 0.0 - paired.low, paired.asked, "share")


def judge_accuracy(answers: pd.DataFrame) -> Verdict:
    """C27: the paired loss of GPTQ over all problems, in percentage points, against the 2 % of the article."""
    gptq = pair(answers, GPTQ)
    lost = loss_of_accuracy(gptq)
    verdict = judge_limit("C27", lost, label="GPTQ: percentage points of accuracy lost")
    reason = (
        f"{verdict.reason} Of {lost.n} problems {gptq.reference_only} were right before GPTQ alone and "
        f"{gptq.model_only} after it alone (McNemar's exact p = {gptq.p:.2g})."
    )
    others = {"rounding to nearest": RTN, "GPTQ and a head of 8 bits": GPTQ_HEAD}
    beside = [
        Evidence.of(f"{label}: percentage points lost", loss_of_accuracy(pair(answers, name)))
        for label, name in others.items()
        if name in set(answers["deployment"])
    ]
    return replace(verdict, reason=reason, evidence=(*verdict.evidence, *beside))


def _engine(deployment: Deployment, prompts: list[str]) -> Engine:
    """With a KV cache for what is asked and no more: other models may be in the same memory."""
    # A chat template takes a few tokens besides the prompt's own.
    tokenizer = load_tokenizer(deployment.model)
    context = max(len(tokenizer(prompt, add_special_tokens=False).input_ids) for prompt in prompts) + 32 + MOST_TOKENS
    batch = _BATCH["cuda" if deployment.device == "cuda" else "cpu"]
    blocks = batch * -(-context // deployment.kv_block_size)
    return Engine(replace(deployment, max_batch=batch, max_context=context, kv_blocks=blocks))
