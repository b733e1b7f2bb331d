"""Programmatic dependent launch: on Hopper a kernel's programs may be set up while the kernel before it drains.

A kernel launched with ``launch_pdl=PDL`` calls ``begin(PDL)`` before it touches memory. That waits until the kernel
before it has ended and its writes can be seen, so that results are the same with it and without it. As every such
kernel waits, the one before has waited for the one before that: all earlier kernels have ended too.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def _wanted() -> bool:
    """Where LABKIT_PDL=1 asks for it, on compute capability 9.0 or later, outside the interpreter."""
    if os.environ.get("LABKIT_PDL") != "1" or os.environ.get("TRITON_INTERPRET") == "1":
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


PDL = _wanted()


@triton.jit
def begin(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Lets the next kernel be set up, then waits for the kernel before."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
