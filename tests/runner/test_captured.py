"""Steps padded to fixed sizes, at fixed addresses, give what steps as they are give.

A CPU has no CUDA graphs. Here a step that is captured is kept as a function and called again, so that all but the
capture itself is that of a GPU: padding, one mailbox, shared logits, tokens that stay on the device, our attention.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from labkit.core import LabkitCore
from labkit.deployment import Deployment
from labkit.kernels.attention import paged_attention_triton
from labkit.models import attention
from labkit.request import SamplingParams, TokenLogprob
from labkit.runner import runner
from labkit.runner.graphs import CHUNKS, GraphPool
from labkit.runner.inputs import Mailbox, Size

CPU = torch.device("cpu")
MOST = 4


class CalledAgain(GraphPool):
    """Calls a captured step again where CUDA would replay it."""

    def capture(self, size: Size, forward: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self._graphs[size] = forward  # type: ignore[assignment]

    def replay(self, size: Size) -> tuple[Tensor, Tensor]:
        return self._graphs[size]()  # type: ignore[operator]


class OneAddress(Mailbox):
    """A mailbox whose inputs arrive at one address, as on CUDA."""

    class Event:
        def record(self) -> None: ...

        def synchronize(self) -> None: ...

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(capacity, device)
        self._device = torch.zeros(capacity, dtype=torch.uint8)
        self._left = [self.Event(), self.Event()]  # type: ignore[list-item]


def answers(model: Path, asynchronous: bool) -> tuple[list[tuple[list[int], list[TokenLogprob]]], LabkitCore]:
    """What seven requests get, some of which sample, and some of which want log-probabilities."""
    chance = random.Random(3)
    core = LabkitCore(
        Deployment(
            model=str(model), device="cpu", max_batch=MOST, token_budget=64, kv_blocks=200,
            async_scheduling=asynchronous,
        )
    )  # fmt: skip
    core.warm_up()
    found: list[tuple[list[int], list[TokenLogprob]]] = []
    for i, length in enumerate((1, 16, 17, 60, 100, 7, 15)):
        sampling = SamplingParams(
            max_tokens=4 + i, ignore_eos=True, temperature=0.8 if i % 4 == 1 else 0.0, seed=i,
            logprobs=2 if i % 3 == 0 else None,
        )  # fmt: skip
        core.add(i, [chance.randrange(3, 390) for _ in range(length)], sampling)
        found.append(([], []))
    while core.has_work():
        for output in core.step():
            found[output.request_id][0].extend(output.token_ids)
            found[output.request_id][1].extend(output.logprobs)
    return found, core


@pytest.mark.parametrize("asynchronous", [False, True])
def test_padded_steps_at_fixed_addresses_give_the_same_answers(
    asynchronous: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = answers(tiny_model, asynchronous)
    sizes = [Size(1), Size(MOST), Size(0, CHUNKS, 64), Size(MOST, CHUNKS, 64)]
    monkeypatch.setattr(runner, "captured_sizes", lambda *_, **__: sizes)
    monkeypatch.setattr(runner, "GraphPool", CalledAgain)
    monkeypatch.setattr(runner, "Mailbox", OneAddress)
    # PyTorch's attention wants lengths from the host, which a graph has not.
    monkeypatch.setattr(
        attention, "paged_attention", lambda q, cache, meta: paged_attention_triton(q, cache, meta, q.shape[-1] ** -0.5)
    )
    launched: list[bool] = []
    run = runner.Runner.run

    def noted(self: runner.Runner, parts: dict[str, np.ndarray], size: Size, captured: bool) -> tuple[Tensor, Tensor]:
        launched.append(captured)
        return run(self, parts, size, captured)

    monkeypatch.setattr(runner.Runner, "run", noted)
    found, core = answers(tiny_model, asynchronous)
    assert len(launched) > 12 and all(launched[2:]), "all steps but those that warm up are of a size that was captured"
    assert core.stats().kv_blocks_used == 0
    for (tokens, logprobs), (right, right_logprobs) in zip(found, expected, strict=True):
        assert tokens == right
        for one, other in zip(logprobs, right_logprobs, strict=True):
            assert one.token_id == other.token_id and one.logprob == pytest.approx(other.logprob, abs=1e-4)
