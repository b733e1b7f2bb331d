"""Trainings that differ in one option: which there are, and what one of them tells."""

from __future__ import annotations

import math

import pytest
import torch

from labkit.bench.training import SIZES
from labkit.training.network import Network, Shape, weighted_loss
from labkit.training.options import TrainOptions
from labkit.training.variants import WARM_UP, Size, VariantRun, base_options, documents, groups


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_group_varies_one_thing_from_the_same_beginning(device):
    size = SIZES[device]
    found = groups(size, device)
    base = next(iter(found["optimizer"].values())).options
    allowed = {
        "optimizer": {"optimizer"},
        "activations": {"checkpointing"},
        f"micro-batch x accumulation to {size.batch}": {"micro_batch", "accumulate"},
        "precision": {"autocast"},
        "torch.compile": {"compile", "checkpointing"},
    }
    for name, variants in found.items():
        for variant in variants.values():
            options = variant.options
            changed = {
                field for field in TrainOptions.__dataclass_fields__ if getattr(options, field) != getattr(base, field)
            }
            assert changed <= allowed[name]
            assert options.micro_batch * options.accumulate == size.batch
        assert base in [variant.options for variant in variants.values()]
    assert ("torch.compile" in found) == (device == "cuda")


def test_a_run_trains_and_tells_its_losses() -> None:
    size = Size(Shape(hidden=16, layers=2, heads=2, kv_heads=1, intermediate=32), 2, 1, 3)
    batches = documents(size, WARM_UP + 3)
    assert batches[0].ids.shape == (2, 768)
    run = VariantRun(base_options(size, "cpu"), batches, torch.device("cpu"), print)
    run.go_on(3)
    losses = run.losses()
    assert len(losses) == WARM_UP + 3 and len(run.speeds) == 1 and 0 < run.state < run.peak
    assert run.loss() == pytest.approx(sum(losses[-3:]) / 3)
    # the first loss is that of untrained weights, by the network alone: the mean over micro-batches of one document
    ids, weights = torch.from_numpy(batches[0].ids).long(), torch.from_numpy(batches[0].weights)
    network = Network(size.shape, 1)
    parts = [weighted_loss(network, ids[row : row + 1], weights[row : row + 1]) for row in range(2)]
    right = float(torch.stack(parts).mean().detach())
    assert losses[0] == pytest.approx(right, rel=1e-2) and right == pytest.approx(math.log(768), rel=0.05)
