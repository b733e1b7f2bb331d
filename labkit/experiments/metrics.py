"""Metrics: pure functions from the events of a run to a number with an interval.

``requests_table(events)`` first; every metric takes that table and the measured window. Requests belong to the window
by their scheduled time; only throughput and goodput count what ended inside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from labkit.experiments.intervals import (
    Estimate,
    Evidence,
    bootstrap,
    bootstrap_pooled_percentile,
    evidence,
    percentile,
    share,
)

Window = tuple[float, float]
Clock = Literal["scheduled", "sent"]

SLICES = (5, 20)
"""Into how many equal parts, at least and at most, a window is cut to see how much a throughput varies. In between, a
part is as long as a mean answer takes, so that the waves in which batches end do not pass for variation."""


@dataclass(frozen=True)
class SLO:
    """Limits in seconds that one request has to keep; None does not ask. A failed request keeps none."""

    latency_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None


def requests_table(events: pd.DataFrame) -> pd.DataFrame:
    """One row a request, index ``request``.

    scheduled, sent, first_byte, first_token (first content, reasoning included), first_answer, last_token, end:
    seconds of the run, NaN where it did not come to it; tokens (completion), prompt_tokens; failure ("" for a whole
    answer); correct (nullable boolean); finish, bucket, family, text: str; chunk_t, chunk_tokens: arrays [chunks]
    float64, int64.
    """
    rows = {}
    for request, of_one in events.groupby("request", sort=True):
        kinds = of_one["kind"].to_numpy()
        times, tokens, detail = of_one["t_s"].to_numpy(), of_one["tokens"].to_numpy(), of_one["detail"].to_numpy()
        at = {kind: times[kinds == kind] for kind in ("scheduled", "sent", "first_byte")}
        chunk = kinds == "chunk"
        chunk_t = times[chunk]
        answer_t = times[chunk & (detail == "answer")]
        last = of_one[(kinds == "done") | (kinds == "failed")]
        if last.empty:
            raise ValueError(f"request {request} neither ended nor failed: these are not the events of a whole run")
        end = last.iloc[-1]
        failed = end["kind"] == "failed"
        rows[request] = {
            **{kind: _first(values) for kind, values in at.items()},
            "first_token": _first(chunk_t),
            "first_answer": _first(answer_t),
            "last_token": chunk_t[-1] if len(chunk_t) else math.nan,
            "end": end["t_s"],
            "tokens": int(end["tokens"]),
            "prompt_tokens": int(end["prompt_tokens"]),
            "failure": end["detail"] if failed else "",
            "finish": "" if failed else end["detail"],
            "correct": end["correct"],
            "bucket": end["bucket"],
            "family": end["family"],
            "text": end["text"],
            "chunk_t": chunk_t,
            "chunk_tokens": tokens[chunk].astype(np.int64),
        }
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(_EMPTY_ROW))
    table.index.name = "request"
    return table.astype({"correct": "boolean"})


_EMPTY_ROW = (
    "scheduled", "sent", "first_byte", "first_token", "first_answer", "last_token", "end", "tokens", "prompt_tokens",
    "failure", "finish", "correct", "bucket", "family", "text", "chunk_t", "chunk_tokens",
)  # fmt: skip


def measured(table: pd.DataFrame, window: Window) -> pd.DataFrame:
    """The requests scheduled inside the window."""
    return table[(table["scheduled"] >= window[0]) & (table["scheduled"] <= window[1])]


def grouped(metric: Callable[[pd.DataFrame], Estimate], table: pd.DataFrame, by: str = "bucket") -> dict[str, Estimate]:
    """A metric for every value of a column: ``grouped(lambda t: latency(t, window, 95), table, "bucket")``."""
    return {str(value): metric(part) for value, part in table.groupby(by, sort=True)}


def latency(table: pd.DataFrame, window: Window, q: float = 95, clock: Clock = "scheduled") -> Estimate:
    """Percentile q of (end − scheduled), or (end − sent), over the whole answers. Seconds."""
    done = _done(measured(table, window))
    return percentile(done["end"] - done[clock], q, "s")


def adjusted_latency(table: pd.DataFrame, window: Window, q: float = 95, clock: Clock = "scheduled") -> Estimate:
    """Percentile q of the latency over all requests, a failed one taken as infinitely late. Seconds, maybe inf."""
    rows = measured(table, window)
    return percentile((rows["end"] - rows[clock]).where(rows["failure"] == "", math.inf), q, "s")


def mean_latency(table: pd.DataFrame, window: Window, clock: Clock = "scheduled") -> Estimate:
    """Mean of (end − clock) over the whole answers. Seconds."""
    done = _done(measured(table, window))
    return bootstrap(done["end"] - done[clock], "s")


def ttft(table: pd.DataFrame, window: Window, q: float = 95, clock: Clock = "sent") -> Estimate:
    """Percentile q of (first content token, reasoning included − clock) over the whole answers. Seconds."""
    done = _done(measured(table, window))
    return percentile((done["first_token"] - done[clock]).dropna(), q, "s")


def first_answer(table: pd.DataFrame, window: Window, q: float = 95, clock: Clock = "sent") -> Estimate:
    """Percentile q of (first token after the reasoning − clock) over the whole answers. Seconds."""
    done = _done(measured(table, window))
    return percentile((done["first_answer"] - done[clock]).dropna(), q, "s")


def ttfb(table: pd.DataFrame, window: Window, q: float = 95, clock: Clock = "sent") -> Estimate:
    """Percentile q of (first byte of the response − clock) over the whole answers. Seconds."""
    done = _done(measured(table, window))
    return percentile((done["first_byte"] - done[clock]).dropna(), q, "s")


def tpot(table: pd.DataFrame, window: Window, q: float = 50) -> Estimate:
    """Percentile q over the whole answers of (last token − first token) / (n − 1), n the answer's tokens. Seconds.

    This is (E2E − TTFT) / (n − 1) with E2E up to the last token. Answers that came in one chunk have none.
    """
    return percentile(_tpot(_done(measured(table, window))).dropna(), q, "s")


def itl(table: pd.DataFrame, window: Window, q: float = 95, per_token: bool = False) -> Estimate:
    """Percentile q of the gaps between the chunks of an answer, all answers' gaps together. Seconds.

    ``per_token``: a gap before a chunk of k tokens counts as k gaps of a k-th of it. The interval resamples answers,
    because the gaps inside one are not independent.
    """
    values, weights, owners = [], [], []
    for number, (times, tokens) in enumerate(_chunks(_done(measured(table, window)))):
        gaps, carried = np.diff(times), tokens[1:]
        values.append(gaps / carried if per_token else gaps)
        weights.append(carried if per_token else np.ones(len(gaps)))
        owners.append(np.full(len(gaps), number))
    if not values:
        return Estimate(math.nan, math.nan, math.nan, 0, "s")
    return bootstrap_pooled_percentile(np.concatenate(values), np.concatenate(weights), np.concatenate(owners), q, "s")


def lateness(table: pd.DataFrame, window: Window, due: Mapping[int, np.ndarray], q: float = 99) -> Estimate:
    """Percentile q of (arrival − due) over the tokens of the whole answers, all answers' tokens together. Seconds.

    ``due``: request -> [tokens] when its server's schedule had each token, in seconds of the run. The tokens of a chunk
    arrive together, so that what a chunk waited for its last one counts as late for its first. The interval resamples
    answers, because the tokens of one are not independent. Raises ValueError when a schedule and its answer differ in
    their number of tokens.
    """
    late, owners = [], []
    for request, times, tokens in _done(measured(table, window))[["chunk_t", "chunk_tokens"]].itertuples():
        arrived, scheduled = np.repeat(times, tokens), np.asarray(due[request], dtype=float)
        if len(arrived) != len(scheduled):
            raise ValueError(f"request {request}: {len(arrived)} tokens came, {len(scheduled)} were scheduled")
        late.append(arrived - scheduled)
        owners.append(np.full(len(arrived), request))
    if not late:
        return Estimate(math.nan, math.nan, math.nan, 0, "s")
    pooled = np.concatenate(late)
    return bootstrap_pooled_percentile(pooled, np.ones(len(pooled)), np.concatenate(owners), q, "s")


def throughput(table: pd.DataFrame, window: Window) -> Estimate:
    """Whole answers that ended inside the window / its length. Requests per second; interval over the window's
    slices."""
    ends = _done(table)["end"].to_numpy(dtype=float)
    return _rate(ends, np.ones(len(ends)), window, _slices(table, window), "requests/s")


def token_throughput(table: pd.DataFrame, window: Window) -> Estimate:
    """Generated tokens that arrived inside the window / its length. Tokens per second; interval over the window's
    slices.

    Tokens without text (end of sequence, think tags) are counted with the chunks of their answer in proportion.
    """
    times, tokens = [], []
    for (chunk_t, chunk_tokens), total in zip(_chunks(table), table["tokens"], strict=True):
        seen = chunk_tokens.sum()
        times.append(chunk_t)
        tokens.append(chunk_tokens * (max(total, seen) / seen if seen else 1.0))
    if not times:
        return Estimate(math.nan, math.nan, math.nan, 0, "tokens/s")
    return _rate(np.concatenate(times), np.concatenate(tokens), window, _slices(table, window), "tokens/s")


def goodput(table: pd.DataFrame, window: Window, slo: SLO) -> Estimate:
    """Whole answers within the SLO that ended inside the window / its length. Requests per second."""
    ends = table[_within(table, slo)]["end"].to_numpy(dtype=float)
    return _rate(ends, np.ones(len(ends)), window, _slices(table, window), "requests/s")


def attainment(table: pd.DataFrame, window: Window, slo: SLO) -> Estimate:
    """Requests within the SLO / all requests; failed ones are misses. Wilson interval."""
    rows = measured(table, window)
    return share(int(_within(rows, slo).sum()), len(rows))


def within_limit(
    table: pd.DataFrame, window: Window, limit_s: float, q: float = 95, clock: Clock = "scheduled"
) -> Evidence:
    """Do the requests show that percentile q of the latency is within ``limit_s``, at 99 %? Failed ones are misses."""
    rows = measured(table, window)
    return evidence((rows["end"] - rows[clock]).where(rows["failure"] == "", math.inf), limit_s, q)


def error_rate(table: pd.DataFrame, window: Window, kind: str | None = None) -> Estimate:
    """Failed requests (of one kind, if given) / all requests. Wilson interval. A wrong answer is not a failure."""
    failures = measured(table, window)["failure"]
    return share(int((failures != "").sum() if kind is None else (failures == kind).sum()), len(failures))


def error_rates(table: pd.DataFrame, window: Window) -> dict[str, Estimate]:
    """``error_rate`` for every kind of failure that occurred."""
    kinds = sorted(set(measured(table, window)["failure"]) - {""})
    return {kind: error_rate(table, window, kind) for kind in kinds}


def accuracy(table: pd.DataFrame, window: Window) -> Estimate:
    """Right answers / whole answers whose right answer is known. Wilson interval."""
    correct = _done(measured(table, window))["correct"].dropna()
    return share(int(correct.sum()), len(correct))


@dataclass(frozen=True)
class LittlesLaw:
    """L = λ W: ``in_flight`` is the measured L; ``difference`` is L / (λ W) − 1, which a consistent set of numbers
    keeps near 0."""

    in_flight: float
    throughput: float
    latency_s: float

    @property
    def difference(self) -> float:
        implied = self.throughput * self.latency_s
        return self.in_flight / implied - 1 if implied else math.nan


def littles_law(table: pd.DataFrame, window: Window) -> LittlesLaw:
    """Mean requests in flight (sent, not ended) over the window; rate and mean time of those that ended in it, failed
    ones too."""
    sent, end = table["sent"].fillna(table["scheduled"]).to_numpy(dtype=float), table["end"].to_numpy(dtype=float)
    length = window[1] - window[0]
    if length <= 0:
        return LittlesLaw(math.nan, math.nan, math.nan)
    inside = np.clip(np.minimum(end, window[1]) - np.maximum(sent, window[0]), 0, None).sum()
    ended = (end >= window[0]) & (end <= window[1])
    mean = float((end - sent)[ended].mean()) if ended.any() else math.nan
    return LittlesLaw(float(inside / length), float(ended.sum() / length), mean)


def _first(values: np.ndarray) -> float:
    return float(values[0]) if len(values) else math.nan


def _done(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["failure"] == ""]


def _chunks(table: pd.DataFrame) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(zip(table["chunk_t"], table["chunk_tokens"], strict=True))


def _tpot(table: pd.DataFrame) -> pd.Series:
    tokens = pd.Series([int(tokens.sum()) for _, tokens in _chunks(table)], index=table.index, dtype=float)
    chunks = pd.Series([len(times) for times, _ in _chunks(table)], index=table.index)
    return ((table["last_token"] - table["first_token"]) / (tokens - 1)).where(chunks > 1)


def _within(table: pd.DataFrame, slo: SLO) -> pd.Series:
    good = table["failure"] == ""
    if slo.latency_s is not None:
        good &= table["end"] - table["scheduled"] <= slo.latency_s
    if slo.ttft_s is not None:
        good &= table["first_token"] - table["scheduled"] <= slo.ttft_s
    if slo.tpot_s is not None:
        good &= _tpot(table).fillna(0.0) <= slo.tpot_s
    return good


def _slices(table: pd.DataFrame, window: Window) -> int:
    least, most = SLICES
    mean = float((table["end"] - table["scheduled"]).mean()) if len(table) else math.nan
    return max(least, min(most, math.floor((window[1] - window[0]) / mean))) if mean > 0 else most


def _rate(times: np.ndarray, weights: np.ndarray, window: Window, slices: int, unit: str) -> Estimate:
    begin, end = window
    if end <= begin:
        return Estimate(math.nan, math.nan, math.nan, 0, unit)
    inside = (times >= begin) & (times <= end)
    counts, _ = np.histogram(times[inside], bins=slices, range=window, weights=weights[inside])
    spread = bootstrap(counts * slices / (end - begin), unit)
    total = float(weights[inside].sum()) / (end - begin)
    return Estimate(total, spread.low, spread.high, int(inside.sum()), unit)
