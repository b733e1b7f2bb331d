"""Which options of a training pay: activations that are recomputed (claim C11), the article's configuration (C12)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import psutil
import torch

from labkit.experiments.claims import NO_GAIN, Evidence, Verdict, judge_facts
from labkit.experiments.contests import Contest, gain, is_faster
from labkit.experiments.intervals import Estimate, percentile
from labkit.models.loading import resolve_model
from labkit.training.modeldir import read_model
from labkit.training.network import Network, Shape
from labkit.training.options import PRESETS, TrainOptions
from labkit.training.variants import (
    CHECKPOINTING_NAMES,
    OPTIMIZER_NAMES,
    WARM_UP,
    Size,
    Variant,
    VariantRun,
    base_options,
    documents,
    in_bfloat16,
    in_parts,
)

CHOSEN, WHOLE, FLOAT32 = "as the article has it", "the whole batch at once", "float32"
BFLOAT16 = "bfloat16"
KEEPS, RECOMPUTES = CHECKPOINTING_NAMES["none"], CHECKPOINTING_NAMES["all"]
ARTICLE_RATE, OUR_RATE = PRESETS["article"].lr, PRESETS["ledger-r1"].lr
COLUMNS = ["way", "policy", "micro", "x", "round", "seconds", "bytes", "note"]


def size_of(model: Mapping[str, int], batch: int, micro: int, steps: int = 1) -> Size:
    """The size of a training; ``model``: fields of ``Shape`` that are not those of the model that the lab ships."""
    return Size(Shape(**model), batch, micro, steps)


def policies(size: Size, device: torch.device, names: Sequence[str], micros: Sequence[int]) -> dict[str, Variant]:
    """Every policy of recomputation (of ``network.CHECKPOINTING``) with the batch in parts of each size."""
    base = base_options(size, device.type)
    return {
        f"{CHECKPOINTING_NAMES[name]}, {micro} at a time": in_parts(
            replace(base, checkpointing=name), micro, size.batch
        )
        for name in names
        for micro in micros
    }


def configuration(size: Size, device: torch.device) -> dict[str, Variant]:
    """The article's configuration in ``size``, in bfloat16 where that is fast here, and one part of it changed each."""
    base = base_options(size, device.type)
    others = [name for name in OPTIMIZER_NAMES if name != base.optimizer]
    found = {
        CHOSEN: Variant(base),
        **{OPTIMIZER_NAMES[name]: Variant(replace(base, optimizer=name)) for name in others},
        WHOLE: in_parts(base, size.batch, size.batch),
    }
    return found | (
        {FLOAT32: Variant(replace(base, autocast=False))} if base.autocast else {BFLOAT16: in_bfloat16(base)}
    )


def measure_options(variants: Mapping[str, Variant], size: Size, device: torch.device, rounds: int) -> pd.DataFrame:
    """One row a variant and round: way (its name), policy, micro, x (tokens of a step), round, seconds (of a step),
    bytes (the most that a step holds at once, weights and moments included), note (why there is no time).

    All start from the same weights, see the same documents, and are timed in turn, to and fro.
    """
    batches = documents(size, WARM_UP + rounds * size.steps)
    runs: dict[TrainOptions, VariantRun] = {}
    for variant in variants.values():
        if not variant.note and variant.options not in runs:
            runs[variant.options] = VariantRun(variant.options, batches, device, print)
    for turn in range(rounds):
        for run in list(runs.values())[:: -1 if turn % 2 else 1]:
            run.go_on(size.steps)
    tokens = batches[0].ids.size
    rows = []
    for name, variant in variants.items():
        found = runs.get(variant.options)
        what = (name, CHECKPOINTING_NAMES[variant.options.checkpointing], variant.options.micro_batch, tokens)
        note = variant.note or (found.failure if found else "")
        if note or found is None:
            rows.append((*what, -1, math.nan, 0, note))
        else:
            rows += [(*what, turn, tokens / speed, found.peak, "") for turn, speed in enumerate(found.speeds)]
    return pd.DataFrame(rows, columns=COLUMNS)


