from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from labkit.training.modeldir import write_model
from labkit.training.network import CHECKPOINTING, Network, Shape, weighted_loss
from labkit.training.tokenizer import train_tokenizer

SHAPE = Shape(hidden=48, layers=3, heads=6, kv_heads=2, intermediate=80, context=256, rope_theta=500.0)


@pytest.fixture(scope="module")
def network() -> Network:
    """A random one whose biases and norms do something, in bfloat16 steps, so that writing it loses nothing."""
    network = Network(SHAPE, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((parameter + 0.2 * drawn).bfloat16().float())
    return network


def test_logits_are_those_of_transformers(network: Network, tmp_path: Path) -> None:
    write_model(network, train_tokenizer(), tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, SHAPE.vocabulary, (2, 200), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours, theirs = network(ids), other(ids).logits
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_loss_is_cross_entropy_of_next_tokens_each_counted_by_its_weight(network: Network) -> None:
    ids = torch.randint(0, SHAPE.vocabulary, (2, 12), generator=torch.Generator().manual_seed(2))
    weights = torch.tensor([[3, 0, 0, 0, 1, 1, 1, 3, 3, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 3]])
    logits = network(ids)
    terms, total = torch.zeros(()), 0
    for row in range(2):
        # no token precedes the first, so its weight counts for nothing
        for place in range(1, 12):
            count = int(weights[row, place])
            terms = terms + count * F.cross_entropy(logits[row, place - 1], ids[row, place])
            total += count
    torch.testing.assert_close(weighted_loss(network, ids, weights), terms / total)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    one, same, other = (Network(SHAPE, seed).model.embed_tokens.weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("policy", CHECKPOINTING)
def test_gradients_are_the_same_whatever_is_recomputed(network: Network, policy: str) -> None:
    ids = torch.randint(0, SHAPE.vocabulary, (2, 40), generator=torch.Generator().manual_seed(2))
    weights = torch.ones(2, 40, dtype=torch.uint8)
    plain = torch.autograd.grad(weighted_loss(network, ids, weights), list(network.parameters()))
    seen: list[int] = []
    hooks = [layer.mlp.register_forward_pre_hook(lambda *_: seen.append(1)) for layer in network.model.layers]
    network.checkpointing = policy
    try:
        loss = weighted_loss(network, ids, weights)
        assert len(seen) == SHAPE.layers
        found = torch.autograd.grad(loss, list(network.parameters()))
    finally:
        network.checkpointing = "none"
        for hook in hooks:
            hook.remove()
    # that the feed-forward ran again shows that it was not kept
    assert len(seen) - SHAPE.layers == {"all": 3, "half": 1, "mlp": 3}.get(policy, 0)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other)
