"""The most memory that work holds at once, counted by hand beside it."""

from __future__ import annotations

import torch
from torch import nn

from labkit.probes.peak import peak_bytes

CPU = torch.device("cpu")


def test_the_peak_is_what_lives_at_once():
    kept = torch.ones(1000)

    def work():
        one = kept + 1  # 4,000 bytes
        other = one * 2  # 4,000 more
        del one
        kept.add_(other)  # in place: nothing new
        third = other.double()  # 8,000, beside the 4,000 of the other
        return third.view(10, 100).sum()  # a view, then 8 bytes

    assert peak_bytes(work, [kept], CPU) == 12_008
    assert peak_bytes(work, [], CPU) == 16_008, "what is not known is counted when it is first returned"


def test_activations_that_are_kept_for_the_backward_pass_count():
    layers = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(6)])
    x = torch.ones(100, 64)
    one_layer = 100 * 64 * 4
    forward = peak_bytes(lambda: layers(x), layers.parameters(), CPU)
    with torch.no_grad():
        bare = peak_bytes(lambda: layers(x), layers.parameters(), CPU)
    # a tanh keeps its result, and one more is on its way
    assert bare <= 3 * one_layer < 6 * one_layer <= forward
