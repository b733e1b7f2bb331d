"""How fast deployments write: the same requests to each, in turn, over the size of the batch (claim C28)."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from labkit.bench.cli import shape_directory
from labkit.bench.drive import answer_all
from labkit.bench.peers import free
from labkit.bench.workloads import Request
from labkit.core import EngineCore, LabkitCore
from labkit.deployment import Deployment
from labkit.engine import build_core
from labkit.experiments.claims import Evidence, Verdict, judge_ratio, not_testable
from labkit.experiments.contests import gain
from labkit.experiments.intervals import digits, percentile
from labkit.experiments.weights import GPTQ, GPTQ_HEAD, ORIGINAL, in_four_bits, original, quantize_to
from labkit.models.loading import open_checkpoint
from labkit.models.quantized import QuantizedLinear

FIRST = "as first deployed"
NEEDS_KERNEL = "a GPU, where the kernels read the 4 bits as they are stored"


def contenders(
    model: str, device: str, gptq: Path, shape: str | None = None, calibration: Mapping[str, Any] | None = None
) -> dict[str, Deployment]:
    """What is timed: the service as first deployed, and in the engine of today the original weights, those rounded to
    nearest, and those in ``gptq``, the checkpoint that GPTQ made of ``model``: see ``in_four_bits``.

    With a ``shape`` of data/shapes all of it is that shape with random weights, which GPTQ quantises here and now, with
    ``calibration`` (sequences, length), into a directory beside ``gptq``. Raises UserError for a shape that is none.
    """
    random_weights = shape is not None
    if shape is not None:
        model, gptq = shape_directory(shape), gptq.with_name(shape)
        quantize_to(gptq, model, device, random_weights=True, **(calibration or {"sequences": 1}))
    full = original(model, device, random_weights=random_weights)
    first = Deployment.as_first_deployed(model, device=device, random_weights=random_weights)
    return {FIRST: first, **in_four_bits(full, gptq)}


def time_decoding(
    deployments: Mapping[str, Deployment],
    batches: Sequence[int],
    repeats: int,
    prompt_tokens: int,
    new_tokens: int,
    alone: Collection[str] = (),
    say: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Whole answers, all of a batch asked at once: one row a deployment, batch size and repeat, in the columns of
    ``contests.run_contests``: way, x (requests in the batch), round, seconds (of all answers), bytes (of the model's
    weights as they lie in memory), note (empty).

    Prompts of ``prompt_tokens`` random tokens, the same for all, and ``new_tokens`` written to each, whatever they are:
    with a short prompt nearly all of it is decode. All models are loaded at once and take turns, in alternating order,
    so that a machine that grows slow does so for all; one round before them warms up and is not counted. Those of
    ``alone`` are only asked one request at a time. Raises UserError for a model that cannot be loaded.
    """
    cores = {
        name: _load(deployment, 1 if name in alone else max(batches), prompt_tokens + new_tokens)
        for name, deployment in deployments.items()
    }
    held = {name: weight_bytes(core) for name, core in cores.items()}
    vocabulary = min(open_checkpoint(each.model).shape.vocab_size for each in deployments.values())
    rows = []
    for batch in batches:
        requests = _requests(batch, prompt_tokens, new_tokens, vocabulary)
        names = [name for name in cores if batch == 1 or name not in alone]
        began = time.monotonic()
        for turn in range(-1, repeats):
            for name in names[:: -1 if turn % 2 else 1]:
                seconds = _seconds(cores[name], requests)
                if turn >= 0:
                    rows.append((name, batch, turn, seconds, held[name], ""))
        say(f"batches of {batch}: {len(names)} deployments, {repeats} times each, {time.monotonic() - began:.0f} s")
    del cores
    free()
    return pd.DataFrame(rows, columns=["way", "x", "round", "seconds", "bytes", "note"])


def tokens_per_second(table: pd.DataFrame, new_tokens: int) -> pd.DataFrame:
    """For a figure, one row a deployment and batch size: name, batch, value (new tokens a second, the median of the
    repeats), low, high."""
    rows = []
    for way, batch in table[["way", "x"]].drop_duplicates().itertuples(index=False):
        seconds = table[(table["way"] == way) & (table["x"] == batch)]["seconds"]
        found = percentile((batch * new_tokens / seconds).tolist(), 50, "tokens/s")
        rows.append((way, batch, found.value, found.low, found.high))
    return pd.DataFrame(rows, columns=["name", "batch", "value", "low", "high"])


