"""GPTQ of one matrix (Frantar et al. 2022, arXiv 2210.17323).

Of a linear layer y = W x we look for W' on the grid whose output on calibration inputs differs least from y. With
dW = W - W' and the Hessian H = 2/n sum x x^T, that is to make

    loss(dW) = tr(dW H dW^T)

small. Rows of W (outputs) do not touch each other in it, so all of them are done side by side.

**The factor.** Let H = L D L^T, L lower triangular with ones on its diagonal, D diagonal. Then

    loss(dW) = sum_j D_j |(dW L)_j|^2,     (dW L)_j = dw_j + sum_{k > j} dw_k L_kj = p_j - w'_j
                                   where    p_j = w_j + sum_{k > j} L_kj dw_k

is what column j ought to become once all columns after it are rounded: p_j makes their errors good as far as any column
can. GPTQ goes through the columns from the last to the first and rounds p_j to the nearest level each time, which makes
each term of the sum as small as the grid lets it, though not the sum.

Frantar et al. write it from the first column to the last, with the Cholesky factor U of H^-1 = U^T U, and spread the
error of a column over those to come as soon as it is known: w_k -= (w_j - w'_j) U_jk / U_jj. In exact arithmetic that
is the same, and this form needs no inverse. The tests hold it against theirs, with an explicit inverse at every column.

**Damping.** ``damping`` times the mean of H's diagonal is added to the diagonal: calibration text that leaves
directions unseen would otherwise let them take any error, and the factorisation fail.

**Blocks.** A block of columns is rounded by ``labkit.quantizer.columns``; what it means for the blocks before is found
by one matrix product when their turn comes.

**Scales.** They are chosen when a group begins, from the largest p_j that it is then to have, and so that the group's
share of the loss is least when its columns are rounded as above (see ``columns``). On matrices of the shipped model
that leaves 14 % less loss than choosing them by sum_j D_j (p_j - w'_j)^2 with every column taken alone, and 20 % less
than scales fixed beforehand. Where one scale serves the whole row, it is chosen beforehand, for rounding (see
``grid``).

Inside, inputs come first and in the order in which they are rounded: matrices are [inputs, outputs].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.quantizer.columns import round_block
from labkit.quantizer.grid import BLOCK, Grid, candidates, round_to_grid, rounding_scales
from labkit.quantizer.order import act_order

DAMPING = 0.01
_ALIKE = 1.001
_PIECE = 2**27
"""Most elements of a temporary of ``loss``: half a GB."""


@dataclass(frozen=True)
class Quantized:
    """A matrix on its grid, and how well it does there."""

    levels: Tensor
    """uint8 [inputs, outputs]."""
    scales: Tensor
    """float16 [groups, outputs]."""
    grid: Grid
    rtn_error: float
    """Rounding to nearest, the clip searched: squared error of the output over its square, by the Hessian; nan where
    the Hessian says nothing."""
    error: float
    """The same of this matrix."""
    clip_gain: float
    """By how many times the clip search makes the error of rounding to nearest smaller."""
    fallback: str | None = None
    """Why this matrix was rounded to nearest instead; None: it was not."""

    @property
    def worse(self) -> bool:
        """Whether plain rounding would have done better, which means that something is wrong. Where inputs are not
        correlated the two do the same, but for float32 and for damping, by which scales are chosen and errors are not
        told."""
        return self.fallback is None and not self.error <= self.rtn_error * _ALIKE

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight [outputs, inputs] that a reader makes of it, rounded to ``dtype`` once."""
        levels = self.levels.view(len(self.scales), -1, self.levels.shape[1]).float().sub_(self.grid.zero)
        return levels.mul_(self.scales.float()[:, None]).flatten(0, 1).T.to(dtype)


