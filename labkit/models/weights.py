"""Which tensor of a checkpoint goes where in a model, and weights that are made up."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from labkit.models.parallel import Parallel
from labkit.models.shape import ExpertsShape, LatentShape, ModelShape

ALL = slice(None)
RANDOM_STD = 0.02
"""Standard deviation of weights that are made up: what published models are initialised with."""


class Place(NamedTuple):
    """Where a checkpoint's tensor goes. Fused parameters take several tensors."""

    parameter: str
    shape: tuple[int, ...]
    """Of the checkpoint's tensor: [rows] or [rows, columns]."""
    first: int = 0
    """Where in the parameter its rows begin."""
    rows: slice = ALL
    """The rows of the tensor that this rank holds; so, too, ``columns``."""
    columns: slice = ALL
    expert: int | None = None
    """Which of a stacked parameter's matrices is meant."""

    @property
    def part(self) -> tuple[slice, ...]:
        """The index that takes this rank's part of the tensor."""
        return (self.rows, self.columns)[: len(self.shape)]


def checkpoint_places(shape: ModelShape, parallel: Parallel) -> dict[str, Place]:
    """Tensor name in a published checkpoint -> its place in ``Decoder(shape, parallel)``, of every parameter."""
    places = {
        "model.embed_tokens.weight": Place("embed", (shape.vocab_size, shape.hidden_size)),
        "model.norm.weight": Place("norm.weight", (shape.hidden_size,)),
    }
    if not shape.tied:
        places["lm_head.weight"] = Place("head", (shape.vocab_size, shape.hidden_size))
    for i in range(shape.layers):
        here, there = f"layers.{i}.", f"model.layers.{i}."
        places[f"{there}input_layernorm.weight"] = Place(f"{here}attention.norm.weight", (shape.hidden_size,))
        places[f"{there}post_attention_layernorm.weight"] = Place(f"{here}mlp.norm.weight", (shape.hidden_size,))
        if shape.latent:
            places |= _latent(f"{here}attention.", f"{there}self_attn.", shape, shape.latent, parallel)
        else:
            places |= _grouped(f"{here}attention.", f"{there}self_attn.", shape, parallel)
        if shape.experts and i >= shape.experts.dense_layers:
            places |= _experts(f"{here}mlp.", f"{there}mlp.", shape.hidden_size, shape.experts, parallel)
        else:
            places |= _mlp(f"{here}mlp.", f"{there}mlp.", shape.hidden_size, shape.intermediate_size, parallel)
    return places


