"""The KV cache: how large it may be, and its memory."""

from __future__ import annotations

import numpy as np
import psutil
import torch
from torch import Tensor

from labkit.errors import UserError
from labkit.models.shape import ModelShape

CPU_SHARE = 0.3
"""Of the memory that is free on a CPU machine; the rest is for activations and for whatever else runs there."""
CUDA_SHARE = 0.9
"""Of a GPU's memory, weights and activations included."""


def block_bytes(shape: ModelShape, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV block over all layers."""
    return shape.layers * shape.cache_planes * shape.cache_heads * block_size * shape.cache_width * dtype.itemsize


def count_blocks(free_bytes: int, per_block: int, most_tokens: int, block_size: int) -> int:
    """Blocks that fit in ``free_bytes``, but no more than ``most_tokens`` can fill. Raises UserError if none fits."""
    blocks = min(free_bytes // per_block, -(-most_tokens // block_size))
    if blocks < 1:
        raise UserError(
            f"no memory for the KV cache: a block takes {per_block:,} bytes, {max(free_bytes, 0):,} are free"
        )
    return int(blocks)


def free_bytes(device: torch.device, activation_bytes: int) -> int:
    """Memory that the KV cache may take, once the weights are there; ``activation_bytes`` is a step's need on CUDA."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return int(free - (1 - CUDA_SHARE) * total - activation_bytes)
    return int(CPU_SHARE * psutil.virtual_memory().available)


def allocate(shape: ModelShape, blocks: int, block_size: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """One tensor a layer, [planes, heads, blocks, block_size, width] of ``shape``'s cache, of finite values.

    On the CPU the pages come zeroed from the operating system, which commits one only when it is first written.
    """
    size = (shape.cache_planes, shape.cache_heads, blocks, block_size, shape.cache_width)
    if device.type == "cpu":
        bits = np.uint32 if dtype.itemsize == 4 else np.uint16
        return [torch.from_numpy(np.zeros(size, bits)).view(dtype) for _ in range(shape.layers)]
    return [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.layers)]
