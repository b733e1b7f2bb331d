"""Times every cut of the 4-bit kernel for few rows on this GPU, and names the fastest: what ``tuning`` in
labkit/kernels/w4a16_few.py should say for it.

python scripts/sweep_w4a16.py --rows 1,16 --matrices 8192x8192,3584x18944,37888x3584s

A matrix is OUTPUTSxINPUTS, with an s behind it for one with a gate. Each cut is compared with float32 first. Compiling
is what takes the time, and is done by several processes.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple
from multiprocessing import get_context
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.bench.timing import input_sets, seconds_a_call
from labkit.kernels.w4a16_few import Few, launch, tuning
from labkit.kernels.w4a16_layout import Packed, dequantize

DEVICE = torch.device("cuda")
MATRICES = "8192x8192,4096x4096,4608x3584,3584x3584,37888x3584s,3584x18944"
MOST_ERROR = 0.02


class Product(NamedTuple):
    rows: int
    outputs: int
    inputs: int
    silu: bool


def cuts(product: Product) -> Iterator[Few]:
    """The one in use, then those that keep at least 8 tiles of each 16 outputs under way, and not more warps than a
    program's share of the inputs gives work to."""
    now = tuning(product.rows, product.outputs // (1 + product.silu), product.inputs, product.silu)
    yield now
    blocks = product.inputs // 128
    for tiles, warps, depth, splits in itertools.product((1, 2, 4), (1, 2, 4, 8), (1, 2, 4), (1, 2, 4, 7, 8, 14)):
        fits = warps * splits <= min(32, blocks) and 8 <= warps * splits * depth <= 64 and tiles * depth <= 8
        gate = tiles > 1 and splits <= 2 if product.silu else True
        if fits and gate and (cut := Few(tiles, warps, depth, splits)) != now:
            yield cut


def inputs_of(product: Product, seed: int) -> tuple[Tensor, Packed]:
    torch.manual_seed(seed)
    tiles, blocks = product.outputs // 16, product.inputs // 128
    words = torch.randint(-(2**31), 2**31, (tiles, blocks, 16, 16), device=DEVICE, dtype=torch.int32)
    scales = (torch.rand(tiles, blocks, 16, device=DEVICE) + 0.5).div(5 * product.inputs**0.5).half()
    arrivals = torch.zeros(tiles, dtype=torch.int32, device=DEVICE)
    x = torch.randn(product.rows, product.inputs, device=DEVICE, dtype=torch.bfloat16)
    return x, Packed(words, scales, None, product.outputs, product.inputs, 128, arrivals)


def compile_cut(product: Product, cut: Few) -> str:
    """Leaves the kernel in Triton's cache; why it could not, if so."""
    try:
        launch(*inputs_of(product, 0), None, product.silu, cut)
        torch.cuda.synchronize()
    except Exception as error:  # of a sweep some may fail: too many registers, too much shared memory
        return f"{type(error).__name__}: {str(error)[:100]}"
    return ""


def expected(product: Product, x: Tensor, packed: Packed) -> Tensor:
    found = x.float() @ dequantize(packed, torch.float32).T
    if product.silu:
        gate, up = found.chunk(2, dim=1)
        return F.silu(gate) * up
    return found


def sweep(product: Product, pool: ProcessPoolExecutor, shown: int) -> None:
    tried = list(cuts(product))
    failures = list(pool.map(compile_cut, itertools.repeat(product), tried))
    size = product.outputs * product.inputs / 2
    sets = [inputs_of(product, seed) for seed in range(input_sets(size))]
    right = expected(product, *sets[0])
    times: list[tuple[float, Few]] = []
    for cut, failure in zip(tried, failures, strict=True):
        if not failure:
            error = (launch(*sets[0], None, product.silu, cut).float() - right).norm() / right.norm()
            failure = "" if error < MOST_ERROR else f"wrong by {error:.1%}"
        if failure:
            print(f"  {astuple(cut)}: {failure}")
            continue
        seconds = seconds_a_call(lambda x, packed, cut=cut: launch(x, packed, None, product.silu, cut), sets, DEVICE)
        times.append((seconds, cut))
    gate = " with a gate" if product.silu else ""
    print(f"{product.rows} rows, {product.outputs} x {product.inputs}{gate}: {len(times)} cuts")
    for seconds, cut in sorted(times, key=lambda timed: timed[0])[:shown]:
        used = "  <- in use" if cut == tried[0] else ""
        print(f"  {cut}: {seconds * 1e6:.2f} us, {size / seconds / 1e12:.2f} TB/s{used}", flush=True)


def product_of(rows: int, text: str) -> Product:
    """Raises ValueError for what is none, and for sizes that the largest cuts do not divide."""
    outputs, inputs = map(int, text.removesuffix("s").split("x"))
    silu = text.endswith("s")
    if not 1 <= rows <= 16 or min(outputs, inputs) < 1 or outputs % (128 if silu else 64) or inputs % 128:
        raise ValueError(text)
    return Product(rows, outputs, inputs, silu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8,16", help="rows of x, up to 16 (default: %(default)s)")
    parser.add_argument("--matrices", default=MATRICES, help="(default: %(default)s)")
    parser.add_argument("--shown", type=int, default=5, help="cuts to show of each (default: %(default)s)")
    given = parser.parse_args()
    try:
        products = [product_of(int(rows), each) for rows in given.rows.split(",") for each in given.matrices.split(",")]
    except ValueError as error:
        parser.error(
            f"rows are from 1 to 16, matrices like 8192x8192 or 37888x3584s, with outputs in 64s (128s before a gate) "
            f"and inputs in 128s; this is not: {error}"
        )
    if not torch.cuda.is_available():
        raise SystemExit("the sweep needs a CUDA device: what it times are kernels for a GPU")
    with ProcessPoolExecutor(min(14, os.cpu_count() or 1), get_context("spawn")) as pool:
        for product in products:
            sweep(product, pool, given.shown)


if __name__ == "__main__":
    main()