def may_be_ignored(name: str, shape: ModelShape, parallel: Parallel) -> bool:
    """Whether a checkpoint may hold a tensor of this name although the model has no place for it."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and shape.layers <= int(layer[1]) < shape.layers + shape.extra_layers:
        return True
    if parallel.rank > 0 and shape.out_bias and name.endswith("self_attn.o_proj.bias"):
        return True
    return name.endswith("rotary_emb.inv_freq") or (shape.tied and name == "lm_head.weight")


def random_tensors(places: dict[str, Place], device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """A tensor for each place, made on ``device``: norms of one, all else normal. A name's values are the same for
    every rank, so that ranks hold parts of one model."""
    generator = torch.Generator(device)
    for name, place in places.items():
        tensor = torch.empty(place.shape, device=device, dtype=dtype)
        if name.endswith("norm.weight"):
            yield name, tensor.fill_(1)
        else:
            generator.manual_seed(zlib.crc32(name.encode()))
            yield name, tensor.normal_(0, RANDOM_STD, generator=generator)


def _grouped(here: str, there: str, shape: ModelShape, parallel: Parallel) -> dict[str, Place]:
    heads, kv_heads = parallel.part(shape.heads), parallel.kv_head_part(shape.kv_heads)
    places, first = {}, 0
    for letter, count, part in (
        ("q", shape.heads, heads),
        ("k", shape.kv_heads, kv_heads),
        ("v", shape.kv_heads, kv_heads),
    ):
        rows = slice(part.start * shape.head_dim, part.stop * shape.head_dim)
        size = count * shape.head_dim
        places[f"{there}{letter}_proj.weight"] = Place(f"{here}qkv.weight", (size, shape.hidden_size), first, rows)
        if shape.qkv_bias:
            places[f"{there}{letter}_proj.bias"] = Place(f"{here}qkv.bias", (size,), first, rows)
        first += rows.stop - rows.start
    width = shape.heads * shape.head_dim
    places[f"{there}o_proj.weight"] = Place(
        f"{here}out.weight", (shape.hidden_size, width), columns=parallel.part(width)
    )
    if shape.out_bias and parallel.rank == 0:
        places[f"{there}o_proj.bias"] = Place(f"{here}out.bias", (shape.hidden_size,))
    if shape.head_norms:
        for letter in "qk":
            places[f"{there}{letter}_norm.weight"] = Place(f"{here}{letter}_norm.weight", (shape.head_dim,))
    return places


def _latent(here: str, there: str, shape: ModelShape, latent: LatentShape, parallel: Parallel) -> dict[str, Place]:
    queries = shape.heads * latent.query_dim
    expanded, values = shape.heads * (latent.plain_dim + latent.value_dim), shape.heads * latent.value_dim
    narrow = latent.rank + latent.rotary_dim
    rows = parallel.part(queries)
    compress = f"{here}compress.weight"
    if latent.query_rank:
        places = {
            f"{there}q_a_proj.weight": Place(compress, (latent.query_rank, shape.hidden_size)),
            f"{there}q_a_layernorm.weight": Place(f"{here}q_norm.weight", (latent.query_rank,)),
            f"{there}q_b_proj.weight": Place(f"{here}q_expand.weight", (queries, latent.query_rank), rows=rows),
        }
        first = latent.query_rank
    else:
        places = {f"{there}q_proj.weight": Place(compress, (queries, shape.hidden_size), rows=rows)}
        first = rows.stop - rows.start
    return places | {
        f"{there}kv_a_proj_with_mqa.weight": Place(compress, (narrow, shape.hidden_size), first),
        f"{there}kv_a_layernorm.weight": Place(f"{here}kv_norm.weight", (latent.rank,)),
        f"{there}kv_b_proj.weight": Place(f"{here}kv_expand", (expanded, latent.rank), rows=parallel.part(expanded)),
        f"{there}o_proj.weight": Place(f"{here}out.weight", (shape.hidden_size, values), columns=parallel.part(values)),
    }


def _mlp(
    here: str, there: str, hidden: int, inner: int, parallel: Parallel, expert: int | None = None
) -> dict[str, Place]:
    part = parallel.part(inner)
    dot = ".weight" if expert is None else ""
    gate_up, down = f"{here}gate_up{dot}", f"{here}down{dot}"
    return {
        f"{there}gate_proj.weight": Place(gate_up, (inner, hidden), rows=part, expert=expert),
        f"{there}up_proj.weight": Place(gate_up, (inner, hidden), part.stop - part.start, part, expert=expert),
        f"{there}down_proj.weight": Place(down, (hidden, inner), columns=part, expert=expert),
    }


def _experts(here: str, there: str, hidden: int, experts: ExpertsShape, parallel: Parallel) -> dict[str, Place]:
    places = {f"{there}gate.weight": Place(f"{here}router", (experts.count, hidden))}
    if experts.correction:
        places[f"{there}gate.e_score_correction_bias"] = Place(f"{here}correction", (experts.count,))
    for i in range(experts.count):
        places |= _mlp(here, f"{there}experts.{i}.", hidden, experts.intermediate_size, parallel, i)
    if experts.shared_size:
        places |= _mlp(f"{here}shared.", f"{there}shared_experts.", hidden, experts.shared_size, parallel)
    return places
