"""Turns a step's work into the model's next tokens."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from labkit.deployment import Deployment
from labkit.errors import UserError
from labkit.kernels.attention import DECODE_BATCH_TOKENS
from labkit.kernels.sampling import greedy, sample
from labkit.models.loading import ALONE, Checkpoint, load_model
from labkit.models.parallel import Parallel
from labkit.request import SamplingParams, TokenLogprob
from labkit.runner import cache as kv
from labkit.runner.graphs import CHUNKS, GraphPool, decode_sizes, mixed_sizes
from labkit.runner.inputs import (
    BlockTables,
    Mailbox,
    Size,
    StepInputs,
    arrays,
    capacity_bytes,
    metadata,
    places_of,
    size_of,
)
from labkit.runner.sampling import Logprobs, gather_logprobs, read_logprobs
from labkit.runner.sequence import Sequence, Work
from labkit.runner.workers import Workers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Sampled(NamedTuple):
    """The next token of a sequence."""

    sequence: Sequence
    token: int
    logprob: TokenLogprob | None


class Launched(NamedTuple):
    """A step that the device has been told to do. Its tokens are there once ``ready`` has come."""

    work: list[Work]
    sampled: dict[int, Sequence]
    """The sequences that get a token, by its place in ``tokens``."""
    tokens: Tensor
    """[sequences] int64 on the host, those of padding too; pinned on CUDA."""
    logprobs: Logprobs | None
    ready: torch.cuda.Event | None
    workers: Workers | None = None

    def wait(self) -> list[Sampled]:
        """The tokens, once they are there."""
        if self.ready is not None:
            self.ready.synchronize()
        if self.workers is not None:
            self.workers.check()
        tokens = self.tokens.tolist()
        asked = {place: sequence.sampling for place, sequence in self.sampled.items()}
        logprobs = read_logprobs(self.logprobs, tokens, asked)
        return [Sampled(sequence, tokens[at], logprobs.get(at)) for at, sequence in self.sampled.items()]


class Runner:
    """The model, or a rank's part of it, its KV cache and the device they are on."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        deployment: Deployment,
        parallel: Parallel = ALONE,
        workers: Workers | None = None,
    ) -> None:
        """Loads the weights and allocates the cache. Raises UserError for a bad checkpoint or too little memory.

        ``workers`` are the other ranks, of whom rank 0 has the cache allocated and every step done as here.
        """
        self.device, dtype = torch_device(deployment.device), DTYPES[deployment.dtype]
        self.block_size = deployment.kv_block_size
        self.deployment = deployment
        self._graphs = GraphPool(captured_sizes(deployment, self.device, chunks=checkpoint.shape.latent is None))
        self.model = load_model(
            checkpoint,
            self.device,
            dtype,
            parallel,
            deployment.random_weights,
            deployment.quantization,
            deployment.int8_head,
        )
        shape = self.model.shape
        context = min(shape.max_positions, deployment.max_context or shape.max_positions)
        blocks = deployment.kv_blocks
        if blocks is None:
            room = kv.free_bytes(self.device, self._activation_bytes(context))
            if self.device.type == "cpu":
                room //= parallel.world
            per_block = kv.block_bytes(shape, self.block_size, dtype)
            blocks = kv.count_blocks(room, per_block, deployment.max_batch * context, self.block_size)
        self.blocks = blocks
        """KV blocks; those of a worker are what would fit until rank 0 has them allocated."""
        self._workers = workers
        if parallel.rank > 0:
            return
        if workers is not None:
            weakref.finalize(self, _end, self._graphs, workers)
            blocks = min(blocks, *workers.answers())
        # A context that is asked for stays, and what does not fit is refused; one that is not asked for is what fits.
        self.max_context = context if deployment.max_context else min(context, blocks * self.block_size)
        self._everywhere("allocate", blocks, self.max_context)

    @torch.inference_mode()
    def launch(self, work: list[Work]) -> Launched:
        """Tells the device to compute the pending tokens of ``work`` (not empty), and to sample where a sequence's end
        is reached. On CUDA it returns before that is done."""
        work = sorted(work, key=lambda share: share.tokens > 1)
        size = size_of(work)
        captured = self._fit(size)
        padded = captured or size
        parts = arrays(work, padded, self.tables, self.block_size)
        logits, tokens = self._everywhere("run", parts, padded, captured is not None)
        places = zip(places_of(work, padded), work, strict=True)
        ending = {place: share.sequence for place, share in places if share.samples}
        return self._reply(work, ending, logits, tokens)

    @torch.inference_mode()
    def run(self, parts: dict[str, np.ndarray], size: Size, captured: bool) -> tuple[Tensor, Tensor]:
        """Computes a step on this rank, of which ``parts`` is all there is to know, and keeps the next token of every
        sequence on the device for the next step. ``captured``: whether there is a graph of ``size``.

        Returns logits [sequences, vocab] and the tokens sampled from them, [sequences] int64, good until the next step.
        """
        inputs = self._mailbox.send(parts)
        if len(inputs.new_blocks):
            self.tables.device.view(-1).index_copy_(0, inputs.new_places, inputs.new_blocks)
        if captured:
            logits, tokens = self._graphs.replay(size)
        else:
            lens = np.diff(parts["query_starts"]).tolist(), parts["contexts"].tolist()
            logits, tokens = self._forward(inputs, size, lens)
        if len(inputs.temperature):
            filters = inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p
            tokens = sample(logits, *filters, inputs.uniforms)
            self._last_tokens.index_copy_(0, inputs.rows, tokens)
        return logits, tokens

    def warm_up(self) -> None:
        """Pays for what only happens once: compiles kernels by running steps of several shapes, and captures graphs."""
        length = min(self.block_size, self.max_context - 1, self.blocks * self.block_size - 1)
        probe = Sequence(-1, [0] * (length + 1), length, 0, SamplingParams(), 0, 0.0, row=0)
        probe.blocks = list(range(-(-(length + 1) // self.block_size)))
        for tokens in (length, 1):
            self.launch([Work(probe, tokens)]).wait()
            probe.computed += tokens
        for size in self._graphs.sizes:
            self._everywhere("capture", size)

    def _everywhere(self, method: str, *args: Any) -> Any:
        """Calls one of the methods that all ranks must call alike: on the workers, if there are any, and here."""
        if self._workers is None:
            return getattr(self, method)(*args)
        with self._workers.together():
            self._workers.call(method, *args)
            return getattr(self, method)(*args)

    def _forward(
        self, inputs: StepInputs, size: Size, lens: tuple[list[int], list[int]], out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [sequences, vocab] of a step, in ``out`` if it is given, and the likeliest tokens [sequences], which
        are kept for the next; ``lens`` as in ``metadata``."""
        meta = metadata(inputs, self.tables, size, lens, self.deployment.attention == "triton")
        hidden = self.model(inputs.token_ids, inputs.positions, self.cache, meta, self._last_tokens)
        logits = self.model.logits(hidden[inputs.ends] if size.chunks else hidden, out)
        tokens = greedy(logits)
        self._last_tokens.index_copy_(0, inputs.rows, tokens)
        return logits, tokens

    def _reply(self, work: list[Work], ending: dict[int, Sequence], logits: Tensor, tokens: Tensor) -> Launched:
        """Starts the sampled tokens' way to the host."""
        if not ending:
            return Launched(work, ending, torch.empty(0, dtype=torch.int64), None, None)
        logprobs = gather_logprobs(logits, tokens, {place: each.sampling for place, each in ending.items()})
        if self.device.type != "cuda":
            return Launched(work, ending, tokens, logprobs, None, self._workers)
        self._replies.reverse()
        reply = self._replies[0][: len(tokens)]
        reply.copy_(tokens, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return Launched(work, ending, reply, logprobs, ready, self._workers)

    def _fit(self, size: Size) -> Size | None:
        """The captured size that a step is padded to, if there is one."""
        fitting = self._graphs.fit(size)
        return fitting if fitting in self._graphs else None

    @torch.inference_mode()
    def capture(self, size: Size) -> None:
        """Captures a step of padding alone."""
        parts = arrays([], size, self.tables, self.block_size)
        self._mailbox.send(parts)
        inputs, out = self._mailbox.where(parts), self._logits[: size.sequences]
        self._graphs.capture(size, lambda: self._forward(inputs, size, ([], []), out))

    def allocate(self, blocks: int, context: int) -> None:
        """The KV cache and everything of which there is one for as long as the runner lives."""
        deployment, shape, device = self.deployment, self.model.shape, self.device
        dtype = DTYPES[deployment.dtype]
        self.blocks = blocks
        self.cache = kv.allocate(shape, blocks, self.block_size, device, dtype)
        self.tables = BlockTables(deployment.max_batch, -(-context // self.block_size), device)
        most_tokens = max(deployment.token_budget, context) + 2 * deployment.max_batch
        self._mailbox = Mailbox(capacity_bytes(most_tokens, deployment.max_batch + CHUNKS, blocks), device)
        self._last_tokens = torch.zeros(deployment.max_batch + 1, dtype=torch.int64, device=device)
        pinned = device.type == "cuda"
        most = deployment.max_batch + CHUNKS
        self._replies = [torch.zeros(most, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        captured = max((size.sequences for size in self._graphs.sizes), default=0)
        self._logits = torch.zeros(captured, shape.vocab_size, dtype=dtype, device=device)

    @torch.inference_mode()
    def _activation_bytes(self, context: int) -> int:
        """Memory that the largest step takes beside weights and cache, measured by running one on CUDA."""
        if self.device.type != "cuda":
            return 0
        deployment, shape, dtype = self.deployment, self.model.shape, DTYPES[self.deployment.dtype]
        tokens = max(deployment.token_budget, deployment.max_batch, 0 if deployment.chunked_prefill else context)
        each = -(-min(tokens, context) // self.block_size)
        count = -(-tokens // (each * self.block_size))
        self.allocate(each * count, context)
        work = []
        for i in range(min(count, deployment.max_batch)):
            blocks = list(range(i * each, (i + 1) * each))
            length = min(tokens, context)
            work.append(
                Work(Sequence(-1, [0] * length, length, context, SamplingParams(), 0, 0.0, 0, blocks, i), length)
            )
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        size, parts = size_of(work), arrays(work, size_of(work), self.tables, self.block_size)
        lens = [share.tokens for share in work], [share.tokens for share in work]
        self._forward(self._mailbox.send(parts), size, lens)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        self.cache = []
        # PyTorch's kernels gather what decoding attends to: one layer's keys and values, twice for the copies.
        gathered = 2 * max(DECODE_BATCH_TOKENS, context) * kv.block_bytes(shape, 1, dtype) // shape.layers
        return peak + gathered + 4 * 4 * deployment.max_batch * shape.vocab_size


def _end(graphs: GraphPool, workers: Workers) -> None:
    graphs.clear()  # NCCL does not let go of what captured steps refer to
    workers.close()


def build_runner(checkpoint: Checkpoint, deployment: Deployment) -> Runner:
    """The runner of a deployment, with as many workers as it asks for. Raises UserError as Runner does, and where the
    model cannot be split, or one of the workers fails."""
    if deployment.tensor_parallel == 1:
        return Runner(checkpoint, deployment)
    workers = Workers(checkpoint, deployment, torch_device(deployment.device))
    try:
        with workers.together():
            return Runner(checkpoint, deployment, workers.parallel, workers)
    except BaseException:
        workers.close()
        raise


def captured_sizes(deployment: Deployment, device: torch.device, chunks: bool = True) -> list[Size]:
    """The sizes of steps to have graphs of: none on the CPU, and none with PyTorch's attention, which is not static.

    ``chunks``: whether steps with prompts are worth it; those of latent attention are faster when lengths are known.
    """
    if device.type != "cuda" or not deployment.cuda_graphs or deployment.attention != "triton":
        return []
    sizes = [Size(decodes) for decodes in decode_sizes(deployment.max_batch)]
    if chunks and deployment.batching == "continuous" and deployment.chunked_prefill:
        sizes += mixed_sizes(deployment.max_batch, deployment.token_budget)
    return sizes


def torch_device(name: str) -> torch.device:
    """'auto' is CUDA where there is one. Raises UserError for 'cuda' where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but torch finds no CUDA device here; use device 'cpu' or 'auto'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
