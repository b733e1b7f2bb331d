"""The most memory that a piece of work holds at once beside what was there before, counted tensor by tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Counter(TorchDispatchMode):
    """Counts the bytes of every storage that an operation returns until the storage dies."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._known = [tensor.untyped_storage() for tensor in known]
        for storage in self._known:
            self._seen.add(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._let_go, size)

    def _let_go(self, size: int) -> None:
        self.held -= size


def peak_bytes(work: Callable[[], object], known: Iterable[Tensor], device: torch.device) -> int:
    """The most bytes that tensors made by ``work`` take at once, ``known`` ones aside, which exist already.

    On CUDA as its allocator reports it, what kernels need to work included; on the CPU every tensor is counted, what
    operations hold inside themselves is not.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _Counter(known) as counter:
        work()
    return counter.peak
