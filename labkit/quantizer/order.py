"""In which order GPTQ rounds the inputs of a matrix.

An input that is rounded early has all the others left to make its error good, so those that weigh most in the output,
by the diagonal of the Hessian, come first ("act-order"). In any order at all, inputs that follow each other would no
longer share a scale, and readers would have to look up the group of each (``g_idx``). Here groups stay whole: they are
ordered among themselves, by the weightiest input of each, and inputs within their group. That is nearly as good, and
the checkpoint is one that any reader takes, with ``g_idx`` trivial.
"""

from __future__ import annotations

import torch
from torch import Tensor


def act_order(importance: Tensor, group: int) -> Tensor:
    """Inputs by importance, least first (``labkit.quantizer.gptq`` goes from the last to the first), groups kept whole.

    importance: [inputs], of which ``group`` divides the number; returns [inputs] int64, a permutation.
    """
    grouped = importance.view(-1, group)
    groups = grouped.max(1).values.argsort(dim=0, stable=True)
    within = grouped.argsort(dim=1, stable=True)
    begins = torch.arange(0, importance.numel(), group, device=importance.device)
    return (begins[:, None] + within)[groups].flatten()
