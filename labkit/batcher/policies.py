"""The batching policies: what runs in the next step.

Each takes the queues and says each chosen sequence's share; the sequences named own the blocks for it. An empty answer
means that there is nothing to run now.
"""

from __future__ import annotations

from collections.abc import Iterable

from labkit.batcher.queues import Queues
from labkit.deployment import Deployment
from labkit.runner.sequence import Sequence, Work


def schedule(queues: Queues, deployment: Deployment, now_s: float) -> list[Work]:
    """The next step under the deployment's policy. ``now_s`` is on the clock of the sequences' ``arrived_s``."""
    if deployment.batching == "continuous":
        return continuous(queues, deployment)
    if not queues.running and wait_s(queues, deployment, now_s) > 0:
        return []
    return static(queues, deployment)


def wait_s(queues: Queues, deployment: Deployment, now_s: float) -> float:
    """Seconds until the window of a dynamic batch closes; 0 if a step can run now. Meaningless without anyone waiting.

    The window opens when the first of those waiting arrived, and closes early when the batch is full.
    """
    if deployment.batching != "dynamic" or queues.running or not queues.waiting:
        return 0.0
    if len(queues.waiting) >= queues.max_batch:
        return 0.0
    return max(0.0, queues.waiting[0].arrived_s + deployment.batch_window_ms / 1000 - now_s)


def static(queues: Queues, deployment: Deployment) -> list[Work]:
    """One batch at a time: prompts first, then all of it decodes until its last member ends; nobody joins meanwhile."""
    if not queues.running:
        while queues.admit():
            pass
    prompts = _prefill(_prefilling(queues), deployment.token_budget, deployment.chunked_prefill)
    return prompts or _decode(queues, queues.max_batch)


def continuous(queues: Queues, deployment: Deployment) -> list[Work]:
    """Everyone who can run does: decodes first, then prompts, old and new, into what the token budget leaves."""
    if not deployment.chunked_prefill:
        while queues.admit():
            pass
        prompts = _prefill(_prefilling(queues), deployment.token_budget, chunked=False)
        return prompts or _decode(queues, queues.max_batch)
    work = _decode(queues, deployment.token_budget)
    budget = deployment.token_budget - len(work)
    while budget > sum(each.pending for each in _prefilling(queues)) and queues.admit():
        pass
    return work + _prefill(_prefilling(queues), budget, chunked=True)


def _decode(queues: Queues, most: int) -> list[Work]:
    """One token for up to ``most`` sequences past their prompt, oldest first, each with a block to write it to."""
    work: list[Work] = []
    for sequence in list(queues.running):
        if len(work) == most:
            break
        # Growing may send a later sequence back to waiting; it then has nothing computed and is passed over here.
        if not _is_prefilling(sequence) and queues.grow(sequence):
            work.append(Work(sequence, 1))
    return work


def _prefill(sequences: Iterable[Sequence], budget: int, chunked: bool) -> list[Work]:
    """Prompt tokens up to the budget, in order. Unchunked prompts go whole, the first one whatever its length."""
    work: list[Work] = []
    for sequence in sequences:
        tokens = min(sequence.pending, budget) if chunked else sequence.pending
        if tokens == 0 or (tokens > budget and work):
            break
        work.append(Work(sequence, tokens))
        budget = max(0, budget - tokens)
    return work


def _prefilling(queues: Queues) -> list[Sequence]:
    return [sequence for sequence in queues.running if _is_prefilling(sequence)]


def _is_prefilling(sequence: Sequence) -> bool:
    return sequence.computed == 0 or sequence.pending > 1