def weights_of(*shapes: str | None) -> str:
    """Whose weights a speed was measured with: those that ship with the lab, or random ones of published shapes."""
    named = [shape for shape in shapes if shape]
    if not named:
        return "the weights that ship with the lab"
    return f"random weights of the shape{'s' if len(named) > 1 else ''} of {' and '.join(named)}"


def judge_speed(table: pd.DataFrame, shape: str | None = None, batch: int = 1) -> Verdict:
    """C28: GPTQ against the original weights in the same engine, at the batch size that favours it: one request, where
    reading the weights is nearly all of the work. The first deployment is named besides, and decides nothing.

    ``shape`` as in ``contenders``. Not testable where the weights were multiplied out when they were loaded, which
    their size in memory shows.
    """
    same = gain(table, ORIGINAL, GPTQ, batch)
    evidence = [Evidence.of(f"against the same engine, batch of {batch}", same)]
    largest = int(table[table["way"] == GPTQ]["x"].max())
    if largest != batch:
        evidence.append(
            Evidence.of(f"against the same engine, batch of {largest}", gain(table, ORIGINAL, GPTQ, largest))
        )
    if GPTQ_HEAD in set(table["way"]):
        head = gain(table, ORIGINAL, GPTQ_HEAD, batch)
        evidence.append(Evidence.of(f"the same with a head of 8 bits, batch of {batch}", head))
    first = gain(table, FIRST, GPTQ, batch)
    beside = f" Measured with {weights_of(shape)}."
    if first.n:
        evidence.append(Evidence.of(f"against the service {FIRST}, batch of {batch}", first))
        beside += f" Against the service {FIRST} it is {digits(first.value)}× as fast, engine and dtype included."
    if not read_in_four_bits(table):
        lacks = (
            "There is no kernel for 4 bits on this device: the weights were multiplied out when they were loaded, and "
            f"as many bytes were read for each token as before ({digits(same.value)}× as fast).{beside}"
        )
        return replace(not_testable("C28", lacks, NEEDS_KERNEL), evidence=tuple(evidence))
    verdict = judge_ratio("C28", same, label=f"in the same engine, batch of {batch}")
    return replace(verdict, reason=verdict.reason + beside, evidence=tuple(evidence))


def read_in_four_bits(table: pd.DataFrame) -> bool:
    """Whether GPTQ's weights lie in memory as they are stored: they take less of it then than the original ones."""
    held = {way: int(table[table["way"] == way]["bytes"].iloc[0]) for way in (ORIGINAL, GPTQ)}
    return held[GPTQ] < held[ORIGINAL]


def weight_bytes(core: EngineCore) -> int:
    """Bytes of a model's weights as a core holds them, packed ones included."""
    model = core.runner.model if isinstance(core, LabkitCore) else core.model  # type: ignore[attr-defined]
    total = sum(parameter.nbytes for parameter in model.parameters())
    total += sum(part.nbytes for part in getattr(model, "int8_head", None) or ())
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.packed is not None:
            total += module.packed.words.nbytes + module.packed.scales.nbytes
    return total


def _load(deployment: Deployment, batch: int, context: int) -> EngineCore:
    """With a KV cache for one batch: the others need their memory."""
    blocks = batch * -(-context // deployment.kv_block_size)
    core = build_core(replace(deployment, max_batch=batch, max_context=context, kv_blocks=blocks))
    core.warm_up()
    return core


def _requests(batch: int, prompt_tokens: int, new_tokens: int, vocabulary: int) -> list[Request]:
    drawn = np.random.default_rng(batch).integers(0, vocabulary, (batch, prompt_tokens)).tolist()
    return [Request(prompt, new_tokens) for prompt in drawn]


def _seconds(core: EngineCore, requests: Sequence[Request]) -> float:
    began = time.perf_counter()
    answer_all(core, requests)
    return time.perf_counter() - began
