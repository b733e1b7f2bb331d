"""GPTQ against the update as Frantar et al. write it, a column at a time with the explicit inverse of what remains."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from labkit.quantizer.gptq import DAMPING, Quantized, loss, quantize_matrix
from labkit.quantizer.grid import CLIPS, Grid
from labkit.quantizer.order import act_order


def matrix(outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and the Hessian of inputs that are correlated and of different sizes."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(inputs, inputs)) * np.exp(rng.normal(size=inputs))
    x = rng.normal(size=(4 * inputs, inputs)) @ mixing
    weight = rng.normal(size=(outputs, inputs)) * 0.02
    return torch.from_numpy(weight).float(), torch.from_numpy(2 / len(x) * x.T @ x).float()


def stored(scale: float) -> float:
    return float(np.float32(np.float16(scale))) or 1.0


def exact_order(hessian: np.ndarray, group: int) -> list[int]:
    """The most important group first, the most important input of it first."""
    diagonal = np.diagonal(hessian)
    groups = [list(range(at, at + group)) for at in range(0, len(diagonal), group)]
    groups.sort(key=lambda each: -max(diagonal[each]))
    return [i for each in groups for i in sorted(each, key=lambda i: -diagonal[i])]


def exact_columns(
    row: np.ndarray, hessian: np.ndarray, columns: list[int], scale: float, zero: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Rounds ``columns`` of a row in their order, each error spread over all columns that are not yet rounded by the
    inverse of their own Hessian. ``row`` holds zeros of no meaning where a column was rounded before (nan marks it).

    Returns the row as updated, levels of the columns, and the loss that was added.
    """
    row, levels, lost = row.copy(), [], 0.0
    open_columns = [i for i in range(len(row)) if not np.isnan(row[i])]
    for j in columns:
        inverse = np.linalg.inv(hessian[np.ix_(open_columns, open_columns)])
        at = open_columns.index(j)
        level = np.clip(np.round(row[j] / scale), -zero, zero - 1)
        error = (row[j] - scale * level) / inverse[at, at]
        lost += (row[j] - scale * level) * error
        row[open_columns] -= error * inverse[at]
        row[j] = np.nan
        open_columns.remove(j)
        levels.append(level)
    return row, np.array(levels), lost


