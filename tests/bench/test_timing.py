from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from labkit.bench import timing
from labkit.bench.ceilings import Ceilings
from labkit.bench.timing import CACHE_BYTES, input_sets, seconds_a_call

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_small_inputs_get_more_sets_than_large_ones():
    assert input_sets(CACHE_BYTES) == input_sets(10 * CACHE_BYTES) == 2
    assert input_sets(CACHE_BYTES / 5) == 5
    assert input_sets(1) == 32


def test_the_median_call_goes_round_the_sets(monkeypatch):
    seen, clock = [], [0.0]

    def call(number):
        seen.append(number)
        clock[0] += 0.02 if len(seen) == 5 else 0.002

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert seconds_a_call(call, [(0,), (1,)], torch.device("cpu")) == pytest.approx(0.002)
    assert seen == [0, 1] * 4


@pytest.mark.clock
def test_twice_the_work_takes_about_twice_as_long():
    def seconds(size):
        tensors = (torch.zeros(size, device=DEVICE), torch.ones(size, device=DEVICE))
        return seconds_a_call(lambda into, what: into.copy_(what), [tensors] * 2, DEVICE)

    assert 1.2 < seconds(2**25) / seconds(2**23) < 16


def test_ceilings_read_like_a_data_sheet():
    assert str(Ceilings(4.2e12, 7.9e14, "how")) == "copy 4.2 TB/s, matmul 790 TFLOP/s (how)"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_call_that_cannot_be_captured_is_timed_and_random_numbers_work_afterwards():
    numbers = torch.rand(1000, device=DEVICE)
    assert 0 < seconds_a_call(lambda x: x.sum().item(), [(numbers,), (numbers,)], DEVICE) < 1e-2
    assert torch.randn(10, device=DEVICE).isfinite().all()
