"""4-bit weights as the kernels read them: made from a GPTQ checkpoint once, when a model is loaded.

A tile is 16 outputs x 128 inputs in 1 KiB that lie together: int32 [16 outputs, 4 chunks, 4 words]. Half ``h`` (16
bits) of word ``j`` of chunk ``c`` holds the levels of inputs ``32 i + 8 c + 2 j + h`` in its bits ``4 i``, i = 0 to 3.
So ``(word >> 4 i) & 0x000f000f`` is a pair of levels where a pair of 16-bit numbers belongs, a chunk holds 4 times 8
inputs that follow each other, and no thread needs what another read.

Outputs are filled up to a multiple of 16 and inputs to one of 128, with weights of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

OUTPUTS, INPUTS = 16, 128
"""Of a tile."""
ZERO = 8
"""The level of weight 0 where a checkpoint is symmetric."""


@dataclass(frozen=True)
class Packed:
    """A weight [outputs, inputs] of 4 bits: scale * (level - zero), with a scale for each ``group`` inputs."""

    words: Tensor
    """int32 [tiles of outputs, tiles of inputs, 16, 16]."""
    scales: Tensor
    """float16 [tiles of outputs, groups, 16], as exact as in the checkpoint; some may be negative."""
    zeros: Tensor | None
    """float16, as the scales; None where every zero is 8. There is no kernel for other zeros."""
    outputs: int
    inputs: int
    group: int
    """32, 64 or 128: larger groups are kept as several of 128."""
    arrivals: Tensor
    """int32 [tiles of outputs], zeros before and after each product: how many programs have summed their inputs."""

    def to(self, device: torch.device | str) -> Packed:
        zeros = None if self.zeros is None else self.zeros.to(device)
        words, scales, arrivals = (each.to(device) for each in (self.words, self.scales, self.arrivals))
        return replace(self, words=words, scales=scales, zeros=zeros, arrivals=arrivals)


def pack(qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group_size: int) -> Packed:
    """From a checkpoint's tensors: GPTQ format v1, g_idx trivial.

    qweight: int32 [inputs / 8, outputs]; qzeros: int32 [groups, outputs / 8]; scales: [groups, outputs]. group_size: a
    multiple of 32, or -1 for the whole column. 8 bits have no kernels: see ``dequantize_checkpoint``.
    """
    if bits != 4:
        raise ValueError(f"kernels are for 4 bits, not {bits}")
    levels = _checkpoint_levels(qweight, bits).T
    zeros = _checkpoint_zeros(qzeros, bits, scales.shape[1])
    return pack_levels(levels, scales, None if bool((zeros == ZERO).all()) else zeros, group_size)


def pack_levels(levels: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> Packed:
    """levels: uint8 [outputs, inputs] from 0 to 15; scales: [groups, outputs]; zeros: the same, or None for 8."""
    outputs, inputs = levels.shape
    whole_column = group_size == -1 or group_size >= inputs
    group = next((size for size in (128, 64, 32) if whole_column or group_size % size == 0), 0)
    if not group:
        raise ValueError(f"group_size {group_size} is neither -1 nor a multiple of 32")
    rows, columns = -(-outputs // OUTPUTS), -(-inputs // INPUTS)
    padding = (0, columns * INPUTS - inputs, 0, rows * OUTPUTS - outputs)
    first = torch.arange(columns * INPUTS // group, device=scales.device) * group
    of_group = (first // (inputs if whole_column else group_size)).clamp(max=len(scales) - 1)
    return Packed(
        words=_words(F.pad(levels, padding, value=ZERO)),
        scales=_by_tile(scales, of_group, rows),
        zeros=None if zeros is None else _by_tile(zeros, of_group, rows),
        outputs=outputs,
        inputs=inputs,
        group=group,
        arrivals=_no_arrivals(rows, levels.device),
    )


def join(parts: Sequence[Packed]) -> Packed:
    """The outputs of several weights of the same inputs one after the other, as of query, key and value."""
    if len({(part.inputs, part.group) for part in parts}) != 1:
        raise ValueError("the parts differ in their inputs or their groups")
    first, outputs = parts[0], sum(part.outputs for part in parts)
    if all(part.outputs % OUTPUTS == 0 and part.zeros is None for part in parts):
        words, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("words", "scales"))
        return Packed(words, scales, None, outputs, first.inputs, first.group, _no_arrivals(len(words), words.device))
    levels = torch.cat([unpack_levels(part) for part in parts])
    scales, zeros = (torch.cat([_by_group(part, name) for part in parts], dim=1) for name in ("scales", "zeros"))
    return pack_levels(levels, scales, None if bool((zeros == ZERO).all()) else zeros, first.group)


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight [outputs, inputs], computed in float32 and rounded once."""
    return _scaled(
        unpack_levels(packed).T, _by_group(packed, "scales"), _by_group(packed, "zeros"), packed.group, dtype
    )


