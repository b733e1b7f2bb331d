"""Tables, frames for figures, and sentences of the notebook on the algorithm layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from labkit.experiments.contests import gain, median_seconds, peak_bytes
from labkit.experiments.decode_speed import FIRST, read_in_four_bits, tokens_per_second, weights_of
from labkit.experiments.intervals import Estimate, digits, percentile, share
from labkit.experiments.operators import ARTICLE, PYTORCH, SDPA, growth
from labkit.experiments.student import STUDENT, TEACHER
from labkit.experiments.weights import GPTQ, GPTQ_HEAD, ORIGINAL, ROUNDED, loss_of_accuracy, pair
from labkit.report.environment import machine_caption
from labkit.report.tables import Table, interval, quantity

SMALL_PRINT = "Small print: 95 % intervals, ? is an open end."


def times_table(table: pd.DataFrame, x: str) -> Table:
    """A contest's times: one row a size (``x``: its unit, such as tokens), one column a way; why there is no time
    stands in its place."""
    return _by_way(table, x, lambda way, size: interval(median_seconds(table, way, size)), SMALL_PRINT)


def memory_table(table: pd.DataFrame, x: str) -> Table:
    """The most memory that one call of each way took at once, its result included."""
    return _by_way(table, x, lambda way, size: quantity(peak_bytes(table, way, size), "bytes"), "Result included.")


def times_frame(table: pd.DataFrame, x: str) -> pd.DataFrame:
    """For ``figures.lines``: name, ``x``, value, low, high, in milliseconds."""
    rows = []
    for way, size in _ran(table):
        found = median_seconds(table, way, size)
        rows.append((way, size, found.value * 1e3, found.low * 1e3, found.high * 1e3))
    return pd.DataFrame(rows, columns=["name", x, "value", "low", "high"])


def memory_frame(table: pd.DataFrame, x: str) -> pd.DataFrame:
    """For ``figures.lines``: name, ``x``, value in MiB."""
    rows = [(way, size, (peak_bytes(table, way, size) or 0) / 2**20) for way, size in _ran(table)]
    return pd.DataFrame(rows, columns=["name", x, "value"])


def layers_frame(lines: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """For ``figures.lines``, of a quantisation's report: layer, name, value (the mean over the layer's matrices of the
    error of their outputs, in per cent of the output), and low and high, the least and the greatest of them."""
    rows = []
    for name, key in (("round to nearest", "rtn_error"), ("GPTQ", "gptq_error")):
        for layer in sorted({line["layer"] for line in lines}):
            errors = [100 * math.sqrt(line[key]) for line in lines if line["layer"] == layer and line[key] is not None]
            if errors:
                rows.append((layer, name, sum(errors) / len(errors), min(errors), max(errors)))
    return pd.DataFrame(rows, columns=["layer", "name", "value", "low", "high"])


def accuracy_table(answers: pd.DataFrame, names: Sequence[str] = ()) -> Table:
    """One row a deployment: exact match per bucket, and against the first one, on the same problems. names: which, by
    default the original weights and those that are rounded."""
    names = names or (ORIGINAL, *_rounded(answers))
    buckets = list(dict.fromkeys(answers["bucket"]))
    rows = []
    for name in names:
        mine = answers[answers["deployment"] == name]
        shares = [interval(_share(mine[mine["bucket"] == bucket])) for bucket in buckets]
        if name == names[0]:
            rows.append((name, *shares, "–", "–", "–", "–"))
            continue
        against = pair(answers, name, names[0])
        lost = loss_of_accuracy(against)
        points = f"{digits(100 * lost.value)}\n{digits(100 * lost.low)} to {digits(100 * lost.high)}"
        rows.append((name, *shares, points, str(against.reference_only), str(against.model_only), f"{against.p:.2g}"))
    problems = answers[answers["deployment"] == names[0]]["bucket"].value_counts()
    asked = [f"{bucket}\u00a0({problems[bucket]})" for bucket in buckets]
    columns = ("", *asked, "points lost", f"right: {names[0]} only", "right: this one only", "McNemar p")
    return Table(columns, tuple(rows), f"{machine_caption()}. Share of exactly right answers; in brackets how many "
                 f"problems each was asked. {SMALL_PRINT}")  # fmt: skip


def lost_frame(answers: pd.DataFrame) -> pd.DataFrame:
    """For ``figures.ladder``: the percentage points that rounding cost."""
    rows = []
    for name in _rounded(answers):
        lost = loss_of_accuracy(pair(answers, name))
        rows.append((name, 100 * lost.value, 100 * lost.low, 100 * lost.high, "points"))
    return pd.DataFrame(rows, columns=["rung", "value", "low", "high", "unit"])


def speed_table(table: pd.DataFrame, new_tokens: int, shape: str | None = None) -> Table:
    """One row a batch size: tokens written a second by each deployment; the last row is the memory that the weights
    take. ``shape``: whose random weights they are, if they are."""
    return _speeds(table, new_tokens, (), weights_of(shape))


def gain_table(table: pd.DataFrame) -> Table:
    """One row a batch size: how many times as fast GPTQ is as both baselines."""
    timed = set(table["way"])
    pairs = [each for each in ((ORIGINAL, GPTQ), (ORIGINAL, GPTQ_HEAD), (FIRST, GPTQ)) if each[1] in timed]
    rows = [(_batch(size), *_gains(table, pairs, size)) for size in sorted(table["x"].unique())]
    return Table(("times as fast", *_against(pairs)), tuple(rows), SMALL_PRINT)


def student_table(table: pd.DataFrame, new_tokens: int, shapes: Sequence[str] = ()) -> Table:
    """The same of a student and its teacher, each with its own weights, or with random ones of ``shapes``."""
    return _speeds(table, new_tokens, [(TEACHER, STUDENT)], weights_of(*shapes))


def algorithm_takeaway(
    attention: pd.DataFrame,
    cache: pd.DataFrame,
    shares: Sequence[float],
    answers: pd.DataFrame,
    speed: pd.DataFrame,
    shape: str | None = None,
    kept: Estimate | None = None,
    student_speed: pd.DataFrame | None = None,
    large_speed: pd.DataFrame | None = None,
) -> str:
    """What the measurements say, in Markdown. ``large_speed``: of a student and teacher of published sizes."""
    slower = 1 / gain(cache, PYTORCH, "lru_cache", int(cache["x"].max())).value
    longest = max(size for way, size in _ran(attention) if way == ARTICLE)
    lost = loss_of_accuracy(pair(answers, GPTQ))
    missing = "" if read_in_four_bits(speed) else " (no kernel reads 4 bits on this device)"
    lines = [
        f"**Attention** is worth a kernel: at {longest} tokens PyTorch's fused one is "
        f"{_times(gain(attention, ARTICLE, SDPA, longest))} as fast as the article's code, once that is repaired. Its "
        f"memory grows with the length to the power of {growth(attention, SDPA):.1f}, that of the article's code of "
        f"{growth(attention, ARTICLE):.1f}.",
        f"**The embedding** took {quantity(percentile(shares, 50).value, 'share')} of a forward pass. A cache of its "
        f"rows makes the look-up {digits(slower)}× slower.",
        f"**GPTQ** in 4 bits cost {_cost(lost)} and wrote {_times(gain(speed, ORIGINAL, GPTQ, 1))} as fast in the "
        f"same engine{missing}, {_times(gain(speed, FIRST, GPTQ, 1))} as fast as the service {FIRST}, one request at a "
        f"time ({weights_of(shape)}): a factor means nothing until it says against what.",
    ]
    if kept is not None and student_speed is not None:
        largest = int(student_speed["x"].max())
        faster = _times(gain(student_speed, TEACHER, STUDENT, largest))
        said = (
            f"**The student** keeps {quantity(kept.value, 'share')} of its teacher's right answers (95 % interval "
            f"{digits(100 * kept.low)} to {digits(100 * kept.high)}), at {faster} its speed at a batch of {largest}."
        )
        if large_speed is not None:
            large = _times(gain(large_speed, TEACHER, STUDENT, largest))
            said += f" Of a student and a teacher of the sizes that are in use it is {large}."
        lines.append(said)
    return "\n\n".join(lines)


def _cost(lost: Estimate) -> str:
    ends = f"95 % interval {digits(100 * lost.low)} to {digits(100 * lost.high)}"
    if lost.low <= 0:
        return f"no accuracy that {lost.n} problems could show ({digits(100 * lost.value)} points, {ends})"
    return f"{digits(100 * lost.value)} points of accuracy ({ends}, {lost.n} problems)"


def _rounded(answers: pd.DataFrame) -> list[str]:
    asked = set(answers["deployment"])
    return [name for name in ROUNDED if name in asked]


def _speeds(table: pd.DataFrame, new_tokens: int, pairs: Sequence[tuple[str, str]], weights: str) -> Table:
    ways = list(dict.fromkeys(table["way"]))
    rows = []
    for batch in sorted(table["x"].unique()):
        cells = [interval(_rate(table, way, int(batch), new_tokens)) for way in ways]
        rows.append((_batch(batch), *cells, *_gains(table, pairs, batch)))
    held = [quantity(float(table[table["way"] == way]["bytes"].iloc[0]), "bytes") for way in ways]
    rows.append(("weights", *held, *("–" for _ in pairs)))
    return Table(("", *ways, *_against(pairs)), tuple(rows), f"{machine_caption()}; {weights}. {SMALL_PRINT}")


def _batch(size: int) -> str:
    return f"batch\u00a0of\u00a0{size}"


def _against(pairs: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{after} against {before}" for before, after in pairs]


def _gains(table: pd.DataFrame, pairs: Sequence[tuple[str, str]], batch: int) -> list[str]:
    return [interval(gain(table, before, after, int(batch))) for before, after in pairs]


def _by_way(table: pd.DataFrame, x: str, cell: Any, caption: str) -> Table:
    ran = set(_ran(table))
    ways = list(dict.fromkeys([way for way, _ in _ran(table)] + table["way"].tolist()))  # those that never ran last
    rows = []
    for size in sorted(table["x"].unique()):
        cells = [cell(way, int(size)) if (way, int(size)) in ran else _note(table, way, int(size)) for way in ways]
        rows.append((f"{size}\u00a0{x}", *cells))
    return Table(("", *ways), tuple(rows), f"{machine_caption()}. {caption}")


def _ran(table: pd.DataFrame) -> list[tuple[str, int]]:
    found = table[table["note"] == ""][["way", "x"]].drop_duplicates()
    return [(str(way), int(size)) for way, size in found.itertuples(index=False)]


def _note(table: pd.DataFrame, way: str, size: int) -> str:
    found = table[(table["way"] == way) & (table["x"] == size)]["note"]
    return str(found.iloc[0]) if len(found) else "–"


def _share(answers: pd.DataFrame) -> Estimate:
    return share(int(answers["right"].sum()), len(answers))


def _rate(table: pd.DataFrame, way: str, batch: int, new_tokens: int) -> Estimate:
    found = tokens_per_second(table[(table["way"] == way) & (table["x"] == batch)], new_tokens)
    if found.empty:
        return percentile([], 50, "tokens/s")
    row = found.iloc[0]
    return Estimate(float(row["value"]), float(row["low"]), float(row["high"]), len(table), "tokens/s")


def _times(found: Estimate) -> str:
    return f"{digits(found.value)}×"
