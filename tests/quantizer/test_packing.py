"""The format v1 of a checkpoint against plain loops over bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from labkit.quantizer.gptq import quantize_matrix
from labkit.quantizer.grid import Grid
from labkit.quantizer.packing import pack, size_bytes, tensors_of, weight_of


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [r, columns] -> levels [r * 32 / bits, columns], number by number."""
    per_word = 32 // bits
    found = np.zeros((len(words) * per_word, words.shape[1]), dtype=int)
    for r in range(len(words)):
        for column in range(words.shape[1]):
            word = int(words[r, column]) & 0xFFFFFFFF
            for j in range(per_word):
                found[per_word * r + j, column] = (word >> (bits * j)) & (2**bits - 1)
    return found


@pytest.mark.parametrize("bits", [4, 8])
def test_pack_is_the_loop(bits: int) -> None:
    levels = torch.randint(2**bits, (64, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    words = pack(levels, bits)
    assert words.dtype == torch.int32 and words.shape == (64 * bits // 32, 5)
    np.testing.assert_array_equal(unpack(words.numpy(), bits), levels.numpy())


@pytest.mark.parametrize("bits, group", [(4, 32), (4, -1), (8, 64)])
def test_a_reader_gets_what_was_meant(bits: int, group: int) -> None:
    torch.manual_seed(2)
    x = torch.randn(300, 128)
    grid = Grid(bits, group)
    quantized = quantize_matrix(torch.randn(24, 128), x.T @ x / 150, grid)
    tensors = tensors_of("there", quantized, slice(8, 24))
    size = grid.group(128)
    assert {name: (tuple(each.shape), each.dtype) for name, each in tensors.items()} == {
        "there.qweight": ((128 * bits // 32, 16), torch.int32),
        "there.qzeros": ((128 // size, 16 * bits // 32), torch.int32),
        "there.scales": ((128 // size, 16), torch.float16),
        "there.g_idx": ((128,), torch.int32),
    }
    assert all(each.is_contiguous() for each in tensors.values())
    assert sum(each.nbytes for each in tensors.values()) == size_bytes(16, 128, grid)
    levels = unpack(tensors["there.qweight"].numpy(), bits)
    zeros = unpack(tensors["there.qzeros"].numpy().T, bits).T + 1  # v1 stores one less
    groups, scales = tensors["there.g_idx"].numpy(), tensors["there.scales"].numpy().astype(np.float32)
    assert groups.tolist() == [i // size for i in range(128)]
    read = np.zeros((16, 128), dtype=np.float32)
    for output in range(16):
        for i in range(128):
            read[output, i] = scales[groups[i], output] * np.float32(levels[i, output] - zeros[groups[i], output])
    np.testing.assert_array_equal(quantized.weight(torch.float32)[8:].numpy(), read)
    np.testing.assert_array_equal(weight_of("there", tensors, grid, torch.device("cpu"), torch.float32).numpy(), read)
    stored = tensors["there.qzeros"].numpy().view(np.uint32)
    assert set(stored.flatten().tolist()) == {0x77777777 if bits == 4 else 0x7F7F7F7F}