def quantize_matrix(weight: Tensor, hessian: Tensor, grid: Grid, damping: float = DAMPING) -> Quantized:
    """GPTQ of weight [outputs, inputs], or rounding to nearest where that cannot be, with the reason.

    hessian: float32 [inputs, inputs], symmetric; it is left as it is. The computation is float32, on its device.
    """
    weights = weight.float().T.contiguous()
    fallback = _unusable(hessian)
    told = hessian if fallback is None else torch.eye(len(hessian), device=hessian.device)
    rtn_scales, plain_scales = rounding_scales(weights, told, grid)
    rtn, change = _rounded(weights, rtn_scales, grid)
    if fallback is not None:
        return _result(rtn, rtn_scales, grid, math.nan, math.nan, math.nan, fallback)
    size = loss(weights, hessian)
    rtn_error = _ratio(loss(change, hessian), size)
    plain_error = _ratio(loss(_rounded(weights, plain_scales, grid)[1], hessian), size)
    clip_gain = _ratio(plain_error, rtn_error) or 1.0
    order = act_order(hessian.diagonal(), grid.group(len(hessian)))
    factor = _factorise(hessian, order, damping)
    if factor is None:
        reason = "its Hessian could not be factorised"
        return _result(rtn, rtn_scales, grid, rtn_error, rtn_error, clip_gain, reason)
    levels, scales, change = _round_columns(weights, factor, order, grid, rtn_scales)
    return _result(levels, scales, grid, rtn_error, _ratio(loss(change, hessian), size), clip_gain, None)


def loss(change: Tensor, hessian: Tensor) -> float:
    """tr(dW H dW^T) of change [inputs, outputs], which is dW^T."""
    total = torch.zeros((), dtype=torch.float64, device=change.device)
    for part in change.split(max(1, _PIECE // len(hessian)), dim=1):
        total += torch.mm(hessian, part).mul_(part).sum(0).double().sum()
    return float(total)


def _round_columns(
    weights: Tensor, factor: tuple[Tensor, Tensor], order: Tensor, grid: Grid, rtn_scales: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels (less zero) and changes [inputs, outputs] in the order of the checkpoint, and scales [groups, outputs]."""
    unit_lower, importance = factor
    group = grid.group(len(weights))
    width = min(group, BLOCK)
    ordered = weights[order]
    levels = torch.empty(weights.shape, dtype=torch.int8, device=weights.device)
    changes = torch.empty_like(weights)
    scales = rtn_scales.clone()
    for end in range(len(weights), 0, -width):
        begin = max(0, end - width)
        here, after = slice(begin, end), slice(end, None)
        current = torch.addmm(ordered[here], unit_lower[after, here].T, changes[after])
        lower = unit_lower[here, here]
        tried = rtn_scales if group > width else candidates(_to_become(current, ordered[here], lower), grid.zero)
        block = round_block(current, ordered[here], lower, importance[here], tried, grid.zero)
        levels[here], changes[here] = block.levels, block.changes
        scales[order[begin] // group] = block.scales
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return levels[back], scales, changes[back]


def _to_become(current: Tensor, weights: Tensor, lower: Tensor) -> Tensor:
    """The p_j of a block, were none of its columns rounded: w_j - u_j, u_j = w_j - current_j - sum_{k > j} L_kj u_k."""
    made_good = torch.linalg.solve_triangular(lower.T, weights - current, upper=True, unitriangular=True)
    return weights - made_good


def _factorise(hessian: Tensor, order: Tensor, damping: float) -> tuple[Tensor, Tensor] | None:
    """(L, diagonal of D) of the damped Hessian in this order, see above; None where there is no such factor."""
    ordered = hessian[order][:, order]
    ordered.diagonal().add_(damping * hessian.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(ordered)
    del ordered
    roots = lower.diagonal().clone()
    if int(failed) or not bool(torch.isfinite(roots).all()):
        return None
    return lower.div_(roots), roots.square()


def _unusable(hessian: Tensor) -> str | None:
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        return "its inputs were not finite"
    return None if bool((diagonal > 0).any()) else "no calibration token reached it"


def _rounded(weights: Tensor, scales: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Levels less zero, int8, and changes, of rounding to nearest."""
    grouped, each = weights.view(len(scales), -1, weights.shape[1]), scales[:, None]
    levels = round_to_grid(grouped, each, grid.zero)
    changes = torch.addcmul(grouped, levels, each, value=-1)
    return levels.to(torch.int8).view(weights.shape), changes.view(weights.shape)


def _result(
    levels: Tensor, scales: Tensor, grid: Grid, rtn: float, error: float, clip_gain: float, fallback: str | None
) -> Quantized:
    stored = (levels.to(torch.int16) + grid.zero).to(torch.uint8)
    return Quantized(stored, scales.half(), grid, rtn, error, clip_gain, fallback)


def _ratio(part: float, whole: float) -> float:
    """0 of nothing is 0: weights of zero have no error."""
    return part / whole if whole else (math.inf if part else 0.0)
