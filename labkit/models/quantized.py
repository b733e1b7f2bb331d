"""Linear maps with weights of 4 bits: from GPTQ checkpoints, or rounded when a checkpoint of 16 or 32 bits is loaded.

A GPTQ checkpoint holds of a linear map NAME of I inputs and O outputs, in G groups of inputs that share a scale:
``NAME.qweight`` int32 [I * bits / 32, O], ``NAME.qzeros`` int32 [G, O * bits / 32], ``NAME.scales`` [G, O], and
``NAME.g_idx`` [I], the group of each input. A weight is scale * (level - zero). Only symmetric checkpoints whose groups
lie in order are read: every zero is the level in the middle, of which format v1 stores one less and v2 itself.

There are kernels for 4 bits, see labkit.kernels.w4a16. Where they do not reach, the weight is multiplied out when it is
loaded and takes the memory that it would take without: levels of 8 bits, those of stacked experts and of the expansion
of latents, which no linear map reads, and everything on a CPU.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from labkit.errors import UserError
from labkit.kernels.w4a16 import (
    Packed,
    dequantize,
    dequantize_checkpoint,
    has_kernel,
    join,
    pack,
    pack_levels,
    w4a16_linear,
    w4a16_silu_mul,
)
from labkit.models.layers import Linear, Norm
from labkit.models.shape import Quantization
from labkit.models.tensors import TensorFiles
from labkit.models.weights import ALL, Place

ROUNDED_GROUPS = (128, 64, 32)
"""Sizes of the groups of weights that are rounded here: the first that divides the inputs."""
SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")


class QuantizedLinear(Linear):
    """A Linear whose weight is given in parts of 4 bits: ``take``. It stays packed where there is a kernel for it, and
    is multiplied out elsewhere."""

    packed: Packed | None = None

    def __init__(self, like: Linear, device: torch.device, dtype: torch.dtype) -> None:
        """device: the weight's; dtype: of what it is multiplied by."""
        nn.Module.__init__(self)  # Linear's would make a weight
        self.register_parameter("weight", None)
        self.device, self.dtype = device, dtype
        self.outputs = len(like.weight)
        self.bias = like.bias
        self._parts: dict[int, Packed] = {}

    def take(self, first: int, part: Packed) -> None:
        """Some of the outputs, from ``first`` on; once all are there they are joined."""
        self._parts[first] = part
        if sum(each.outputs for each in self._parts.values()) < self.outputs:
            return
        packed = join([self._parts[at] for at in sorted(self._parts)])
        self._parts = {}
        if has_kernel(torch.empty((1, packed.inputs), dtype=self.dtype, device=self.device), packed):
            self.packed = packed
        else:
            self.weight = nn.Parameter(dequantize(packed, self.dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.packed is None else w4a16_linear(x, self.packed, self.bias)

    def of_normed_sum(self, x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        if self.packed is None:
            return super().of_normed_sum(x, residual, norm)
        normed, total = (norm(x), x) if residual is None else norm.of_sum(x, residual)
        return self(normed), total

    def silu_mul_of(self, x: Tensor) -> Tensor:
        return super().silu_mul_of(x) if self.packed is None else w4a16_silu_mul(x, self.packed)

    def silu_mul_of_normed_sum(self, x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        if self.packed is None:
            return super().silu_mul_of_normed_sum(x, residual, norm)
        normed, total = (norm(x), x) if residual is None else norm.of_sum(x, residual)
        return self.silu_mul_of(normed), total


def quantize_linears(model: nn.Module, but: Collection[str], device: torch.device, dtype: torch.dtype) -> None:
    """Puts an empty QuantizedLinear in the place of each linear map, ``but`` those of these weights."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and f"{name}.weight" not in but:
            path, _, child = name.rpartition(".")
            setattr(model.get_submodule(path), child, QuantizedLinear(module, device, dtype))


def stem_of(name: str) -> str:
    """What the names of a linear map's quantised tensors begin with, from that of its weight."""
    return name.removesuffix(".weight")


def is_quantized(name: str, files: TensorFiles) -> bool:
    """Whether the checkpoint holds the weight of this name in levels."""
    return f"{stem_of(name)}.qweight" in files


def is_zero(name: str, files: TensorFiles) -> bool:
    """Whether the checkpoint holds a vector of this name, of zeros."""
    return name in files and not bool(files.part(name, (ALL,)).any())


def round_to_nearest(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """weight [outputs, inputs] in 4 bits: levels uint8 [outputs, inputs], and float16 scales [groups, outputs] that put
    the largest of a group between the last two levels, as GPTQ's symmetric grid does."""
    grouped = weight.float().unflatten(1, (-1, group))
    scales = (grouped.abs().amax(dim=2) * (2 / 15)).half()
    steps = grouped / torch.where(scales == 0, 1, scales.float())[:, :, None]
    levels = steps.round_().add_(8).clamp_(0, 15).to(torch.uint8)
    return levels.flatten(1), scales.T


def pack_rounded(name: str, part: Tensor, place: Place) -> Packed:
    """This rank's part of the weight ``name``, rounded to the nearest of 4 bits.

    Raises UserError where no group divides its inputs, or the ranks would share one.
    """
    inputs = place.shape[1]
    group = next((size for size in ROUNDED_GROUPS if inputs % size == 0), None)
    if group is None:
        raise UserError(f"{name} has {inputs} inputs; quantization 'int4' needs a multiple of {ROUNDED_GROUPS[-1]}")
    if part.shape[1] < inputs and part.shape[1] % group:
        raise _unsplittable(name, group)
    levels, scales = round_to_nearest(part, group)
    return pack_levels(levels, scales, None, group)


def read_packed(
    files: TensorFiles, name: str, place: Place, quantization: Quantization, device: torch.device
) -> Packed:
    """This rank's part of a weight of 4 bits from a checkpoint. Raises UserError for tensors that do not fit the
    config, are not symmetric or in another order, and where the ranks would share a group."""
    _check(files, name, place, quantization)
    stem, group = stem_of(name), quantization.group(place.shape[1])
    columns, per_word = _columns(name, place, group), 32 // quantization.bits
    if columns.start % per_word or columns.stop % per_word:
        raise _unsplittable(name, per_word)
    words = slice(columns.start // per_word, columns.stop // per_word)
    groups = slice(columns.start // group, -(-columns.stop // group))
    qweight = files.part(f"{stem}.qweight", (words, place.rows)).to(device)
    scales = files.part(f"{stem}.scales", (groups, place.rows)).to(device)
    return pack(qweight, _qzeros(scales, quantization.bits), scales, quantization.bits, quantization.group_size)


def read_dequantized(
    files: TensorFiles, name: str, place: Place, quantization: Quantization, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """This rank's part [outputs, inputs] of a weight from a checkpoint, multiplied out; errors as ``read_packed``."""
    _check(files, name, place, quantization)
    stem, bits = stem_of(name), quantization.bits
    qweight, scales = (files.part(f"{stem}{suffix}", (ALL, ALL)).to(device) for suffix in (".qweight", ".scales"))
    size = quantization.group(place.shape[1])
    return dequantize_checkpoint(qweight, _qzeros(scales, bits), scales, bits, size, dtype)[place.part]


def _columns(name: str, place: Place, group: int) -> slice:
    """The inputs that this rank holds: whole groups, or a share of the only one."""
    inputs = place.shape[1]
    start, stop, _ = place.columns.indices(inputs)
    if group < inputs and (start % group or (stop % group and stop != inputs)):
        raise _unsplittable(name, group)
    return slice(start, stop)


def _unsplittable(name: str, group: int) -> UserError:
    return UserError(
        f"{name} cannot be split over this many processes, which would share one of its groups of {group} inputs"
    )


def _check(files: TensorFiles, name: str, place: Place, quantization: Quantization) -> None:
    stem, (outputs, inputs) = stem_of(name), place.shape
    group, per_word = quantization.group(inputs), 32 // quantization.bits
    groups = -(-inputs // group)
    shapes = {
        ".qweight": [inputs // per_word, outputs],
        ".qzeros": [groups, outputs // per_word],
        ".scales": [groups, outputs],
        ".g_idx": [inputs],
    }
    for suffix, shape in shapes.items():
        if suffix == ".g_idx" and stem + suffix not in files:
            continue
        if stem + suffix not in files:
            raise UserError(f"{files.path} lacks the tensor {stem}{suffix}; fetch it again")
        if (found := files.shape(stem + suffix)) != shape:
            raise UserError(f"tensor {stem}{suffix} is {found}, config.json makes it {shape}")
    stored = 2 ** (quantization.bits - 1) - quantization.zero_stored_less_one
    words = files.part(f"{stem}.qzeros", (ALL, ALL))
    if not bool((words.view(torch.uint8) == (stored * 0x11 if quantization.bits == 4 else stored)).all()):
        raise UserError(
            f"tensor {stem}.qzeros holds other zeros than a symmetric checkpoint of the format that config.json names; "
            "only those are supported"
        )
    if f"{stem}.g_idx" in files:
        order = files.part(f"{stem}.g_idx", (ALL,))
        if not torch.equal(order.long(), torch.arange(inputs) // group):
            raise UserError(
                f"tensor {stem}.g_idx sorts inputs into groups by activation (desc_act), which is not supported; "
                "quantise with desc_act false, or with an order that leaves g_idx trivial"
            )


def _qzeros(scales: Tensor, bits: int) -> Tensor:
    """Those of a symmetric checkpoint of format v1, int32 [groups, outputs * bits / 32], for these scales."""
    groups, outputs = scales.shape
    stored = 0x77 if bits == 4 else 0x7F
    width = -(-outputs * bits // 32) * 4
    return torch.full((groups, width), stored, dtype=torch.uint8, device=scales.device).view(torch.int32)
