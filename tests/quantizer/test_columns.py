"""A block of inputs against a plain loop, and the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from labkit.quantizer.columns import Block, round_block, round_block_reference, round_block_triton
from labkit.quantizer.grid import candidates

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(inputs: int, outputs: int, tried: int, seed: int = 0) -> tuple[Tensor, ...]:
    """The arguments of ``round_block`` but the last."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(inputs, outputs, generator=generator)
    current = weights + 0.2 * torch.randn(inputs, outputs, generator=generator)
    factor = torch.randn(inputs, 2 * inputs, generator=generator)[:, :inputs] * 0.3  # rows that lie apart
    importance = torch.rand(inputs, generator=generator) + 0.1
    scales = candidates(current, 8)[:tried]
    return tuple(each.to(DEVICE) for each in (current, weights, factor, importance, scales))


def by_hand(current: Tensor, weights: Tensor, factor: Tensor, importance: Tensor, scales: Tensor, zero: int) -> Block:
    """Number by number in float64."""
    now, before = current.double().cpu().tolist(), weights.double().cpu().tolist()
    factors, weighing = factor.double().cpu().tolist(), importance.double().cpu().tolist()
    inputs, outputs = current.shape
    levels = [[0] * outputs for _ in range(inputs)]
    changes = [[0.0] * outputs for _ in range(inputs)]
    chosen = []
    for output in range(outputs):
        best = (float("inf"), 0.0, [], [])
        for scale in scales[:, output].double().cpu().tolist():
            values = [now[j][output] for j in range(inputs)]
            level, change, lost = [0] * inputs, [0.0] * inputs, 0.0
            for j in reversed(range(inputs)):
                level[j] = min(max(round(values[j] / scale), -zero), zero - 1)
                lost += weighing[j] * (values[j] - scale * level[j]) ** 2
                change[j] = before[j][output] - scale * level[j]
                for k in range(j):
                    values[k] += factors[j][k] * change[j]
            if lost < best[0]:
                best = (lost, scale, level, change)
        chosen.append(best[1])
        for j in range(inputs):
            levels[j][output], changes[j][output] = best[2][j], best[3][j]
    return Block(torch.tensor(levels), torch.tensor(changes), torch.tensor(chosen))


def same(found: Block, expected: Block) -> None:
    assert found.levels.dtype == torch.int8
    assert torch.equal(found.levels.cpu().int(), expected.levels.cpu().int())
    torch.testing.assert_close(found.changes.cpu(), expected.changes.cpu().float(), atol=1e-5, rtol=1e-5)
    assert torch.equal(found.scales.cpu(), expected.scales.cpu().float())


@pytest.mark.parametrize("inputs, outputs, tried, zero", [(1, 3, 2, 8), (7, 5, 20, 8), (32, 9, 5, 128)])
def test_a_block_is_the_loop(inputs: int, outputs: int, tried: int, zero: int) -> None:
    arguments = drawn(inputs, outputs, tried)
    same(round_block(*arguments, zero), by_hand(*arguments, zero))


def test_the_reference_cuts_its_work_without_changing_it() -> None:
    arguments = drawn(128, 700, 20)
    whole = round_block_reference(*arguments, 8)
    one = round_block_reference(*(each[..., 600:601] for each in arguments[:2]), *arguments[2:4],
                                arguments[4][:, 600:601], 8)  # fmt: skip
    assert torch.equal(whole.levels[:, 600:601], one.levels) and torch.equal(whole.scales[600:601], one.scales)


@pytest.mark.parametrize("inputs, outputs, tried, zero", [(16, 20, 3, 8), (13, 16, 1, 8), (8, 40, 4, 128)])
def test_the_kernel_does_what_the_reference_does(inputs: int, outputs: int, tried: int, zero: int) -> None:
    current, weights, factor, importance, scales = drawn(inputs, outputs, tried, seed=1)
    expected = round_block_reference(current, weights, factor, importance, scales, zero)
    columns_first = factor.T.contiguous().T  # as factorisations return it
    for each in (factor, columns_first):
        same(round_block_triton(current, weights, each, importance, scales, zero), expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("inputs, outputs", [(128, 5000), (32, 777)])
def test_the_kernel_at_full_size(inputs: int, outputs: int) -> None:
    arguments = drawn(inputs, outputs, 20, seed=2)
    found, expected = round_block_triton(*arguments, 8), round_block_reference(*arguments, 8)
    # fused multiply-adds round otherwise: where a value lies between two levels, all that follows may differ
    assert float((found.scales == expected.scales).float().mean()) > 0.98
    alike = (found.scales == expected.scales) & (found.levels == expected.levels).all(0)
    assert float(alike.float().mean()) > 0.98
