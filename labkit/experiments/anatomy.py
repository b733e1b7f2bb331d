"""Taking runs apart: how latency grows with users, what is waiting and what is work, how much padding is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
import pandas as pd
from transformers.utils import logging

from labkit.deployment import Deployment
from labkit.engine import build_core
from labkit.experiments import metrics
from labkit.experiments.intervals import Estimate
from labkit.experiments.metrics import Window
from labkit.experiments.store import Run
from labkit.models.loading import load_tokenizer
from labkit.probes.profiler import operators
from labkit.probes.sampler import series
from labkit.request import SamplingParams
from labkit.traffic.workload import Workload, schedule
from labkit.training.ledger import make_problem

TOGETHER_S = 0.05
"""Answers that end within so little of each other came out of the same batch."""


def pooled(runs: Sequence[Run]) -> tuple[pd.DataFrame, Window]:
    """The requests of several runs as if one had followed the other, for metrics over all repeats.

    The times of each run are moved behind the window before. Repeats ask the same questions, so intervals over them
    tell how the service varies, not how it would fare with other questions. Raises ValueError without runs, and for
    a run whose last answers came after its window: its work would be counted in the next.
    """
    if not runs:
        raise ValueError("there is no run to pool")
    parts, at = [], 0.0
    for run in runs:
        begin, end = run.window
        part = metrics.measured(run.requests, run.window).copy()
        if len(part) and part["end"].max() > end:
            raise ValueError(f"{run.name} has answers that came after its window; measure a number of requests instead")
        for column in ("scheduled", "sent", "first_byte", "first_token", "first_answer", "last_token", "end"):
            part[column] += at - begin
        part["chunk_t"] = [times + (at - begin) for times in part["chunk_t"]]
        parts.append(part)
        at += end - begin
    return pd.concat(parts, ignore_index=True), (0.0, at)


def by_users(
    runs: Sequence[Run], metric: Callable[[pd.DataFrame, Window], Estimate], name: str = "measured"
) -> pd.DataFrame:
    """A metric over the users of the runs, repeats pooled: users, deployment (``name``), value, low, high, n."""
    rows = []
    for users, group in group_by_users(runs).items():
        found = metric(*pooled(group))
        rows.append((users, name, found.value, found.low, found.high, found.n))
    return pd.DataFrame(rows, columns=["users", "deployment", "value", "low", "high", "n"])


def group_by_users(runs: Sequence[Run]) -> dict[int, list[Run]]:
    """The runs under the number of their users, ascending."""
    groups: dict[int, list[Run]] = {}
    for run in sorted(runs, key=users_of):
        groups.setdefault(users_of(run), []).append(run)
    return groups


def users_of(run: Run) -> int:
    return int(run.manifest["workload"]["users"])


def predicted(alone: Sequence[Run], users: Sequence[int]) -> pd.DataFrame:
    """What one user's experience says about more of them: columns users, throughput (1/s), latency_s (mean).

    A service that answers one batch at a time and gains nothing from batching keeps the throughput X of one user.
    Little's law, users = X x latency, then gives every further user the same extra wait: latency = users / X.
    """
    table, window = pooled(alone)
    rate = metrics.throughput(table, window).value
    counts = np.asarray(sorted(users), dtype=float)
    return pd.DataFrame({"users": counts.astype(int), "throughput": rate, "latency_s": counts / rate})


def waiting_and_work(run: Run) -> dict[str, float]:
    """The mean latency of a run in seconds, in three parts that add up to it: "waiting for a batch", "in a batch",
    "everything else" (network, HTTP, tokenising).

    By Little's law: the engine's mean number of waiting (running) requests over the requests answered per second is
    the mean time of one of them in that state. NaN where the engine was not read.
    """
    begin, end = run.window
    law = metrics.littles_law(run.requests, run.window)
    means = []
    for name in ("waiting", "running"):
        found = series(run.samples, "engine", name)
        inside = found[(found["t_s"] >= begin) & (found["t_s"] <= end)]["value"]
        means.append(float(inside.mean()) / law.throughput if len(inside) and law.throughput else float("nan"))
    waiting, running = means
    rest = max(0.0, law.latency_s - waiting - running) if np.isfinite([waiting, running]).all() else float("nan")
    return {"waiting for a batch": waiting, "in a batch": running, "everything else": rest}


def batches(run: Run, together_s: float = TOGETHER_S) -> pd.DataFrame:
    """The batches of a static deployment, told from the answers: all of a batch come at once, when its last one ends.

    One row a batch in order: end_s, requests, longest_prompt, longest_answer (tokens), asked (tokens of its prompts
    and answers), computed (tokens with every row padded to the longest prompt and the longest answer).
    """
    done = run.requests[run.requests["failure"] == ""].sort_values("end")
    number = (done["end"].diff() > together_s).cumsum()
    groups = done.groupby(number)
    table = pd.DataFrame(
        {
            "end_s": groups["end"].max(),
            "requests": groups.size(),
            "longest_prompt": groups["prompt_tokens"].max(),
            "longest_answer": groups["tokens"].max(),
            "asked": groups["prompt_tokens"].sum() + groups["tokens"].sum(),
        }
    ).reset_index(drop=True)
    table["computed"] = table["requests"] * (table["longest_prompt"] + table["longest_answer"])
    return table


def first_prompts(workload: Workload, model: str, count: int) -> list[list[int]]:
    """Token ids of the first prompts of a workload of ledger problems, chat template included."""
    tokenizer = load_tokenizer(model)
    found = []
    for arrival in islice(schedule(workload), count):
        problem = make_problem(workload.seed, arrival.index, arrival.bucket)
        chat = [{"role": "user", "content": problem.prompt}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        found.append(list(tokenizer(text, add_special_tokens=False).input_ids))
    return found


def profile_batch(deployment: Deployment, prompts: Sequence[list[int]], max_tokens: int = 64) -> pd.DataFrame:
    """Loads the deployment's model into this process, answers the prompts in one batch, and says which operators took
    the time (``labkit.probes.profiler.operators``)."""
    logging.disable_progress_bar()
    core = build_core(deployment)
    core.add(-1, [0], SamplingParams(max_tokens=2))
    while core.has_work():
        core.step()
    for request_id, prompt in enumerate(prompts):
        core.add(request_id, prompt, SamplingParams(max_tokens=max_tokens))

    def answer() -> None:
        while core.has_work():
            core.step()

    return operators(answer)