def exact_gptq(weight: Tensor, hessian: Tensor, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Levels [outputs, inputs], less zero, and scales [outputs, groups], all in float64 and every row alone."""
    h = hessian.double().numpy()
    h = h + DAMPING * np.diagonal(h).mean() * np.eye(len(h))
    group = grid.group(len(h))
    order = exact_order(h, group)
    levels, scales = np.zeros(weight.shape), np.zeros((len(weight), len(h) // group))
    for output, row in enumerate(weight.double().numpy()):
        for at in range(0, len(h), group):
            columns = order[at : at + group]
            widest = max((row[j] for j in sorted(columns)), key=abs) / -grid.zero
            tried = [stored(widest * clip) for clip in (1.0, *(clip for clip in CLIPS if clip != 1.0))]
            found = [(exact_columns(row, h, columns, scale, grid.zero), scale) for scale in tried]
            (row, of_group, _), scale = min(found, key=lambda each: each[0][2])
            levels[output, columns], scales[output, order[at] // group] = of_group, scale
    return levels, scales


@pytest.mark.parametrize("bits, group, inputs", [(4, 32, 64), (4, 32, 96), (8, 32, 64)])
def test_it_does_what_the_exact_update_does(bits: int, group: int, inputs: int) -> None:
    weight, hessian = matrix(8, inputs)
    grid = Grid(bits, group)
    found = quantize_matrix(weight, hessian, grid)
    levels, scales = exact_gptq(weight, hessian, grid)
    np.testing.assert_array_equal(found.levels.T.numpy().astype(int) - grid.zero, levels)
    np.testing.assert_array_equal(found.scales.T.double().numpy(), scales)


def test_one_scale_for_a_whole_row_is_that_of_rounding_and_the_update_is_exact_over_several_blocks() -> None:
    weight, hessian = matrix(4, 160)
    grid = Grid(4, -1)
    found = quantize_matrix(weight, hessian, grid)
    assert found.scales.shape == (1, 4)
    h = hessian.double().numpy()
    h = h + DAMPING * np.diagonal(h).mean() * np.eye(160)
    for output, row in enumerate(weight.double().numpy()):
        _, levels, _ = exact_columns(row, h, exact_order(h, 160), float(found.scales[0, output]), grid.zero)
        mine = found.levels[:, output].numpy().astype(int) - grid.zero
        np.testing.assert_array_equal(mine[exact_order(h, 160)], levels)


def error_of(found: Quantized, weight: Tensor, hessian: Tensor) -> float:
    change = weight.double() - found.weight(torch.float32).double()
    h = hessian.double()
    return float(torch.trace(change @ h @ change.T) / torch.trace(weight.double() @ h @ weight.double().T))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_it_is_better_than_rounding_and_tells_its_errors(bits: int, group: int) -> None:
    weight, hessian = matrix(24, 256, seed=3)
    found = quantize_matrix(weight, hessian, Grid(bits, group))
    assert found.levels.shape == (256, 24) and found.levels.dtype == torch.uint8 and int(found.levels.max()) < 2**bits
    assert found.scales.shape == (1 if group == -1 else 256 // group, 24) and found.scales.dtype == torch.float16
    assert found.error == pytest.approx(error_of(found, weight, hessian), rel=1e-3)
    assert found.error < 0.7 * found.rtn_error and not found.worse and found.fallback is None
    assert found.clip_gain >= 1 if bits == 4 else found.clip_gain > 0.9


def test_the_order_keeps_groups_whole_and_ends_with_what_weighs_most() -> None:
    importance = torch.tensor([1.0, 5.0, 3.0, 2.0, 9.0, 0.0, 4.0, 4.0])
    assert act_order(importance, 2).tolist() == [3, 2, 6, 7, 0, 1, 5, 4]
    assert act_order(importance, 8).tolist() == [5, 0, 3, 2, 6, 7, 1, 4]


def test_loss_is_the_trace() -> None:
    weight, hessian = matrix(5, 32)
    change = weight.double()
    assert loss(weight.T.contiguous(), hessian) == pytest.approx(
        float(torch.trace(change @ hessian.double() @ change.T)), rel=1e-5
    )


def nearest(weight: Tensor, found: Quantized) -> Tensor:
    scales = found.scales.float().repeat_interleave(len(found.levels) // len(found.scales), 0)
    zero = found.grid.zero
    return (weight.T / scales).round().clamp(-zero, zero - 1) + zero


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda h: h.zero_(), "no calibration token"),
        (lambda h: h.fill_(float("nan")), "not finite"),
        (lambda h: h.fill_(float("inf")), "not finite"),
        (lambda h: h.sub_(2 * h.diagonal().max()).fill_diagonal_(1.0), "could not be factorised"),
    ],
)
def test_where_the_hessian_is_of_no_use_it_rounds_to_nearest_and_says_why(spoil, reason) -> None:
    weight, hessian = matrix(8, 64)
    spoil(hessian)
    found = quantize_matrix(weight, hessian, Grid(4, 32))
    assert found.fallback is not None and reason in found.fallback
    assert not found.worse and found.error != pytest.approx(-1)
    assert torch.equal(found.levels.float(), nearest(weight, found))
    if reason.startswith("no"):
        assert math.isnan(found.error)


def test_weights_of_zero_stay_zero_and_dead_inputs_do_no_harm() -> None:
    weight, hessian = matrix(8, 64)
    found = quantize_matrix(torch.zeros(8, 64), hessian, Grid(4, 32))
    assert float(found.weight(torch.float32).abs().max()) == 0 and found.error == 0 and not found.worse
    hessian[:40] = 0
    hessian[:, :40] = 0
    found = quantize_matrix(weight, hessian, Grid(4, 32))
    assert found.fallback is None and not found.worse
    # what never has an input is still rounded near to what it was: other text may use it
    step = found.scales.float().abs().max()
    assert float((found.weight(torch.float32) - weight)[:, :32].abs().max()) < 2 * step


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("group", [32, -1])
def test_inputs_that_are_not_correlated_leave_nothing_to_make_good(group: int, seed: int) -> None:
    weight, _ = matrix(16, 64)
    hessian = torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(seed)) + 0.1)
    found = quantize_matrix(weight, hessian, Grid(4, group), damping=0)
    assert found.error == pytest.approx(found.rtn_error, rel=1e-6)
    assert torch.equal(found.levels.float(), nearest(weight, found))
    # Damping is part of the Hessian by which scales are chosen, and not of that by which errors are told.
    damped, more = quantize_matrix(weight, hessian, Grid(4, group)), DAMPING * hessian.diagonal().mean()
    same = quantize_matrix(weight, hessian + torch.diag(more.expand(64)), Grid(4, group), damping=0)
    assert torch.equal(damped.levels, same.levels) and torch.equal(damped.scales, same.scales)
    assert same.error == pytest.approx(same.rtn_error, rel=1e-6) and not damped.worse
