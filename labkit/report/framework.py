"""What the notebook on the framework shows of its measurements: frames for figures, tables, and words."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from labkit.experiments.contests import gain, is_faster, median_seconds, peak_bytes
from labkit.experiments.intervals import digits
from labkit.experiments.operators import speeds
from labkit.experiments.training_options import (
    CHOSEN,
    KEEPS,
    Choice,
    largest_micro,
    loss_difference,
    paying,
    rate_names,
)
from labkit.report.tables import Table, interval, quantity


def times_frame(table: pd.DataFrame) -> pd.DataFrame:
    """For ``figures.lines``: name, x, and value, low and high in milliseconds."""
    found = speeds(table).rename(columns={"way": "name"})
    found[["value", "low", "high"]] *= 1e3
    return found


def ways_table(table: pd.DataFrame, caption: str) -> Table:
    """A table of contests at its largest size: every way, its time, memory, and how many times faster than the first;
    or why it has none."""
    x, rows = int(table["x"].max()), []
    first = str(table[table["note"] == ""]["way"].iloc[0])
    for way in dict.fromkeys(table.sort_values("note", kind="stable")["way"]):  # what was not measured comes last
        notes = table[(table["way"] == way) & (table["x"] == x) & (table["note"] != "")]["note"]
        if len(notes):
            rows.append((way, f"not measured: {notes.iloc[0]}", "–", "–"))
            continue
        faster = "1" if way == first else interval(gain(table, first, way, x))
        most = peak_bytes(table, way, x)
        rows.append((way, interval(median_seconds(table, way, x)), quantity(most, "bytes"), faster))
    return Table(("", "time", "memory at most", "times faster than the first"), tuple(rows), caption)


def frontier_frame(found: Sequence[Choice], tokens: int) -> pd.DataFrame:
    """For ``figures.lines``: name (the policy), memory (MiB), and value, low and high in tokens a second."""
    rows = [
        (one.policy, one.bytes / 2**20, tokens / one.seconds.value, tokens / one.seconds.high, tokens / one.seconds.low)
        for one in found
    ]
    return pd.DataFrame(rows, columns=["name", "memory", "value", "low", "high"])


def policies_table(found: Sequence[Choice], room: int, caption: str) -> Table:
    """Every policy and size of a part: time and memory of a step, what recomputing frees and what that costs in time,
    what beats it, and how many documents at a time the device would take at most."""
    measured = ("", "time of a step", "memory at most", "freed, for time added")
    columns = (*measured, "beaten, in no more memory, by", "most at a time here")
    rows = []
    for one in found:
        most = largest_micro(found, one.policy, room)
        fits = f"{most:,.0f}".replace(",", "\u202f") if math.isfinite(most) else "–"
        row = (one.way, interval(one.seconds), quantity(one.bytes, "bytes"), _bargain(one, found))
        rows.append((*row, one.beaten_by or "nothing", fits))
    return Table(columns, tuple(rows), caption)


def _bargain(one: Choice, found: Sequence[Choice]) -> str:
    """Memory that a policy frees against keeping everything in parts of the same size, and the time that it adds."""
    keeping = [other for other in found if other.policy == KEEPS and other.micro == one.micro and one.policy != KEEPS]
    if not keeping:
        return "–"
    freed, added = 1 - one.bytes / keeping[0].bytes, one.seconds.value / keeping[0].seconds.value - 1
    return f"{100 * freed:.0f}\u00a0%, for {100 * added:+.0f}\u00a0%".replace("-", "−")


def configuration_table(table: pd.DataFrame, caption: str) -> Table:
    """Every variant of the configuration: time and memory of a step, and how many times as fast the article's is."""
    x, rows = int(table["x"].max()), []
    for way in dict.fromkeys(table["way"]):
        note = str(table[table["way"] == way]["note"].iloc[0])
        if note:
            rows.append((way, f"not measured: {note}", "–", "–"))
            continue
        against = "–" if way == CHOSEN else interval(gain(table, way, CHOSEN, x))
        most = peak_bytes(table, way, x)
        rows.append((way, interval(median_seconds(table, way, x)), quantity(most, "bytes"), against))
    columns = ("", "time of a step", "memory at most", "the article's against it: times as fast")
    return Table(columns, tuple(rows), caption)


def losses_frame(losses: pd.DataFrame) -> pd.DataFrame:
    """For ``figures.lines``: name, tokens (thousands), value (nats a token; the mean of three steps, for they differ in
    their documents)."""
    parts = []
    for name, part in losses.groupby("way", sort=False):
        smooth = part.sort_values("step")["loss"].rolling(3, min_periods=1).mean()
        parts.append(pd.DataFrame({"name": str(name), "tokens": part["tokens"] / 1e3, "value": smooth}))
    return pd.concat(parts, ignore_index=True)


def when_it_pays(found: Sequence[Choice]) -> str:
    """In words: where recomputing activations pays, among what was measured."""
    keeping = min((one for one in found if one.policy == KEEPS), key=lambda one: one.bytes)
    good = paying(found)
    alone = [one for one, rival in good if rival is None]
    chosen = [(rival.seconds.value / one.seconds.value, one, rival) for one, rival in good if rival is not None]
    if not good:
        return (
            "Of what was measured, recomputing pays nowhere: keeping all activations of smaller parts of the batch "
            f"needs as little memory ({quantity(keeping.bytes, 'bytes')}) and is as fast."
        )
    said = []
    if alone:
        best = min(alone, key=lambda one: one.seconds.value)
        documents = f"{keeping.micro} document{'s' if keeping.micro > 1 else ''}"
        said.append(
            f"Where not even {documents} at a time fit with all activations kept ({_cost(keeping)} a step), "
            f"recomputing is the way: *{best.way}* takes {_cost(best)}."
        )
    if chosen:
        _, one, rival = max(chosen, key=lambda each: each[0])
        said.append(
            "It also pays where smaller parts of the batch fit, but do not fill the device: "
            f"*{one.way}* takes {_cost(one)}, *{rival.way}* {_cost(rival)}."
        )
    else:
        said.append("Where memory is less short, smaller parts of the batch with all activations kept do as well.")
    return " ".join(said)


def _cost(one: Choice) -> str:
    return f"{quantity(one.seconds.value, 's')} and {quantity(one.bytes, 'bytes')}"


def framework_takeaway(
    softmax: pd.DataFrame, norms: pd.DataFrame, found: Sequence[Choice], losses: pd.DataFrame
) -> str:
    """What to do about each of the four."""
    longest, most = int(softmax["x"].max()), int(norms["x"].max())
    saved = gain(softmax, "all scores", "those in sight", longest)
    fused = gain(norms, "written out", "PyTorch", most)
    article, ours = rate_names()
    helps = "saves" if is_faster(saved) else "alone costs" if saved.high < 1 else "alone does not surely save"
    return (
        f"- **Softmax.** Half of the scores of a prompt are masked. Leaving them out {helps} time here "
        f"({digits(saved.value)}× as fast at {longest} tokens); a fused attention kernel does "
        "that and more, and notebook 04 has it.\n"
        f"- **LayerNorm.** In one operator it is {digits(fused.value)}× as fast as written out. Use the fused one.\n"
        f"- **Gradient checkpointing** is for training: a service makes no backward pass. {when_it_pays(found)}\n"
        "- **The training configuration** does not touch the service either. From nothing, the rate of "
        f"*{article}* ends {digits(loss_difference(losses).value)} nats a token above *{ours}*: it is made for models "
        "that are trained already."
    )
