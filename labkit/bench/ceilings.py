"""What the device can do at most, measured in the same run as what is compared with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from labkit.bench.timing import seconds_a_call


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second of a copy (read and written both counted), and operations per second of a matrix product."""

    bytes_s: float
    flops_s: float
    how: str

    def __str__(self) -> str:
        return f"copy {self.bytes_s / 1e12:.3g} TB/s, matmul {self.flops_s / 1e12:.3g} TFLOP/s ({self.how})"


@torch.inference_mode()
def measure_ceilings(device: torch.device) -> Ceilings:
    """A copy of 2 GiB and a bfloat16 product 8192 x 8192 x 8192 of random numbers on CUDA; 256 MiB and a float32
    product of 2048 on a CPU."""
    cuda = device.type == "cuda"
    size, side, dtype = (2**31, 8192, torch.bfloat16) if cuda else (2**28, 2048, torch.float32)
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copying = seconds_a_call(lambda into, what: into.copy_(what), [(target, source)], device)
    del source, target
    # The power that a product draws, and so the clock, depends on the numbers: zeros would be faster.
    factors = [torch.randn(side, side, device=device).to(dtype) for _ in range(2)]
    out = torch.empty(side, side, device=device, dtype=dtype)
    multiplying = seconds_a_call(lambda a, b: torch.mm(a, b, out=out), [(factors[0], factors[1])], device)
    how = f"{size / 2**30:g} GiB; {side} cubed in {str(dtype).removeprefix('torch.')}"
    return Ceilings(2 * size / copying, 2 * side**3 / multiplying, how)
