"""Linear layers with weights of 4 and 8 bits beside 16 bits: from few rows (bytes count) to many (products do)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.bench.elementwise import MATRICES
from labkit.bench.operators import Call, Case
from labkit.kernels.w4a16 import Packed, dequantize, has_kernel, pack_levels, w4a16_linear
from labkit.kernels.w4a16_layout import unpack_levels
from labkit.kernels.w8a16 import pack_int8, w8a16_linear, w8a16_linear_reference

ROWS = {"cuda": (1, 16, 64, 256, 2048), "cpu": (1, 64)}
SQUARES = {"cuda": (4096, 8192), "cpu": (384,)}
HEAD = {"cuda": ("7B head", *MATRICES["7B"]["head"]), "cpu": ("small head", 768, 384)}
HEAD_ROWS = {"cuda": (1, 16, 64, 256), "cpu": (1, 64)}
GROUP = 128


def cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    kind = device.type
    found = [_four_bits("", rows, size, size, device, dtype) for size in SQUARES[kind] for rows in ROWS[kind]]
    if kind == "cuda":
        layers = {name: shape for name, shape in MATRICES["7B"].items() if name != "head"}
        found += [_four_bits(f"7B {name} ", 1, *shape, device, dtype) for name, shape in layers.items()]
    name, outputs, inputs = HEAD[kind]
    return found + [_eight_bits(f"{name} ", rows, outputs, inputs, device, dtype) for rows in HEAD_ROWS[kind]]


def _four_bits(name: str, rows: int, outputs: int, inputs: int, device: torch.device, dtype: torch.dtype) -> Case:
    """The bytes are those of the levels, for the 16-bit rival too: they compare as the times do."""

    def make(seed: int) -> tuple[Tensor | Packed, ...]:
        torch.manual_seed(seed)
        levels = torch.randint(0, 16, (outputs, inputs), device=device).to(torch.uint8)
        scales = torch.rand(inputs // GROUP, outputs, device=device).add(0.5) / (5 * inputs**0.5)
        packed = pack_levels(levels, scales, None, GROUP)
        x = torch.randn(rows, inputs, device=device, dtype=dtype)
        return x, packed, dequantize(packed, dtype), *_for_tinygemm(packed)

    contestants: dict[str, Call | str] = {
        # Without a kernel a model multiplies the weight out when it is loaded.
        "labkit": lambda x, packed, weight, *_: (
            w4a16_linear(x, packed) if has_kernel(x, packed) else F.linear(x, weight)
        ),
        f"F.linear of {dtype.itemsize * 8} bits": lambda x, packed, weight, *_: F.linear(x, weight),
        "tinygemm of torch": _tinygemm if _has_tinygemm(device, dtype) else "bfloat16 on CUDA only",
    }
    return Case(
        workload="linear: 4-bit weight",
        size=f"{name}{outputs} x {inputs}, M={rows}",
        make=make,
        reference=lambda x, packed, *_: F.linear(x.float(), dequantize(packed, torch.float32)),
        contestants=contestants,
        bytes=outputs * inputs / 2,
        flops=2 * rows * outputs * inputs,
    )


def _eight_bits(name: str, rows: int, outputs: int, inputs: int, device: torch.device, dtype: torch.dtype) -> Case:
    def make(seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype) / inputs**0.5
        return torch.randn(rows, inputs, device=device, dtype=dtype), *pack_int8(weight), weight

    return Case(
        workload="linear: 8-bit weight",
        size=f"{name}{outputs} x {inputs}, M={rows}",
        make=make,
        reference=lambda x, levels, scale, _: w8a16_linear_reference(x.float(), levels, scale),
        contestants={
            "labkit": lambda x, levels, scale, _: w8a16_linear(x, levels, scale),
            f"F.linear of {dtype.itemsize * 8} bits": lambda x, levels, scale, weight: F.linear(x, weight),
        },
        bytes=outputs * inputs,
        flops=2 * rows * outputs * inputs,
    )


def _has_tinygemm(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype == torch.bfloat16


def _for_tinygemm(packed: Packed) -> tuple[Tensor, ...]:
    """The same weight as torch's own kernel wants it: the even input in the high half of a byte; scale and offset."""
    if packed.words.device.type != "cuda":
        return ()
    levels = unpack_levels(packed)
    words = torch.ops.aten._convert_weight_to_int4pack((levels[:, ::2] << 4) | levels[:, 1::2], 8)
    scales = packed.scales.transpose(0, 1).flatten(1)[:, : packed.outputs].bfloat16()
    return words, torch.stack((scales, torch.zeros_like(scales)), dim=-1).contiguous()


def _tinygemm(x: Tensor, packed: Packed, weight: Tensor, words: Tensor, scales: Tensor) -> Tensor:
    product: Tensor = torch.ops.aten._weight_int4pack_mm(x, words, GROUP, scales)
    return product
