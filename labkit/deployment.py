"""A deployment: every knob of how a model is served, in one frozen dataclass."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

SHIPPED_MODEL = str(Path(__file__).resolve().parent.parent / "data" / "models" / "ledger-r1")


@dataclass(frozen=True)
class Deployment:
    """How a model is served. Two deployments are compared fairly when they differ in one field.

    Fields are checked on construction; a wrong value raises ValueError naming the field and what it may be.
    """

    model: str = SHIPPED_MODEL
    """A Hugging Face directory or hub id."""
    engine: Literal["transformers", "labkit"] = "labkit"
    """``transformers`` serves with ``generate`` in static padded batches, ``labkit`` with this project's engine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    random_weights: bool = False
    """Whether the weights are made up, so that the speed of a shape can be measured where its weights cannot be had."""
    quantization: Literal["none", "int4"] = "none"
    """``int4`` rounds the weights of the linear maps to the nearest of 4 bits when they are loaded, in groups of 128
    inputs that share a scale, or of 64 or 32 where those alone divide (``labkit`` engine only). A checkpoint that is
    quantised already, in GPTQ format, is recognised and takes ``none``."""
    int8_head: bool = False
    """Whether the output head's weights are rounded to 8 bits, with a scale for each token of the vocabulary
    (``labkit`` engine only)."""
    attention: Literal["eager", "sdpa", "triton"] = "triton"
    """``eager`` materialises the scores (``transformers`` engine only), ``sdpa`` is PyTorch's fused kernels, ``triton``
    this project's kernels, which read the paged KV cache where it lies (on CUDA; elsewhere the same as ``sdpa``)."""
    batching: Literal["static", "dynamic", "continuous"] = "continuous"
    """Static: whatever waits, up to ``max_batch``, runs to its end. Dynamic: the same, after waiting up to
    ``batch_window_ms`` for a full batch. Continuous: requests join and leave at every step."""
    max_batch: int = 256
    """Most requests in one step."""
    batch_window_ms: float = 50.0
    token_budget: int = 2048
    """Most tokens in one step under continuous batching (prefill chunks and decode together)."""
    chunked_prefill: bool = True
    """Whether a prompt may be split over steps and mixed with decode; if not, prompts are prefilled whole, in steps of
    their own."""
    kv_block_size: int = 16
    """Tokens in one KV block."""
    kv_blocks: int | None = None
    """KV blocks in all; None sizes them from the memory that is free."""
    max_context: int | None = None
    """Most tokens of prompt and answer together; None takes the model's own limit."""
    prefix_cache: bool = False
    """Whether KV blocks of prompts that begin alike are computed once and shared."""
    cuda_graphs: bool = True
    """Whether steps are replayed from captured CUDA graphs instead of launched kernel by kernel (CUDA only)."""
    async_scheduling: bool | None = None
    """Whether the next step is prepared and launched while the device computes this one. None: on CUDA."""
    tensor_parallel: int = 1
    """Processes, one a GPU, that share every layer of the model (``labkit`` engine only)."""
    max_queue: int | None = None
    """Requests that may wait before new ones are refused with 429; None admits all."""
    transport: Literal["http/1.1", "http/1.1 close", "http/2", "http/2 tls", "http/3", "grpc"] = "http/1.1"
    """How answers travel. ``http/1.1 close`` opens a connection for every request, ``http/2`` is cleartext with prior
    knowledge, ``http/2 tls`` is agreed on by ALPN, ``http/3`` goes over QUIC (needs ``labkit[http3]``), with HTTP/2 and
    HTTP/1.1 under TLS beside it on the TCP port of the same number, ``grpc`` is the service of
    ``labkit/wire/generation.proto``."""
    chunk_tokens: int = 1
    """Tokens of a stream that are sent together."""
    chunk_ms: float = 0.0
    """How long after its first token a chunk is sent although ``chunk_tokens`` are not there; 0 waits for them."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            if getattr(hint, "__origin__", None) is Literal and value not in get_args(hint):
                raise ValueError(f"{field.name} must be one of {', '.join(get_args(hint))}; got {value!r}")
            if hint is bool and not isinstance(value, bool):
                raise ValueError(f"{field.name} must be true or false; got {value!r}")
        if self.async_scheduling not in (None, True, False):
            raise ValueError(f"async_scheduling must be true, false or absent; got {self.async_scheduling!r}")
        ones = ("max_batch", "token_budget", "kv_block_size", "kv_blocks", "tensor_parallel", "chunk_tokens")
        for name, least in (dict.fromkeys(ones, 1) | {"max_context": 2}).items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}")
        if self.max_queue is not None and self.max_queue < 0:
            raise ValueError(f"max_queue must be at least 0 or absent; got {self.max_queue!r}")
        if not 0 <= self.batch_window_ms <= 60_000:
            raise ValueError(f"batch_window_ms must be between 0 and 60000; got {self.batch_window_ms!r}")
        if not 0 <= self.chunk_ms <= 60_000:
            raise ValueError(f"chunk_ms must be between 0 and 60000; got {self.chunk_ms!r}")
        if self.engine == "labkit" and self.attention == "eager":
            raise ValueError("attention 'eager' belongs to the transformers engine; use 'sdpa' or 'triton'")
        if self.engine == "transformers" and self.attention == "triton":
            raise ValueError("attention 'triton' belongs to the labkit engine; use 'eager' or 'sdpa'")
        if self.engine == "transformers" and self.batching != "static":
            raise ValueError("the transformers engine batches statically; batching must be 'static'")
        if self.engine == "transformers" and self.tensor_parallel != 1:
            raise ValueError("tensor_parallel belongs to the labkit engine")
        if self.engine == "transformers" and (self.quantization != "none" or self.int8_head):
            raise ValueError("quantization and int8_head belong to the labkit engine")

    @classmethod
    def as_first_deployed(cls, model: str = SHIPPED_MODEL, **knobs: Any) -> Deployment:
        """The bank's first deployment: ``transformers`` ``generate``, eager attention, float32, static batches of up to
        32 padded to the longest, one at a time, HTTP/1.1, no admission control."""
        first = cls(
            model=model,
            engine="transformers",
            dtype="float32",
            attention="eager",
            batching="static",
            max_batch=32,
            chunked_prefill=False,
            prefix_cache=False,
            cuda_graphs=False,
            async_scheduling=False,
        )
        return replace(first, **knobs)

    @classmethod
    def at_full_speed(cls, model: str = SHIPPED_MODEL, **knobs: Any) -> Deployment:
        """Where the ladder ends on a GPU: everything on, with sizes for a large one."""
        best = cls(
            model=model,
            device="cuda",
            dtype="bfloat16",
            async_scheduling=True,
            prefix_cache=True,
            max_batch=1024,
            token_budget=8192,
            kv_block_size=64,
        )
        return replace(best, **knobs)

    def differs_in(self, other: Deployment) -> dict[str, tuple[Any, Any]]:
        """The knobs in which two deployments differ: name -> (here, there)."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Deployment:
        """Raises ValueError for text that is no JSON object or names a knob that does not exist."""
        try:
            knobs = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a deployment is a JSON object; {error}") from error
        if not isinstance(knobs, dict):
            raise ValueError("a deployment is a JSON object of knob: value")
        unknown = set(knobs) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"no such knob: {', '.join(sorted(unknown))}")
        return cls(**knobs)
