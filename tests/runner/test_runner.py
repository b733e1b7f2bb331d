from __future__ import annotations

from pathlib import Path

import pytest
import torch

from labkit.deployment import Deployment
from labkit.errors import UserError
from labkit.models.loading import open_checkpoint
from labkit.runner import cache as kv
from labkit.runner.runner import Runner, torch_device

BLOCK_BYTES = 2 * 2 * 2 * 16 * 16 * 4  # keys and values, layers, kv heads, block, head dim, float32


def runner(tiny_model: Path, **knobs: object) -> Runner:
    deployment = Deployment(model=str(tiny_model), device="cpu", **knobs)  # type: ignore[arg-type]
    return Runner(open_checkpoint(str(tiny_model)), deployment)


def test_the_cache_takes_what_is_free_but_no_more_than_it_can_use(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv, "free_bytes", lambda *_: 100 * BLOCK_BYTES + 1)
    assert runner(tiny_model).blocks == 100
    assert runner(tiny_model, max_batch=2).blocks == 2 * 512 // 16
    assert runner(tiny_model, max_batch=2, max_context=40).blocks == 80 // 16
    assert sum(layer.nbytes for layer in runner(tiny_model).cache) == 100 * BLOCK_BYTES
    monkeypatch.setattr(kv, "free_bytes", lambda *_: BLOCK_BYTES - 1)
    with pytest.raises(UserError, match="no memory for the KV cache"):
        runner(tiny_model)


def test_the_context_is_what_the_cache_holds_unless_it_is_asked_for(tiny_model: Path) -> None:
    assert runner(tiny_model).max_context == 512
    assert runner(tiny_model, kv_blocks=3).max_context == 48
    assert runner(tiny_model, max_context=100).max_context == 100
    assert runner(tiny_model, max_context=100, kv_blocks=3).max_context == 100
    assert runner(tiny_model, max_context=9999).max_context == 512


@pytest.mark.parametrize("knobs", [{}, {"kv_blocks": 1, "kv_block_size": 2}, {"kv_block_size": 1}, {"max_context": 2}])
def test_warm_up_fits_in_any_cache(tiny_model: Path, knobs: dict[str, int]) -> None:
    runner(tiny_model, **knobs).warm_up()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_cache_is_zero(tiny_model: Path, dtype: torch.dtype) -> None:
    layers = kv.allocate(open_checkpoint(str(tiny_model)).shape, 3, 4, torch.device("cpu"), dtype)
    assert [tuple(layer.shape) for layer in layers] == [(2, 2, 3, 4, 16)] * 2
    assert all(layer.dtype == dtype and not layer.any() for layer in layers)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_explained() -> None:
    with pytest.raises(UserError, match="no CUDA device"):
        torch_device("cuda")
    assert torch_device("auto").type == "cpu"
