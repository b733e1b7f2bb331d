"""The batching policies: what runs in the next step.

Each takes the queues and says each chosen sequence's share; the sequences named own the blocks for it. An empty answer
means that there is nothing to run now.
"""

from __future__ import annotations

from labkit.batcher.queues import Queues
from labkit.deployment import Deployment
from labkit.runner.sequence import Sequence, Work


def schedule(queues: Queues, deployment: Deployment, now_s: float) -> list[Work]:
    """The next step under the deployment's policy. ``now_s`` is on the clock of the sequences' ``arrived_s``.

    Steps may be in flight: their tokens count as computed, and a token yet to come is in its place as a placeholder. A
    sequence whose placeholder is its last token is ending, and gets no share.
    """
    queues.remember_prompts()
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
    return _prompts_or_decode(queues, deployment)


def continuous(queues: Queues, deployment: Deployment) -> list[Work]:
    """Everyone who can run does: decodes first, then prompts, old and new, into what the token budget leaves."""
    if not deployment.chunked_prefill:
        while queues.admit():
            pass
        return _prompts_or_decode(queues, deployment)
    work, prompts = _decode(queues)
    budget = deployment.token_budget - len(work)
    wanted = sum(sequence.pending for sequence in prompts)
    # Who is admitted gets a token at least, so that those who run, and decodes with them, never outnumber the budget.
    while wanted < budget and (sequence := queues.admit()):
        prompts.append(sequence)
        wanted += sequence.pending
    return work + _prefill(queues, prompts, budget, chunked=True)


def _prompts_or_decode(queues: Queues, deployment: Deployment) -> list[Work]:
    """A step of prompts alone, or else of decodes alone."""
    prompts = [sequence for sequence in queues.running if _is_prefilling(sequence)]
    if prompts:
        return _prefill(queues, prompts, deployment.token_budget, deployment.chunked_prefill)
    return _decode(queues)[0]


def _decode(queues: Queues) -> tuple[list[Work], list[Sequence]]:
    """One token for each sequence past its prompt, oldest first, with a block to write it to.

    Also returns who is not past its prompt yet. One pass with few calls, for every step makes it over hundreds.
    """
    work: list[Work] = []
    prompts: list[Sequence] = []
    block_size = queues.block_size
    for sequence, share in list(queues.running.items()):
        tokens = len(sequence.tokens)
        if tokens - sequence.computed != 1:
            if sequence.row < 0:
                # Growing has sent it back to waiting, and everyone after it.
                break
            prompts.append(sequence)
        elif tokens < sequence.limit and (tokens <= len(sequence.blocks) * block_size or queues.grow(sequence)):
            work.append(share)
    return work, prompts


def _prefill(queues: Queues, sequences: list[Sequence], budget: int, chunked: bool) -> list[Work]:
    """Prompt tokens up to the budget, in order. Unchunked prompts go whole, the first one whatever its length."""
    work: list[Work] = []
    for sequence in sequences:
        tokens = min(sequence.pending, budget) if chunked else sequence.pending
        if tokens == 0 or (tokens > budget and work):
            break
        work.append(Work(sequence, tokens))
        budget = max(0, budget - tokens)
    queues.prompts = [share.sequence for share in work]
    return work


def _is_prefilling(sequence: Sequence) -> bool:
    return sequence.computed == 0 or sequence.pending > 1
