"""The tensors of a quantised linear map in a checkpoint: GPTQ format v1, which every reader takes.

Of a map NAME of I inputs and O outputs in G groups, with 32 / bits = P levels in a word:

- ``NAME.qweight`` int32 [I / P, O]: level of input P r + j in bits ``bits * j`` and up of row r
- ``NAME.qzeros`` int32 [G, O / P]: the level of weight 0, of which v1 stores one less, packed along the outputs
- ``NAME.scales`` float16 [G, O]
- ``NAME.g_idx`` int32 [I]: the group of each input
"""

from __future__ import annotations

import torch
from torch import Tensor

from labkit.kernels.w4a16 import dequantize_checkpoint
from labkit.quantizer.gptq import Quantized
from labkit.quantizer.grid import Grid

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def tensors_of(stem: str, quantized: Quantized, outputs: slice) -> dict[str, Tensor]:
    """The four tensors of some of the outputs, on the CPU; ``stem`` is NAME."""
    grid, inputs = quantized.grid, len(quantized.levels)
    levels = quantized.levels[:, outputs]
    scales = quantized.scales[:, outputs]
    of_zeros = torch.full(scales.shape, grid.zero - 1, dtype=torch.uint8)
    found = (
        pack(levels, grid.bits).cpu(),
        pack(of_zeros.T.contiguous(), grid.bits).T,
        scales.cpu(),
        torch.arange(inputs, dtype=torch.int32) // grid.group(inputs),
    )
    return {f"{stem}.{suffix}": tensor.contiguous() for suffix, tensor in zip(SUFFIXES, found, strict=True)}


def weight_of(stem: str, tensors: dict[str, Tensor], grid: Grid, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The weight [outputs, inputs] that a reader makes of the four tensors."""
    qweight, qzeros, scales = (tensors[f"{stem}.{suffix}"].to(device) for suffix in SUFFIXES[:3])
    return dequantize_checkpoint(qweight, qzeros, scales, grid.bits, grid.group_size, dtype)


def pack(levels: Tensor, bits: int) -> Tensor:
    """uint8 levels [rows, columns] -> int32 [rows * bits / 32, columns], the first row in the lowest bits."""
    rows, columns = levels.shape
    if bits == 4:
        pairs = levels.reshape(rows // 2, 2, columns)
        levels = pairs[:, 0] | (pairs[:, 1] << 4)
    # Four bytes that follow each other are a word, the first the lowest, on every machine that torch runs on.
    in_bytes = levels.reshape(-1, 4, columns).transpose(1, 2).contiguous()
    return in_bytes.view(torch.int32).squeeze(-1)


def size_bytes(outputs: int, inputs: int, grid: Grid) -> int:
    """Of the four tensors of a map."""
    groups = inputs // grid.group(inputs)
    return outputs * (inputs + groups) * grid.bits // 8 + 2 * groups * outputs + 4 * inputs
