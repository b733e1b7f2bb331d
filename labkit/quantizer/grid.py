"""The grid of levels that a weight is rounded to, and the choice of its scales by rounding alone.

A weight is ``scale * (level - zero)`` with levels 0 to 2^bits - 1 and zero = 2^(bits - 1): at 4 bits 8 numbers below
zero and 7 above it, times the scale. A *group* of inputs that follow each other shares a scale for each output, and two
things are free in choosing it:

- **Its sign.** The side with 8 numbers goes to the weight that is largest in absolute value: w_max lands on the lowest
  level, scale = -w_max / zero, which is negative where w_max is positive. Readers multiply by whatever they find.
- **Its size.** A scale a little smaller clips w_max, and rounds all others more finely. ``CLIPS`` are tried, as factors
  of -w_max / zero, and the best by the loss is taken for each output alone.

In this file inputs come first, [inputs, outputs], as they do in the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.errors import UserError

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128, -1)
CLIPS = tuple(round(1.04 - 0.02 * step, 2) for step in range(20))
"""Above 1, too: a scale that is too large for w_max may suit the others better."""
BLOCK = 128
"""Inputs that are quantised before the rest hears of it; also the most whose covariance weighs a clip."""
_LARGEST = 65504.0
_PIECE = 2**26
"""Most elements of a temporary when groups are searched side by side."""


@dataclass(frozen=True)
class Grid:
    """``bits`` a weight, and a scale for each ``group_size`` inputs; -1: one for all."""

    bits: int = 4
    group_size: int = 128

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UserError(f"weights of {self.bits} bits are not supported; --bits is 4 or 8")
        if self.group_size not in GROUP_SIZES:
            raise UserError(f"--group-size {self.group_size} is not supported; it is 32, 64, 128, or -1 for no groups")

    @property
    def zero(self) -> int:
        """The level of weight 0."""
        return int(2 ** (self.bits - 1))

    @property
    def per_word(self) -> int:
        """Levels in 32 bits."""
        return 32 // self.bits

    def group(self, inputs: int) -> int:
        """Inputs that share a scale."""
        return inputs if self.group_size == -1 else self.group_size

    def check(self, name: str, outputs: int, inputs: int) -> None:
        """Raises UserError for a matrix that this grid or the checkpoint format cannot hold."""
        if inputs % self.group(inputs):
            fits = [str(size) for size in GROUP_SIZES if inputs % size == 0]
            raise UserError(
                f"--group-size {self.group_size} does not divide the {inputs} inputs of {name}; use {' or '.join(fits)}"
            )
        if inputs % self.per_word or outputs % self.per_word:
            raise UserError(
                f"{name} is {outputs} x {inputs}; the format packs {self.per_word} weights of {self.bits} bits to a "
                "word, which must divide both"
            )


def round_to_grid(values: Tensor, scales: Tensor, zero: int) -> Tensor:
    """The nearest levels less zero, as floats."""
    return (values / scales).round_().clamp_(-zero, zero - 1)


def as_stored(scales: Tensor) -> Tensor:
    """float32, rounded to what float16 holds. What becomes 0 there (a group of zeros) is 1: any scale is right then."""
    stored = scales.clamp(-_LARGEST, _LARGEST).half().float()
    return torch.where(stored == 0, 1.0, stored)


def candidates(values: Tensor, zero: int) -> Tensor:
    """Scales to try for groups of weights [..., inputs, outputs]: [clips, ..., outputs], the first one unclipped."""
    at = values.abs().argmax(-2, keepdim=True)
    widest = values.gather(-2, at).squeeze(-2) / -zero
    return torch.stack([as_stored(widest * clip) for clip in (1.0, *(clip for clip in CLIPS if clip != 1.0))])


def rounding_scales(weights: Tensor, hessian: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales for rounding to nearest, [groups, outputs] each: the best of the candidates, and the unclipped.

    weights: [inputs, outputs] float32. hessian: [inputs, inputs]. The loss of a group is what its rounding errors d add
    to the layer's output, d^T H d, with H cut down to blocks of BLOCK inputs along its diagonal.
    """
    inputs, outputs = weights.shape
    group = grid.group(inputs)
    block = min(group, BLOCK)
    if group % block:
        block = group
    blocks = torch.stack([hessian[at : at + block, at : at + block] for at in range(0, inputs, block)])
    best, plain = [], []
    step = max(1, _PIECE // (group * outputs))
    for first in range(0, inputs // group, step):
        last = min(first + step, inputs // group)
        part = weights[first * group : last * group].view(last - first, group, outputs)
        tried = candidates(part, grid.zero)
        weighing = blocks[first * group // block : last * group // block]
        best.append(_least(part, tried, weighing, grid.zero))
        plain.append(tried[0])
    return torch.cat(best), torch.cat(plain)


def _least(weights: Tensor, tried: Tensor, blocks: Tensor, zero: int) -> Tensor:
    """Of scales tried [clips, groups, outputs], for each output of each group the one with the least loss.

    weights: [groups, inputs, outputs]; blocks: [groups * blocks of a group, block, block].
    """
    chosen, least = tried[0], torch.full_like(tried[0], torch.inf)
    for scales in tried:
        each = scales[:, None]
        errors = torch.addcmul(weights, round_to_grid(weights, each, zero), each, value=-1)
        errors = errors.view(len(blocks), -1, weights.shape[-1])
        loss = (torch.bmm(blocks, errors) * errors).sum(1).view(len(weights), -1, weights.shape[-1]).sum(1)
        better = loss < least
        chosen, least = torch.where(better, scales, chosen), torch.where(better, loss, least)
    return chosen
