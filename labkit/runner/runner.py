"""Turns a step's work into the model's next tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from labkit.deployment import Deployment
from labkit.errors import UserError
from labkit.kernels.attention import DECODE_BATCH_TOKENS
from labkit.models.loading import Checkpoint, load_model
from labkit.request import SamplingParams, TokenLogprob
from labkit.runner import cache as kv
from labkit.runner.inputs import pack
from labkit.runner.sampling import sample, token_logprobs, uniform
from labkit.runner.sequence import Sequence, Work

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Sampled(NamedTuple):
    """The next token of a sequence."""

    sequence: Sequence
    token: int
    logprob: TokenLogprob | None


class Runner:
    """The model, its KV cache and the device they are on."""

    def __init__(self, checkpoint: Checkpoint, deployment: Deployment) -> None:
        """Loads the weights and allocates the cache. Raises UserError for a bad checkpoint or too little memory."""
        self.device, dtype = torch_device(deployment.device), DTYPES[deployment.dtype]
        self.block_size = deployment.kv_block_size
        self.model = load_model(checkpoint, self.device, dtype)
        shape = checkpoint.shape
        context = min(shape.max_positions, deployment.max_context or shape.max_positions)
        blocks = deployment.kv_blocks
        if blocks is None:
            room = kv.free_bytes(self.device, self._activation_bytes(deployment, context))
            per_block = kv.block_bytes(shape, self.block_size, dtype)
            blocks = kv.count_blocks(room, per_block, deployment.max_batch * context, self.block_size)
        self.blocks = blocks
        self.cache = kv.allocate(shape, blocks, self.block_size, self.device, dtype)
        # A context that is asked for stays, and what does not fit is refused; one that is not asked for is what fits.
        self.max_context = context if deployment.max_context else min(context, blocks * self.block_size)

    @torch.inference_mode()
    def run(self, work: list[Work]) -> list[Sampled]:
        """Computes the pending tokens of ``work`` (not empty) and samples where a sequence's end is reached."""
        work = sorted(work, key=lambda share: share.tokens > 1)
        inputs = pack(work, self.block_size, self.device)
        hidden = self.model(inputs.token_ids, inputs.positions, self.cache, inputs.attention)
        ending = [share.sequence for share in work if share.samples]
        if not ending:
            return []
        tokens, logprobs = self._choose(self.model.logits(hidden[inputs.sample_rows]), ending)
        return [Sampled(*each) for each in zip(ending, tokens, logprobs, strict=True)]

    def warm_up(self) -> None:
        """Runs a short prompt and a decode, so that the first request does not pay for what happens only once."""
        length = min(self.block_size, self.max_context - 1, self.blocks * self.block_size - 1)
        block = list(range(min(self.blocks, 2)))
        for computed, tokens in ((0, length), (length, 1)):
            probe = Sequence(-1, [0] * (computed + tokens), 1, 0, SamplingParams(), 0, 0.0, computed, block)
            self.run([Work(probe, tokens)])

    def _choose(self, logits: Tensor, ending: list[Sequence]) -> tuple[list[int], list[TokenLogprob | None]]:
        sampling = [sequence.sampling for sequence in ending]
        tokens = sample(logits, sampling, [uniform(each.seed, len(each.tokens)) for each in ending])
        return tokens.tolist(), token_logprobs(logits, tokens, sampling)

    @torch.inference_mode()
    def _activation_bytes(self, deployment: Deployment, context: int) -> int:
        """Memory that the largest step takes beside weights and cache, measured by running one on CUDA."""
        if self.device.type != "cuda":
            return 0
        tokens = max(deployment.token_budget, deployment.max_batch, 0 if deployment.chunked_prefill else context)
        blocks = list(range(-(-tokens // self.block_size)))
        shape, dtype = self.model.shape, DTYPES[deployment.dtype]
        self.cache = kv.allocate(shape, len(blocks), self.block_size, self.device, dtype)
        probe = Sequence(-1, [0] * tokens, tokens, context, SamplingParams(), 0, 0.0, 0, blocks)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.run([Work(probe, tokens)])
        peak = torch.cuda.max_memory_allocated(self.device) - before
        self.cache = []
        # Decoding gathers what it attends to: one layer's keys and values, twice for the copies.
        gathered = 2 * max(DECODE_BATCH_TOKENS, context) * kv.block_bytes(shape, 1, dtype) // shape.layers
        return peak + gathered + 4 * 4 * deployment.max_batch * shape.vocab_size


def torch_device(name: str) -> torch.device:
    """'auto' is CUDA where there is one. Raises UserError for 'cuda' where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but torch finds no CUDA device here; use device 'cpu' or 'auto'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
