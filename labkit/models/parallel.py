"""Tensor parallelism: every rank holds a share of each layer's heads and inner dimensions, and sums once per half.

Megatron's split (arXiv 1909.08053): what goes into a half of a layer is split by columns, what comes out of it by rows,
so that the ranks' results add up to the whole. Embedding, norms, routers, latents and the output head are whole on
every rank, which makes every rank's hidden states and logits the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.distributed as dist
from torch import Tensor

from labkit.errors import UserError
from labkit.models.shape import ModelShape


@dataclass(frozen=True)
class Parallel:
    """This process's place among those that compute one model. The default is alone and adds no work.

    With more than one, ``torch.distributed`` must be initialised, and all ranks must take the same steps.
    """

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank {self.rank} is not one of {self.world}")

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def part(self, size: int) -> slice:
        """This rank's share of ``size`` rows or columns, which ``world`` must divide."""
        share = size // self.world
        return slice(self.rank * share, (self.rank + 1) * share)

    def kv_head_part(self, kv_heads: int) -> slice:
        """The key and value heads that this rank's query heads read: a share, or one that several ranks hold."""
        first = self.rank * kv_heads // self.world
        return slice(first, first + max(1, kv_heads // self.world))

    def share(self, shape: ModelShape) -> ModelShape:
        """The shape of this rank's part of the model. Raises UserError where it cannot be split evenly."""
        if self.world == 1:
            return shape
        sizes = {"attention heads": shape.heads, "intermediate size": shape.intermediate_size}
        if shape.experts:
            sizes["experts' intermediate size"] = shape.experts.intermediate_size
            sizes["shared experts' intermediate size"] = shape.experts.shared_size
        for name, size in sizes.items():
            if size % self.world:
                raise UserError(f"{size} {name} cannot be split over {self.world} processes")
        if not shape.latent and shape.kv_heads % self.world and self.world % shape.kv_heads:
            raise UserError(f"{shape.kv_heads} key heads can neither be split over {self.world} processes nor repeated")
        experts = shape.experts and replace(
            shape.experts,
            intermediate_size=shape.experts.intermediate_size // self.world,
            shared_size=shape.experts.shared_size // self.world,
        )
        return replace(
            shape,
            heads=shape.heads // self.world,
            kv_heads=max(1, shape.kv_heads // self.world),
            intermediate_size=shape.intermediate_size // self.world,
            experts=experts,
        )
