"""A model split over processes: does it answer as one process does, and is it faster? (claim C25)"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from labkit.core import LabkitCore
from labkit.deployment import Deployment
from labkit.experiments.claims import Evidence, Verdict, judge_facts, not_testable
from labkit.experiments.intervals import share
from labkit.models.loading import load_tokenizer
from labkit.request import SamplingParams
from labkit.training.ledger import BUCKETS, make_problem

GREEDY = SamplingParams(max_tokens=64, ignore_eos=True)


@dataclass(frozen=True)
class Split:
    """The same questions to one process and to ``processes`` of them; seconds until the last answer, models loaded."""

    processes: int
    gpus: int
    """In this machine. From two on, each process has one of its own and they talk over NCCL; else over gloo, on the
    CPU."""
    asked: int
    same: int
    """Questions to which both gave the same 64 tokens."""
    alone_s: float
    split_s: float


def measure_split(deployment: Deployment, asked: int = 12, processes: int = 2) -> Split:
    """Asks ``asked`` ledger problems of all lengths at once, greedily, first the split model and then the whole one.

    float32 on the CPU, where equal means equal; the deployment's own dtype on GPUs. Raises UserError where the heads
    of the model cannot be shared by so many.
    """
    gpus = torch.cuda.device_count()
    over_gpus = gpus >= processes
    where: dict[str, Any] = {"device": "cuda"} if over_gpus else {"device": "cpu", "dtype": "float32"}
    prompts = _prompts(deployment.model, asked)
    split, split_s = _answers(replace(deployment, tensor_parallel=processes, **where), prompts)
    alone, alone_s = _answers(replace(deployment, tensor_parallel=1, **where), prompts)
    same = sum(one == other for one, other in zip(alone, split, strict=True))
    return Split(processes, gpus, asked, same, alone_s, split_s)


def judge_split(split: Split) -> Verdict:
    """C25. Equal answers are shown anywhere; that NCCL speeds serving up can only be seen where it has GPUs to
    connect."""
    equal = Evidence.of(f"same answers from {split.processes} processes as from one", share(split.same, split.asked))
    if split.gpus >= split.processes:
        facts = {
            f"{split.processes} GPUs answer as one does": split.same == split.asked,
            "and sooner": split.split_s < split.alone_s,
        }
        return judge_facts("C25", facts, (equal,))
    has = f"{split.gpus or 'no'} GPU{'' if split.gpus == 1 else 's'}"
    verdict = not_testable(
        "C25",
        f"This machine has {has}, so NCCL has nothing to connect. The same code over gloo, {split.processes} processes "
        f"on the CPU that share every layer, gave the same 64 tokens to {split.same} of {split.asked} questions",
        f"{split.processes} GPUs in one machine, where running this notebook measures it",
    )
    return replace(verdict, evidence=(equal,))


def _prompts(model: str, count: int) -> list[list[int]]:
    tokenizer = load_tokenizer(model)
    problems = [make_problem(25, index, BUCKETS[index % len(BUCKETS)]) for index in range(count)]
    chats = [[{"role": "user", "content": problem.prompt}] for problem in problems]
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def _answers(deployment: Deployment, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
    """What the engine writes to each prompt, and the seconds that all of them took."""
    core = LabkitCore(deployment)
    core.warm_up()
    began = time.perf_counter()
    for number, prompt in enumerate(prompts):
        core.add(number, prompt, GREEDY)
    found: list[list[int]] = [[] for _ in prompts]
    while core.has_work():
        for output in core.step():
            found[output.request_id] += output.token_ids
    return found, time.perf_counter() - began