def learn(size: Size, device: torch.device, steps: int, model: str = "") -> pd.DataFrame:
    """Losses of the article's learning rate and of ours, all else equal: way, step, tokens (seen so far), loss (nats a
    token, before the step). From random weights; with ``model``, from those of a model of the lab, on new documents.
    """
    start, shape = None, size.shape
    if model:
        network = read_model(resolve_model(model), dtype=torch.float32)[0]
        start, shape = network.state_dict(), network.shape
    base = base_options(replace(size, shape=shape), device.type)
    batches = documents(size, WARM_UP + steps, seed=2 if model else 1)
    rows = []
    for name, rate in rate_names().items():
        run = VariantRun(replace(base, lr=rate), batches, device, print, start)
        run.go_on(steps)
        rows += [(name, step, step * batches[0].ids.size, loss) for step, loss in enumerate(run.losses())]
    return pd.DataFrame(rows, columns=["way", "step", "tokens", "loss"])


def rate_names() -> dict[str, float]:
    """The two learning rates, the article's first."""
    return {f"{rate:g}, {whose}": rate for rate, whose in ((ARTICLE_RATE, "the article's"), (OUR_RATE, "ours"))}


def loss_difference(losses: pd.DataFrame, last: int = 8) -> Estimate:
    """By how much the article's rate leaves a higher loss than ours: the median over the ``last`` steps, each on the
    same documents for both, in nats a token."""
    article, ours = (losses[losses["way"] == name].sort_values("step")["loss"].to_numpy() for name in rate_names())
    return percentile((article - ours)[-last:].tolist(), 50, "nats")


