"""Mixture of experts: which experts a token goes to, and the SwiGLU experts themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.kernels.moe_experts import experts_triton


def router(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    method: str = "greedy",
    correction_bias: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    normalise: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights, [tokens, top_k] int64 and float32, from logits [tokens, experts].

    ``scoring`` is "softmax" or "sigmoid". ``method`` is "greedy": the top_k best scores; "group_limited_greedy"
    (DeepSeek-V2): among the top_groups groups of experts with the best single score; "noaux_tc" (DeepSeek-V3): scores
    plus ``correction_bias`` [experts] choose, groups count by their two best, and the weights are the scores without
    it. With ``normalise`` a token's weights add up to ``scale``, else they are the scores times it. The order of a
    token's experts means nothing. Raises ValueError on another method or scoring.
    """
    if scoring == "softmax":
        scores = logits.float().softmax(-1)
    elif scoring == "sigmoid":
        scores = logits.float().sigmoid()
    else:
        raise ValueError(f"unknown scoring {scoring!r}")
    choice = scores if correction_bias is None else scores + correction_bias.float()
    if method in ("group_limited_greedy", "noaux_tc"):
        grouped = choice.unflatten(-1, (groups, -1))
        counted = 1 if method == "group_limited_greedy" else min(2, grouped.shape[-1])
        group_scores = grouped.topk(counted, dim=-1).values.sum(-1)
        best = group_scores.topk(top_groups, dim=-1, sorted=False).indices
        left_out = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
        choice = grouped.masked_fill(left_out[..., None], float("-inf")).flatten(1)
    elif method != "greedy":
        raise ValueError(f"unknown routing method {method!r}")
    ids = choice.topk(top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, ids)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * scale


def experts(x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The weighted sum of each token's SwiGLU experts, added up in float32; returns [tokens, hidden].

    x: [tokens, hidden]; expert_ids, expert_weights: [tokens, top_k], float32 weights; gate_up: [experts, 2 * inner,
    hidden], gate in the first half; down: [experts, hidden, inner]. Dispatch: the kernels on CUDA, PyTorch elsewhere.
    """
    run = experts_triton if x.is_cuda else experts_reference
    return run(x, expert_ids, expert_weights, gate_up, down)


def experts_reference(x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """``experts`` in PyTorch, an expert at a time."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in expert_ids.unique().tolist():
        tokens, places = torch.where(expert_ids == expert)
        gate, up = (x[tokens] @ gate_up[expert].T).chunk(2, dim=-1)
        found = (F.silu(gate) * up) @ down[expert].T
        out.index_add_(0, tokens, found.float() * expert_weights[tokens, places, None])
    return out.to(x.dtype)
