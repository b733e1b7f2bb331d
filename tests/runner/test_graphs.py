"""Which graph a step runs in; that a graph computes what it should is tested where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from labkit.deployment import Deployment
from labkit.runner.graphs import CHUNKS, GraphPool, decode_sizes, mixed_sizes
from labkit.runner.inputs import Size
from labkit.runner.runner import captured_sizes


@pytest.mark.parametrize("most", [1, 2, 5, 100, 256, 600, 1024])
def test_every_batch_has_a_graph_that_is_little_larger(most: int) -> None:
    pool = GraphPool([Size(rows) for rows in decode_sizes(most)])
    for rows in range(1, most + 1):
        fitting = pool.fit(Size(rows))
        assert fitting is not None and rows <= fitting.decodes <= min(most, max(rows + 7, rows * 9 / 8))
    assert pool.fit(Size(most + 1)) is None


def test_a_step_with_prompts_is_padded_in_both_directions() -> None:
    pool = GraphPool(mixed_sizes(max_batch=64, token_budget=512))
    assert pool.fit(Size(0, 1, 5)) == Size(0, CHUNKS, 64)
    assert pool.fit(Size(9, 3, 65)) == Size(16, CHUNKS, 128)
    assert pool.fit(Size(64, CHUNKS, 512)) == Size(64, CHUNKS, 512)
    for too_large in (Size(65, 1, 5), Size(1, 1, 513), Size(1, CHUNKS + 1, 60)):
        assert pool.fit(too_large) is None
    assert pool.fit(Size(3)) is None, "these graphs all prefill"
    assert pool.sizes[0].tokens == max(size.tokens for size in pool.sizes)


def test_only_static_steps_on_a_gpu_are_captured() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert captured_sizes(Deployment(), cpu) == []
    for knobs in ({"cuda_graphs": False}, {"attention": "sdpa"}):
        assert captured_sizes(Deployment(**knobs), cuda) == []
    assert any(size.chunks for size in captured_sizes(Deployment(), cuda))
    assert not any(size.chunks for size in captured_sizes(Deployment(chunked_prefill=False), cuda))
    assert not any(size.chunks for size in captured_sizes(Deployment(), cuda, chunks=False))
