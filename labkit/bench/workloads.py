"""What the engine benchmarks ask for: random token ids, lengths drawn by seed, a fixed number of new tokens each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from labkit.errors import UserError

MIX = ((0.6, 32, 511), (0.3, 512, 2047), (0.1, 2048, 4096))
"""Share, shortest and longest prompt of each part of the mix, in tokens."""


@dataclass(frozen=True)
class Request:
    """A prompt and how many tokens are generated to it, whatever they are."""

    prompt_ids: list[int]
    new_tokens: int


def throughput(vocab: int, count: int = 256, seed: int = 0, content: int = 0) -> list[Request]:
    """Input and output lengths uniform in 100 to 1024. ``content`` changes the tokens but not the lengths."""
    chance = random.Random(seed)
    prompts = [chance.randint(100, 1024) for _ in range(count)]
    answers = [chance.randint(100, 1024) for _ in range(count)]
    return _requests(prompts, answers, vocab, seed, content)


def mix(vocab: int, count: int = 600, new_tokens: int = 128, seed: int = 0, content: int = 0) -> list[Request]:
    """60 % prompts of 32 to 511 tokens, 30 % of 512 to 2047, 10 % of 2048 to 4096, in these shares exactly (as far as
    ``count`` allows), shuffled."""
    chance = random.Random(seed)
    prompts = [
        chance.randint(low, high) for part, (_, low, high) in zip(_counts(count), MIX, strict=True) for _ in range(part)
    ]
    chance.shuffle(prompts)
    return _requests(prompts, [new_tokens] * count, vocab, seed, content)


def decode(vocab: int, count: int = 1, seed: int = 0, content: int = 0) -> list[Request]:
    """128 tokens in, 256 out."""
    return _requests([128] * count, [256] * count, vocab, seed, content)


def check_context(requests: Sequence[Request], max_context: int) -> None:
    """Raises UserError if a request does not fit the context."""
    longest = max(len(request.prompt_ids) + request.new_tokens for request in requests)
    if longest > max_context:
        raise UserError(
            f"the workload has a prompt and answer of {longest} tokens together, the model takes {max_context}; "
            "raise max_context or take another workload or model"
        )


def _counts(count: int) -> list[int]:
    """``count`` split by the shares of MIX; what rounding leaves goes to the largest remainders."""
    exact = [share * count for share, _, _ in MIX]
    counts = [int(part + 1e-9) for part in exact]
    by_remainder = sorted(range(len(MIX)), key=lambda part: counts[part] - exact[part])
    for part in by_remainder[: count - sum(counts)]:
        counts[part] += 1
    return counts


def _requests(prompts: list[int], answers: list[int], vocab: int, seed: int, content: int) -> list[Request]:
    chance = np.random.default_rng([seed, content])
    drawn = chance.integers(0, vocab, sum(prompts)).tolist()
    ends = np.cumsum(prompts).tolist()
    return [
        Request(drawn[end - length : end], answer) for length, end, answer in zip(prompts, ends, answers, strict=True)
    ]