def serving_contests(size: Size, device: torch.device, tokens: int) -> list[Contest]:
    """A forward pass without gradients, as a service makes it, of a model that recomputes and one that does not."""
    ids = torch.randint(size.shape.vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    networks = {}
    for name in ("none", "all"):
        networks[name] = Network(size.shape).to(device)
        networks[name].checkpointing = name
    return [Contest(tokens, (ids,), {KEEPS: networks["none"], RECOMPUTES: networks["all"]})]


@dataclass(frozen=True)
class Choice:
    """One policy with the batch in parts of ``micro`` documents. ``beaten_by``: a way that is surely faster and needs
    no more memory; "" if there is none."""

    way: str
    policy: str
    micro: int
    seconds: Estimate
    bytes: int
    beaten_by: str = ""


def choices(table: pd.DataFrame) -> list[Choice]:
    """What was measured of ``policies``, in its order."""
    x = int(table["x"].max())
    rows = table[table["note"] == ""].drop_duplicates("way")
    found = [
        Choice(way, policy, int(micro), percentile(table[table["way"] == way]["seconds"], 50, "s"), int(most))
        for way, policy, micro, most in rows[["way", "policy", "micro", "bytes"]].itertuples(index=False)
    ]
    better: dict[str, list[tuple[float, str]]] = {}
    for one, other in _rivals(found):
        faster = gain(table, one.way, other.way, x)
        if is_faster(faster):
            better.setdefault(one.way, []).append((faster.value, other.way))
    return [replace(one, beaten_by=max(better[one.way])[1]) if one.way in better else one for one in found]


def paying(found: Sequence[Choice]) -> list[tuple[Choice, Choice | None]]:
    """Those that recompute and are surely faster than whatever keeps all activations in no more memory than theirs,
    each with the fastest that does; with None where nothing does."""
    pairs = []
    for one in found:
        if one.policy == KEEPS or one.beaten_by:
            continue
        keeping = [other for other in found if other.policy == KEEPS and other.bytes <= one.bytes]
        if all(one.seconds.high < other.seconds.low for other in keeping):
            pairs.append((one, min(keeping, key=_time, default=None)))
    return pairs


def largest_micro(found: Sequence[Choice], policy: str, room: int) -> float:
    """How many documents at a time would fit ``room`` bytes, by the line through the smallest and the largest number
    that were measured; NaN where only one was."""
    points = sorted((one.micro, one.bytes) for one in found if one.policy == policy)
    if len(points) < 2 or points[0][0] == points[-1][0]:
        return math.nan
    (few, least), (many, most) = points[0], points[-1]
    each = (most - least) / (many - few)
    return math.floor(few + (room - least) / each) if each > 0 else math.inf


def memory_of(device: torch.device) -> int:
    """Bytes that the device has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def judge_recomputation(table: pd.DataFrame, serving: pd.DataFrame) -> Verdict:
    """C11. A policy is wrong where another is surely faster and needs no more memory; and it is a cause of a slow
    service only if the time of an answer depends on it."""
    x, found = int(table["x"].max()), choices(table)
    answering = gain(serving, KEEPS, RECOMPUTES, int(serving["x"].max()))
    evidence = [Evidence.of("answering, times as fast with recomputation", answering)]
    worst = max((one for one in found if one.policy != KEEPS and one.beaten_by), key=_time, default=None)
    text, unclear = "in training, a policy is slower than another that needs no more memory", None
    if worst is not None:
        text = f'in training, a policy is wrong ("{worst.way}" against "{worst.beaten_by}", in no more memory)'
        lost = gain(table, worst.way, worst.beaten_by, x)
        evidence.append(Evidence.of("training, times faster with the better policy", lost))
    elif any(is_faster(gain(table, one.way, other.way, x)) is None for one, other in _rivals(found)):
        unclear = "So few rounds do not tell whether any policy is slower than one that needs no more memory."
    facts = {text: worst is not None, "the time of an answer measurably depends on it": not _about_one(answering)}
    verdict = judge_facts("C11", facts, evidence, unclear)
    return replace(verdict, reason=f"{verdict.reason} The article does not say which policy it had.")


def judge_configuration(table: pd.DataFrame, losses: pd.DataFrame, tuned: pd.DataFrame | None = None) -> Verdict:
    """C12, part by part: ``table`` of ``configuration``, ``losses`` of ``learn`` from random weights, ``tuned`` from
    those of a trained model where that was measured."""
    x = int(table["x"].max())
    fused = {name: gain(table, other, CHOSEN, x) for name, other in OPTIMIZER_NAMES.items() if name != "fused"}
    whole, narrow = gain(table, WHOLE, CHOSEN, x), gain(table, FLOAT32, CHOSEN, x)
    saved = _bytes(table, WHOLE) / _bytes(table, CHOSEN) if whole.n else math.nan
    nothing = loss_difference(losses)
    facts: dict[str, bool | None] = {
        f"fused AdamW trains faster than {each}": is_faster(found)
        for each, found in (("tensor by tensor", fused["loop"]), ("in PyTorch's foreach form", fused["foreach"]))
    }
    facts |= {
        "small batches summed need less memory than the whole batch": saved > 1 if whole.n else None,
        "and cost no speed": _no_slower(whole),
        "bfloat16 trains faster than float32": is_faster(narrow),
        f"from nothing, a rate of {ARTICLE_RATE:g} learns as much as {OUR_RATE:g}": _no_more(nothing),
    }
    evidence = [
        Evidence.of("fused, against tensor by tensor: times faster", fused["loop"]),
        Evidence.of("fused, against foreach: times faster", fused["foreach"]),
        Evidence.of("small batches summed: times as fast", whole),
        Evidence.of("small batches summed: times less memory", Estimate(saved, saved, saved, 1, "×")),
        Evidence.of("bfloat16: times faster", narrow),
        Evidence.of("loss left by the article's rate over ours, from nothing", nothing),
    ]
    if tuned is not None:
        after = loss_difference(tuned)
        facts[f"for a trained model, {ARTICLE_RATE:g} leaves no higher loss than {OUR_RATE:g}"] = _no_more(after)
        evidence.append(Evidence.of("loss left by the article's rate over ours, from a trained model", after))
    return judge_facts("C12", facts, [item for item in evidence if not math.isnan(item.value)])


def _rivals(found: Sequence[Choice]) -> list[tuple[Choice, Choice]]:
    """Each way with every other that needs no more memory."""
    return [(one, other) for one in found for other in found if other is not one and other.bytes <= one.bytes]


def _time(one: Choice) -> float:
    return one.seconds.value


def _bytes(table: pd.DataFrame, way: str) -> int:
    return int(table[table["way"] == way]["bytes"].iloc[0])


def _no_slower(gained: Estimate) -> bool | None:
    """Whether a way takes no more time than the other, 5 % aside; None where the interval holds both."""
    if gained.low >= 1 / NO_GAIN:
        return True
    return False if gained.high < 1 else None


def _no_more(difference: Estimate) -> bool | None:
    """Whether a loss is no higher than the other; None where the interval holds both."""
    if difference.high <= 0:
        return True
    return False if difference.low > 0 else None


def _about_one(ratio: Estimate) -> bool:
    """Whether a ratio may be 1, or is surely too near to it to matter."""
    return ratio.low <= NO_GAIN and ratio.high >= 1 / NO_GAIN