def dequantize_checkpoint(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The weight [outputs, inputs] of a checkpoint's tensors of 4 or 8 bits, as in ``pack``."""
    levels, zeros = _checkpoint_levels(qweight, bits), _checkpoint_zeros(qzeros, bits, scales.shape[1])
    return _scaled(levels, scales, zeros, len(levels) if group_size == -1 else group_size, dtype)


def _scaled(levels: Tensor, scales: Tensor, zeros: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """levels [inputs, outputs]; scales and zeros [groups, outputs]; the weight is [outputs, inputs]."""
    weight = torch.empty((levels.shape[1], len(levels)), dtype=dtype, device=levels.device)
    for at in range(0, len(levels), group):
        part = levels[at : at + group].float() - zeros[at // group].float()
        weight[:, at : at + group] = (part * scales[at // group].float()).T
    return weight


def _checkpoint_levels(qweight: Tensor, bits: int) -> Tensor:
    """uint8 [inputs, outputs]."""
    per_word = 32 // bits
    shifts = torch.arange(0, 32, bits, device=qweight.device, dtype=torch.int32)
    parts = [((qweight >> shift) & (2**bits - 1)).to(torch.uint8) for shift in shifts]
    return torch.stack(parts, dim=1).reshape(len(qweight) * per_word, qweight.shape[1])


def _checkpoint_zeros(qzeros: Tensor, bits: int, outputs: int) -> Tensor:
    """int32 [groups, outputs]: format v1 stores them less one."""
    shifts = torch.arange(0, 32, bits, device=qzeros.device, dtype=torch.int32)
    stored = (qzeros[:, :, None] >> shifts) & (2**bits - 1)
    return (stored.flatten(1) + 1)[:, :outputs]


def _no_arrivals(rows: int, device: torch.device) -> Tensor:
    return torch.zeros(rows, dtype=torch.int32, device=device)


def _words(levels: Tensor) -> Tensor:
    """uint8 [16 r, 128 c] -> int32 [r, c, 16, 16]."""
    rows, columns = levels.shape[0] // OUTPUTS, levels.shape[1] // INPUTS
    parts = levels.view(rows, OUTPUTS, columns, 4, 4, 4, 2)  # row, output, column, i, c, j, h
    nibbles = parts.permute(0, 2, 1, 4, 5, 6, 3).reshape(rows, columns, OUTPUTS, 16, 4, 2)
    packed: Tensor = (nibbles[..., 0] | (nibbles[..., 1] << 4)).contiguous().view(torch.int32)
    return packed.squeeze(-1)


def unpack_levels(packed: Packed) -> Tensor:
    """uint8 [outputs, inputs]: the inverse of ``_words``."""
    rows, columns = packed.words.shape[:2]
    halves = packed.words.unsqueeze(-1).view(torch.uint8)
    nibbles = torch.stack((halves & 15, halves >> 4), dim=-1)
    parts = nibbles.view(rows, columns, OUTPUTS, 4, 4, 2, 4)  # row, column, output, c, j, h, i
    levels = parts.permute(0, 2, 1, 6, 3, 4, 5).reshape(rows * OUTPUTS, columns * INPUTS)
    return levels[: packed.outputs, : packed.inputs]


def _by_tile(values: Tensor, of_group: Tensor, rows: int) -> Tensor:
    """[groups of the checkpoint, outputs] -> float16 [rows, groups, 16]."""
    taken = F.pad(values[of_group].to(torch.float16), (0, rows * OUTPUTS - values.shape[1]))
    return taken.view(len(of_group), rows, OUTPUTS).transpose(0, 1).contiguous()


def _by_group(packed: Packed, name: str) -> Tensor:
    """The scales or zeros as [groups, outputs]."""
    values = getattr(packed, name)
    if values is None:
        values = torch.full_like(packed.scales, ZERO)
    return values.transpose(0, 1).flatten(1)[:, : packed.outputs]
