"""A quick look at what a model in training can do: the share of unseen problems whose right completion it would write.

It would where every token of the completion is its first choice, which one forward pass shows without any decoding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from labkit.training.ledger import BUCKETS, FAMILIES, make_problem
from labkit.training.network import Network
from labkit.training.tokenizer import completion_text, piece_table, prompt_text

_PROBE_SEED = 2**31


@dataclass(frozen=True)
class Probe:
    """Per bucket: token ids [n, L] padded on the right, True where a completion's tokens are, family of each row."""

    parts: dict[str, tuple[Tensor, Tensor, list[str]]]


def make_probe(tokenizer: Tokenizer, device: str, each: int = 8) -> Probe:
    """``each`` problems of every family and bucket, of a seed that neither training nor evaluation uses."""
    table = piece_table(tokenizer)
    parts = {}
    for bucket in BUCKETS:
        problems = [make_problem(_PROBE_SEED, index, bucket, family) for family in FAMILIES for index in range(each)]
        pairs = [(table.encode(prompt_text(p.prompt)), table.encode(completion_text(p))) for p in problems]
        longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
        ids = torch.zeros(len(pairs), longest, dtype=torch.int64)
        asked = torch.zeros(len(pairs), longest, dtype=torch.bool)
        for row, (prompt, completion) in enumerate(pairs):
            ids[row, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
            asked[row, len(prompt) : len(prompt) + len(completion)] = True
        parts[bucket] = (ids.to(device), asked.to(device), [p.family for p in problems])
    return Probe(parts)


@torch.no_grad()
def run_probe(network: Network, probe: Probe, rows: int = 32) -> dict[str, float]:
    """Share of problems written out right, per bucket and per family."""
    right: dict[str, list[bool]] = {name: [] for name in (*BUCKETS, *FAMILIES)}
    for bucket, (ids, asked, families) in probe.parts.items():
        for start in range(0, len(families), rows):
            part, wanted = ids[start : start + rows], asked[start : start + rows, 1:]
            chosen = network(part)[:, :-1].argmax(-1)
            verdicts = ((chosen == part[:, 1:]) | ~wanted).all(-1).tolist()
            for family, verdict in zip(families[start : start + rows], verdicts, strict=True):
                right[bucket].append(verdict)
                right[family].append(verdict)
    return {name: sum(verdicts) / len(verdicts) for name, verdicts in right.items()}
