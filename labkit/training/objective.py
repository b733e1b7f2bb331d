"""What a step makes small: the trainer asks an objective for a loss, and does not care which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from labkit.training.network import Network, weighted_loss


class Objective(Protocol):
    """A loss over documents. One object serves a whole training, in every step alike."""

    def inputs(self, ids: Tensor, weights: Tensor, key: str | None, done: float) -> tuple[Tensor, ...]:
        """What ``loss`` takes, of documents int64 [B, L] and weights uint8 [B, L], not compiled.

        ``key`` names the batch; None is a batch made up to compile for. ``done`` is the fraction of the training that
        lies behind.
        """

    @property
    def loss(self) -> Callable[..., Tensor]:
        """Takes ``inputs`` and returns a float32 scalar, compiled where the training is."""

    def facts(self) -> dict[str, Any]:
        """What the manifest of the training shall say of it besides, JSON-ready."""


class NextToken:
    """The cross-entropy of the documents' own tokens."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def inputs(self, ids: Tensor, weights: Tensor, key: str | None, done: float) -> tuple[Tensor, ...]:
        """The documents as they are."""
        return ids, weights

    def loss(self, ids: Tensor, weights: Tensor) -> Tensor:
        """``weighted_loss``."""
        return weighted_loss(self._network, ids, weights)

    def facts(self) -> dict[str, Any]:
        """None."""
        return {}
