"""Programmatic dependent launch: a kernel takes its place on the GPU while the one before still runs, and waits there.

A small kernel between large ones, such as a norm, otherwise waits for the GPU to be empty and is launched then, which
takes longer than it does. One that overlaps is launched with ``launch_pdl``, and each of its programs calls
``gdc_wait`` before it reads or writes what other kernels know of; from there on all that came before is done. The
kernel before says with ``gdc_launch_dependents`` when it may be launched.

When that is decides whether it pays, measured on an H200. A small kernel says so only after its own wait: if it did
before, the kernel after it would take place and bandwidth from the large one before it. A product of a few rows says so
when its loop over the weights is done, and itself has its first weights under way while it waits.
"""

from __future__ import annotations

import functools

import torch
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["gdc_launch_dependents", "gdc_wait", "overlaps"]


@functools.cache
def overlaps() -> bool:
    """Whether kernels can overlap on this machine: from compute capability 9.0 on."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
