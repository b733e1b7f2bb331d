"""4-bit linear layers against the checkpoint's own definition in numpy: w = scale * (level - zero)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from labkit.kernels import w4a16_few, w4a16_many
from labkit.kernels.w4a16 import (
    dequantize,
    dequantize_checkpoint,
    has_kernel,
    join,
    pack,
    w4a16_linear,
    w4a16_linear_reference,
    w4a16_silu_mul,
)
from labkit.kernels.w4a16_few import Few
from labkit.kernels.w4a16_many import Many

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def checkpoint(inputs: int, outputs: int, group_size: int, bits: int = 4, asymmetric: bool = False, seed: int = 0):
    """qweight, qzeros and scales as in a GPTQ checkpoint of format v1, and the weight [outputs, inputs] in float32."""
    random = np.random.default_rng(seed)
    group = inputs if group_size == -1 else group_size
    groups, per_word, most = inputs // group, 32 // bits, 2**bits
    levels = random.integers(0, most, (inputs, outputs))
    zeros = random.integers(1, most, (groups, outputs)) if asymmetric else np.full((groups, outputs), most // 2)
    scales = (random.standard_normal((groups, outputs)) * 0.02).astype(np.float16)
    weight = (levels - zeros.repeat(group, 0)) * scales.astype(np.float32).repeat(group, 0)
    shifts = bits * np.arange(per_word)
    qweight = (levels.reshape(-1, per_word, outputs) << shifts[:, None]).sum(1)
    qzeros = ((zeros - 1).reshape(groups, -1, per_word) << shifts).sum(2)
    tensors = [torch.from_numpy(each.astype(np.uint32).view(np.int32)).to(DEVICE) for each in (qweight, qzeros)]
    return *tensors, torch.from_numpy(scales).to(DEVICE), torch.from_numpy(weight.T.astype(np.float32)).to(DEVICE)


def rows_of(rows: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    x = np.random.default_rng(1).standard_normal((rows, inputs))
    return torch.from_numpy(x).to(DEVICE, dtype)


def close(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """No row may be off by more than a share of its length."""
    right = x.cpu().double().numpy() @ weight.cpu().double().numpy().T
    right += 0 if bias is None else bias.cpu().double().numpy()
    apart = np.linalg.norm(found.cpu().double().numpy() - right, axis=1) / np.linalg.norm(right, axis=1)
    assert found.dtype == x.dtype and apart.max() <= TOLERANCE[x.dtype], apart.max()


SHAPES = [(128, 16, 128), (384, 768, 32), (256, 40, 64), (1024, 384, -1), (96, 24, 32), (72, 8, -1), (512, 32, 256)]


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("inputs, outputs, group_size", SHAPES)
def test_what_is_packed_is_the_checkpoint(inputs: int, outputs: int, group_size: int, asymmetric: bool) -> None:
    *tensors, weight = checkpoint(inputs, outputs, group_size, asymmetric=asymmetric)
    packed = pack(*tensors, 4, group_size)
    assert torch.equal(dequantize(packed, torch.float32), weight) and (packed.zeros is not None) == asymmetric
    assert torch.equal(dequantize(packed, torch.bfloat16), weight.bfloat16())
    assert torch.equal(dequantize_checkpoint(*tensors, 4, group_size, torch.float32), weight)
    assert packed.words.nbytes >= inputs * outputs // 2


def test_8_bits_are_dequantised() -> None:
    *tensors, weight = checkpoint(256, 24, 64, bits=8)
    assert torch.equal(dequantize_checkpoint(*tensors, 8, 64, torch.float32), weight)
    with pytest.raises(ValueError, match="4 bits, not 8"):
        pack(*tensors, 8, 64)


def test_a_group_size_that_no_kernel_layout_has_is_refused() -> None:
    *tensors, _ = checkpoint(160, 8, 40)
    with pytest.raises(ValueError, match="group_size 40"):
        pack(*tensors, 4, 40)


@pytest.mark.parametrize("outputs", [(32, 16, 48), (40, 8)], ids=["tiles", "odd"])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
def test_joined_outputs_follow_each_other(outputs: tuple[int, ...], asymmetric: bool) -> None:
    made = [checkpoint(256, each, 64, asymmetric=asymmetric, seed=i) for i, each in enumerate(outputs)]
    parts = [pack(*tensors, 4, 64) for *tensors, _ in made]
    weight = torch.cat([each[-1] for each in made])
    assert torch.equal(dequantize(join(parts), torch.float32), weight)
    *tensors, _ = checkpoint(128, 16, 64)
    with pytest.raises(ValueError, match="differ"):
        join([parts[0], pack(*tensors, 4, 64)])


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_the_op_is_a_linear_layer(rows: int) -> None:
    *tensors, weight = checkpoint(384, 40, 128)
    packed = pack(*tensors, 4, 128)
    x, bias = rows_of(rows, 384, torch.float32), rows_of(1, 40, torch.float32)[0]
    close(w4a16_linear(x, packed, bias), x, weight, bias)
    assert torch.equal(w4a16_linear(x, packed), w4a16_linear_reference(x, packed))


FEW = [
    (1, 16, 512, Few(1, 4, 2)),
    (1, 48, 384, Few(1, 4, 1)),
    (1, 16, 128, Few(1, 2, 4)),
    (3, 32, 1536, Few(2, 4, 4)),
    (8, 64, 384, Few(4, 2, 2)),
    (9, 32, 640, Few(2, 1, 4, splits=2)),
    (16, 64, 640, Few(4, 4, 1)),
    (1, 48, 640, Few(1, 2, 2, splits=2)),
    (16, 64, 1152, Few(4, 2, 1, splits=4)),
    (16, 48, 640, Few(4, 1, 1, splits=2)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, outputs, inputs, cut", FEW, ids=str)
def test_few_rows(rows: int, outputs: int, inputs: int, cut: Few, dtype: torch.dtype) -> None:
    group_size = 128 if inputs % 128 == 0 else -1
    *tensors, weight = checkpoint(inputs, outputs, group_size)
    packed, x, bias = pack(*tensors, 4, group_size), rows_of(rows, inputs, dtype), rows_of(1, outputs, dtype)[0]
    close(w4a16_few.launch(x, packed, bias, False, cut), x, weight, bias)


@pytest.mark.parametrize("rows", [1, 16, 20])
def test_the_op_with_a_gate(rows: int) -> None:
    *tensors, weight = checkpoint(384, 96, 128)
    dtype = torch.float16 if DEVICE == "cuda" else torch.float32
    x = rows_of(rows, 384, dtype)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=1)
    right = torch.nn.functional.silu(gate) * up
    found = w4a16_silu_mul(x, pack(*tensors, 4, 128))
    assert found.dtype == dtype and (found - right).norm() <= 2 * TOLERANCE[dtype] * right.norm()


@pytest.mark.parametrize(
    "rows, outputs, inputs, cut",
    [
        (1, 64, 640, Few(2, 2, 1)),
        (9, 128, 384, Few(4, 2, 1)),
        (1, 32, 640, Few(2, 2, 1, splits=3)),
        (9, 96, 384, Few(4, 2, 1)),
    ],
    ids=str,
)
def test_a_gate_after_few_rows(rows: int, outputs: int, inputs: int, cut: Few) -> None:
    *tensors, weight = checkpoint(inputs, outputs, 128)
    x = rows_of(rows, inputs, torch.float16)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=1)
    right = torch.nn.functional.silu(gate) * up
    found = w4a16_few.launch(x, pack(*tensors, 4, 128), None, True, cut).double()
    assert (found - right).norm() <= 3e-3 * right.norm()


def test_no_program_has_tiles_past_the_last() -> None:
    assert w4a16_few.fitted(Few(4, 1, 1), 64, silu=False) == Few(4, 1, 1)
    assert w4a16_few.fitted(Few(4, 1, 1), 48, silu=False) == Few(1, 1, 1)
    assert w4a16_few.fitted(Few(4, 2, 1), 96, silu=True) == Few(4, 2, 1)
    assert w4a16_few.fitted(Few(4, 2, 1), 48, silu=True) == Few(2, 2, 1)


def test_a_row_does_not_depend_on_the_others() -> None:
    *tensors, _ = checkpoint(384, 32, 128)
    packed, x = pack(*tensors, 4, 128), rows_of(12, 384, torch.float16)
    cut = Few(2, 4, 1)
    whole = w4a16_few.launch(x, packed, None, False, cut)
    other = torch.cat([rows_of(4, 384, torch.float16) * 3, x[4:]])
    assert torch.equal(w4a16_few.launch(other, packed, None, False, cut)[4:], whole[4:])


MANY = [
    (20, 64, 512, Many(4, 32, 1, 4, 2)),
    (70, 80, 384, Many(4, 64, 2, 4, 2)),
    (33, 128, 640, Many(8, 16, 3, 4, 2)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, outputs, inputs, cut", MANY, ids=str)
def test_more_rows(rows: int, outputs: int, inputs: int, cut: Many, dtype: torch.dtype) -> None:
    *tensors, weight = checkpoint(inputs, outputs, 128)
    packed, x, bias = pack(*tensors, 4, 128), rows_of(rows, inputs, dtype), rows_of(1, outputs, dtype)[0]
    close(w4a16_many.launch(x, packed, bias, cut), x, weight, bias)
    close(w4a16_many.launch(x, packed, None, cut), x, weight)


@pytest.mark.parametrize("inputs, outputs", [(1024, 32), (384, 48)])
def test_dequantised_whole(inputs: int, outputs: int) -> None:
    *tensors, weight = checkpoint(inputs, outputs, 128)
    found = w4a16_many.dequantize_triton(pack(*tensors, 4, 128), torch.float16)
    torch.testing.assert_close(found.float(), weight, rtol=1e-3, atol=0)


def test_the_rule() -> None:
    *tensors, weight = checkpoint(256, 32, 128)
    packed, x = pack(*tensors, 4, 128), rows_of(3, 256, torch.float16)
    assert has_kernel(x, packed) == (DEVICE == "cuda")
    assert not has_kernel(x.float(), packed) and not has_kernel(x[:0], packed)
    if DEVICE == "cuda":
        for rows in (1, 2, 16, 17, 64, 256, 300):
            x = rows_of(rows, 256, torch.bfloat16)
            close(w4a16_linear(x, packed), x, weight)
