"""One block of GPTQ: weights are rounded one input after the other, and each error is made good by the inputs to come.

The formulas are those of ``labkit.quantizer.gptq``, of which this is the inner loop. For every output alone, from the
last input j of the block to its first:

    level_j  = round(current_j / scale)              clipped to the grid
    change_j = weight_j - scale * level_j            by how much this weight has changed in all
    current_k += factor_jk * change_j                for the inputs k < j that are yet to be rounded

The loss of the block is sum_j importance_j * (current_j - scale * level_j)^2. Where several scales are given, the block
is carried out with each, and the one that loses least is kept: a clip search that knows what the loop will do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit.kernels.compile_check import CompileCase

OUTPUTS, WARPS = 16, 1
"""Of a program: 64 weights of the block a thread, in registers, and no barrier between the inputs."""
_PIECE = 2**19
"""Elements of the CPU's working set: 2 MB, which stay in its cache."""


class Block(NamedTuple):
    """What became of a block of inputs."""

    levels: Tensor
    """int8 [inputs, outputs], zero is 0."""
    changes: Tensor
    """float32 [inputs, outputs]: the weight before, less the weight now."""
    scales: Tensor
    """float32 [outputs]: those chosen."""


def round_block(
    current: Tensor, weights: Tensor, factor: Tensor, importance: Tensor, scales: Tensor, zero: int
) -> Block:
    """Rounds a block of inputs, by the formulas above.

    current: float32 [inputs, outputs], the weights after what was made good for the inputs rounded before; weights: the
    same before that; factor: [inputs, inputs], of which what lies below the diagonal is read;
    importance: [inputs]; scales: [candidates, outputs], none of them 0. Dispatch: up to 128 inputs on CUDA -> the
    kernel, anything else -> PyTorch.
    """
    run = round_block_triton if current.is_cuda and len(current) <= 128 else round_block_reference
    return run(current, weights, factor, importance, scales, zero)


def round_block_reference(
    current: Tensor, weights: Tensor, factor: Tensor, importance: Tensor, scales: Tensor, zero: int
) -> Block:
    """``round_block`` in PyTorch, all candidates side by side."""
    step = max(1, _PIECE // (len(current) * len(scales)))
    parts = []
    for at in range(0, current.shape[1], step):
        piece = slice(at, at + step)
        one, kept, tried = current[:, piece], weights[:, piece], scales[:, piece]
        chosen = tried[0]
        if len(tried) > 1:
            losses = _round(one, kept, factor, importance, tried, zero)[2]
            chosen = tried.gather(0, losses.argmin(0, keepdim=True))[0]
        levels, changes, _ = _round(one, kept, factor, importance, chosen[None], zero)
        parts.append((levels[:, 0].to(torch.int8), changes[:, 0], chosen))
    return Block(*(torch.cat(each, dim=-1) for each in zip(*parts, strict=True)))


def _round(
    current: Tensor, weights: Tensor, factor: Tensor, importance: Tensor, scales: Tensor, zero: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels and changes [inputs, candidates, outputs], losses [candidates, outputs]."""
    current = current[:, None].repeat(1, len(scales), 1)
    flat = current.view(len(current), -1)
    levels, changes = torch.empty_like(current), torch.empty_like(current)
    losses = torch.zeros_like(scales)
    for j in reversed(range(len(current))):
        levels[j] = (current[j] / scales).round_().clamp_(-zero, zero - 1)
        rounded = levels[j] * scales
        losses += importance[j] * (current[j] - rounded).square_()
        torch.sub(weights[j], rounded, out=changes[j])
        flat[:j].addr_(factor[j, :j], changes[j].view(-1))
    return levels, changes, losses


def round_block_triton(
    current: Tensor, weights: Tensor, factor: Tensor, importance: Tensor, scales: Tensor, zero: int
) -> Block:
    """``round_block`` of up to 128 inputs, a few outputs a program."""
    count, outputs = current.shape
    found = Block(
        torch.empty(current.shape, dtype=torch.int8, device=current.device),
        torch.empty_like(current),
        torch.empty_like(scales[0]),
    )
    _round_block[(triton.cdiv(outputs, OUTPUTS),)](
        current.contiguous(), weights.contiguous(), factor.contiguous(), importance, scales.contiguous(), *found,
        count, outputs, len(scales), -zero, zero - 1,
        INPUTS=triton.next_power_of_2(count), OUTPUTS=OUTPUTS, num_warps=WARPS,
    )  # fmt: skip
    return found


@triton.jit(do_not_specialize=["count", "outputs", "candidates", "low", "high"])
def _round_block(  # type: ignore[no-untyped-def]
    current_ptr,
    weight_ptr,
    factor_ptr,
    importance_ptr,
    scale_ptr,
    level_ptr,
    change_ptr,
    chosen_ptr,
    count,
    outputs,
    candidates,
    low,
    high,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Once for each candidate, and once more with the best of them to keep the result."""
    row = tl.arange(0, INPUTS)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = output < outputs
    tile = row[:, None] * outputs + output[None, :]
    begun = tl.load(current_ptr + tile, mask=(row < count)[:, None] & inside[None, :], other=0.0)
    chosen = tl.load(scale_ptr + output, mask=inside, other=1.0)
    least = tl.full((OUTPUTS,), float("inf"), tl.float32)
    for attempt in range(candidates + 1):
        keep = attempt == candidates
        tried = tl.load(scale_ptr + attempt * outputs + output, mask=inside & (attempt < candidates), other=1.0)
        scale = tl.where(keep, chosen, tried)
        current = begun
        loss = tl.zeros((OUTPUTS,), dtype=tl.float32)
        for step in range(count):
            j = count - 1 - step
            value = tl.sum(tl.where(row[:, None] == j, current, 0.0), axis=0)
            level = tl.minimum(tl.maximum(tl.div_rn(value, scale), low), high)
            level = (level + 12582912.0) - 12582912.0  # 1.5 * 2^23: what is added to it is rounded, halves to even
            rounded = level * scale
            loss += tl.load(importance_ptr + j) * (value - rounded) * (value - rounded)
            change = tl.load(weight_ptr + j * outputs + output, mask=inside, other=0.0) - rounded
            factor = tl.load(factor_ptr + j * count + row, mask=row < j, other=0.0)
            current += factor[:, None] * change[None, :]
            tl.store(level_ptr + j * outputs + output, level.to(tl.int8), mask=inside & keep)
            tl.store(change_ptr + j * outputs + output, change, mask=inside & keep)
        better = loss < least
        chosen = tl.where(better & (attempt < candidates), tried, chosen)
        least = tl.where(better, loss, least)
    tl.store(chosen_ptr + output, chosen, mask=inside)


def _case(inputs: int) -> CompileCase:
    pointers = dict.fromkeys(
        ("current_ptr", "weight_ptr", "factor_ptr", "importance_ptr", "scale_ptr", "change_ptr", "chosen_ptr"), "*fp32"
    )
    sizes = dict.fromkeys(("count", "outputs", "candidates", "low", "high"), "i32")
    constants = {"INPUTS": inputs, "OUTPUTS": OUTPUTS}
    return CompileCase(
        f"round a block of {inputs}", _round_block, {**pointers, "level_ptr": "*i8", **sizes}, constants, WARPS
    )


COMPILE_CASES = [_case(inputs) for inputs in (32, 64, 128)]
