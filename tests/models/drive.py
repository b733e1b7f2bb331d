"""Drives a model by hand, without engine, runner or batcher: packs sequences, allocates a cache, reads logits.

Run as a program it is one rank of a model that is split over processes; see ``main``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from labkit.kernels.metadata import AttentionMetadata
from labkit.models.decoder import Decoder
from labkit.models.loading import load_model, open_checkpoint
from labkit.models.parallel import Parallel


class Driver:
    """Sequences over one model, the blocks of each scattered through the cache."""

    def __init__(self, model: Decoder, prompts: list[list[int]], block_size: int = 16, room: int = 64) -> None:
        """``room``: tokens that may be appended to each prompt."""
        self.model, self.block_size = model, block_size
        self.sequences = [list(prompt) for prompt in prompts]
        self.computed = [0] * len(prompts)
        self.widest = max(-(-(len(prompt) + room) // block_size) for prompt in prompts)
        blocks = self.widest * len(prompts)
        weight, shape = model.norm.weight, model.shape
        self.device = weight.device
        size = (shape.cache_planes, shape.cache_heads, blocks, block_size, shape.cache_width)
        self.cache = [torch.zeros(size, dtype=weight.dtype, device=self.device) for _ in range(shape.layers)]
        self.tables = torch.arange(blocks - 1, -1, -1, dtype=torch.int32).view(self.widest, len(prompts)).T

    @torch.inference_mode()
    def step(self, counts: list[int]) -> list[Tensor]:
        """Computes the next ``counts`` tokens of each sequence; returns logits on the CPU, each [count, vocab]."""
        order = sorted((i for i, count in enumerate(counts) if count), key=lambda i: counts[i] > 1)
        lengths = [counts[i] for i in order]
        contexts = [self.computed[i] + counts[i] for i in order]
        ids, positions, slots = [], [], []
        for i in order:
            for position in range(self.computed[i], self.computed[i] + counts[i]):
                ids.append(self.sequences[i][position])
                positions.append(position)
                block = int(self.tables[i, position // self.block_size])
                slots.append(block * self.block_size + position % self.block_size)
        meta = AttentionMetadata(
            query_lens=lengths,
            context_lens=contexts,
            contexts=torch.tensor(contexts, dtype=torch.int32, device=self.device),
            query_starts=torch.tensor([0, *lengths], device=self.device).cumsum(0).int(),
            block_tables=self.tables[order].to(self.device),
            slots=torch.tensor(slots, device=self.device),
            decodes=lengths.count(1),
        )
        on_device = (torch.tensor(each, device=self.device) for each in (ids, positions))
        logits = self.model.logits(self.model(*on_device, self.cache, meta)).float().cpu()
        found = dict(zip(order, logits.split(lengths), strict=True))
        self.computed = [done + count for done, count in zip(self.computed, counts, strict=True)]
        return [found.get(i, logits[:0]) for i in range(len(counts))]

    def prefill(self, chunks: list[int]) -> list[Tensor]:
        """Logits at every position of each prompt, ``chunks`` tokens of each in turn (the last repeats)."""
        parts: list[list[Tensor]] = [[] for _ in self.sequences]
        step = 0
        while any(pending := [len(s) - done for s, done in zip(self.sequences, self.computed, strict=True)]):
            most = chunks[min(step, len(chunks) - 1)]
            for part, found in zip(parts, self.step([min(most, left) for left in pending]), strict=True):
                part.append(found)
            step += 1
        return [torch.cat(part) for part in parts]

    def greedy(self, tokens: int, chunks: list[int]) -> list[list[int]]:
        """The ``tokens`` likeliest tokens that follow each prompt."""
        starts = [len(sequence) for sequence in self.sequences]
        last = [logits[-1] for logits in self.prefill(chunks)]
        for _ in range(tokens - 1):
            for sequence, logits in zip(self.sequences, last, strict=True):
                sequence.append(int(logits.argmax()))
            last = [logits[0] for logits in self.step([1] * len(last))]
        for sequence, logits in zip(self.sequences, last, strict=True):
            sequence.append(int(logits.argmax()))
        return [sequence[start:] for sequence, start in zip(self.sequences, starts, strict=True)]


def main(job: dict[str, Any]) -> None:
    """One rank. ``job``: checkpoints, prompts, tokens, chunks, rank, world, and the files rendezvous and out.

    Writes to ``out``, as JSON, of each checkpoint the greedy tokens and the number of parameters this rank holds.
    """
    dist.init_process_group("gloo", f"file://{job['rendezvous']}", rank=job["rank"], world_size=job["world"])
    found = []
    for path in job["checkpoints"]:
        parallel = Parallel(job["rank"], job["world"])
        model = load_model(open_checkpoint(path), torch.device("cpu"), torch.float32, parallel)
        answers = Driver(model, job["prompts"]).greedy(job["tokens"], job["chunks"])
        found.append({"answers": answers, "parameters": sum(each.numel() for each in model.parameters())})
    Path(job["out"]).write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # leaving the group in both at once now and then ends a process by std::terminate, in gloo's threads


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
