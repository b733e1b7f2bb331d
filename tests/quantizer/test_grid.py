"""Scales by rounding: the search against a plain loop, signs, and what the grid refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from labkit.errors import UserError
from labkit.quantizer.grid import CLIPS, Grid, as_stored, candidates, round_to_grid, rounding_scales


def loop_search(group: np.ndarray, hessian: np.ndarray, zero: int) -> float:
    """The scale of one group of one output."""
    widest = max(group, key=abs) / -zero
    best, least = 0.0, float("inf")
    for clip in (1.0, *(clip for clip in CLIPS if clip != 1.0)):
        scale = float(np.float32(np.float16(widest * clip)))
        error = np.array([w - scale * min(max(round(w / scale), -zero), zero - 1) for w in group])
        lost = float(error @ hessian @ error)
        if lost < least:
            best, least = scale, lost
    return best


@pytest.mark.parametrize("bits, group", [(4, 32), (4, 64), (8, 32), (4, -1)])
def test_the_clip_search_is_the_loop(bits: int, group: int) -> None:
    rng = np.random.default_rng(1)
    inputs, outputs = 128, 6
    weights = rng.normal(size=(inputs, outputs))
    x = rng.normal(size=(500, inputs)) @ rng.normal(size=(inputs, inputs))
    hessian = x.T @ x / 500
    grid = Grid(bits, group)
    best, plain = rounding_scales(torch.from_numpy(weights).float(), torch.from_numpy(hessian).float(), grid)
    size = grid.group(inputs)
    for g in range(inputs // size):
        rows = slice(g * size, (g + 1) * size)
        for output in range(outputs):
            assert float(best[g, output]) == loop_search(weights[rows, output], hessian[rows, rows], grid.zero)
            widest = max(weights[rows, output], key=abs)
            assert float(plain[g, output]) == pytest.approx(-widest / grid.zero, rel=1e-3)


def test_whole_columns_are_weighed_in_blocks() -> None:
    weights, hessian = torch.randn(256, 3), torch.eye(256)
    hessian[0, 200] = hessian[200, 0] = 1e6  # between two blocks of 128: not looked at
    assert torch.equal(
        rounding_scales(weights, hessian, Grid(4, -1))[0], rounding_scales(weights, torch.eye(256), Grid(4, -1))[0]
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_weight_lies_on_the_lowest_level(sign: int) -> None:
    weights = torch.tensor([[0.1], [sign * 0.8], [-sign * 0.7], [0.0]])
    scale = candidates(weights, 8)[0]
    assert float(scale) == pytest.approx(-sign * 0.1, rel=1e-3)
    assert round_to_grid(weights, scale, 8).flatten().tolist() == [-sign * 1.0, -8.0, 7.0, 0.0]


def test_scales_are_what_the_file_holds() -> None:
    scales = torch.tensor([0.1, 1e-9, -1e-9, 1e9, -3.0001])
    assert as_stored(scales).tolist() == [float(np.float16(0.1)), 1.0, 1.0, 65504.0, -3.0]


@pytest.mark.parametrize("bits, group, words", [(3, 128, "--bits"), (4, 100, "--group-size"), (4, 0, "--group-size")])
def test_grids_that_there_are_not(bits: int, group: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Grid(bits, group)


def test_matrices_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="does not divide the 96 inputs of mlp.down; use 32 or -1"):
        Grid(4, 64).check("mlp.down", 64, 96)
    with pytest.raises(UserError, match="packs 8 weights"):
        Grid(4, -1).check("out", 12, 96)
    Grid(8, -1).check("out", 12, 100)
