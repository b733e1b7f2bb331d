"""The matrices of a layer, and the Hessians of what comes into them while calibration text runs through the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.kernels.activation import silu_mul
from labkit.models.decoder import Layer
from labkit.models.experts import Experts
from labkit.models.latent import LatentAttention
from labkit.models.layers import Linear, Norm

HESSIAN_BYTES = 8 * 2**30
"""Most memory of the Hessians that are summed up in one pass, unless a single one takes more."""


class Seen(Exception):
    """Raised from within a layer when all that is watched has been seen: the rest of it need not be computed."""


@dataclass(frozen=True)
class Matrix:
    """A matrix that is to be quantised. Several tensors of a checkpoint may lie in it, one after the other."""

    parameter: str
    """Its name in the layer, such as "attention.qkv.weight"."""
    expert: int | None = None
    """Which of a stack of matrices."""

    @property
    def name(self) -> str:
        """For people: "attention.qkv", "mlp.gate_up of expert 3"."""
        plain = self.parameter.removesuffix(".weight")
        return plain if self.expert is None else f"{plain} of expert {self.expert}"

    @property
    def half(self) -> Literal["attention", "mlp"]:
        """The half of the layer that it is in."""
        return "attention" if self.parameter.startswith("attention.") else "mlp"

    def weight(self, layer: nn.Module) -> Tensor:
        """[outputs, inputs], in place."""
        found = layer.get_parameter(self.parameter).data
        return found if self.expert is None else found[self.expert]


class Hessian:
    """2/n sum x x^T over the inputs x of a matrix, summed up in float32."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self._sum = torch.zeros(inputs, inputs, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """x: [tokens, inputs]."""
        self.tokens += len(x)
        if x.is_cuda and x.dtype != torch.float32:
            # The products of 16-bit numbers are exact in float32, in which the tensor cores add them up.
            self._sum += torch.mm(x.T, x, out_dtype=torch.float32)
        else:
            wide = x.float()
            self._sum.addmm_(wide.T, wide)

    def mean(self) -> Tensor:
        """The Hessian itself, once and for all: it takes the place of the sum. Zeros if there was no input."""
        return self._sum.mul_(2 / max(1, self.tokens))


def stages(layer: Layer, most_bytes: int = HESSIAN_BYTES) -> list[list[Matrix]]:
    """The layer's matrices in the order in which they are quantised. Those of one stage do not feed each other, and
    their Hessians take ``most_bytes`` at most, unless there is but one."""
    return [part for stage in _in_order(layer) for part in _split(layer, stage, most_bytes)]


def _in_order(layer: Layer) -> Iterator[list[Matrix]]:
    attention, mlp = layer.attention, layer.mlp
    if isinstance(attention, LatentAttention):
        yield [Matrix("attention.compress.weight")]
        expand = [Matrix("attention.q_expand.weight")] if attention.q_expand is not None else []
        yield [*expand, Matrix("attention.kv_expand")]
    else:
        yield [Matrix("attention.qkv.weight")]
    yield [Matrix("attention.out.weight")]
    for kind in ("gate_up", "down"):
        if isinstance(mlp, Experts):
            shared = [Matrix(f"mlp.shared.{kind}.weight")] if mlp.shared is not None else []
            yield [*(Matrix(f"mlp.{kind}", expert) for expert in range(mlp.shape.count)), *shared]
        else:
            yield [Matrix(f"mlp.{kind}.weight")]


def _split(layer: Layer, stage: list[Matrix], most_bytes: int) -> Iterator[list[Matrix]]:
    part: list[Matrix] = []
    size = 0
    for matrix in stage:
        wanted = 4 * matrix.weight(layer).shape[1] ** 2
        if part and size + wanted > most_bytes:
            yield part
            part, size = [], 0
        part.append(matrix)
        size += wanted
    yield part


@contextmanager
def watching(layer: Layer, stage: list[Matrix]) -> Iterator[dict[Matrix, Hessian]]:
    """While this is open, every pass through these matrices' half of the layer adds to their Hessians and raises
    ``Seen``."""
    device = next(layer.parameters()).device
    found = {matrix: Hessian(matrix.weight(layer).shape[1], device) for matrix in stage}
    single = [matrix for matrix in stage if matrix.expert is None]
    stacked = {matrix.expert: found[matrix] for matrix in stage if matrix.expert is not None}
    ticks = _Ticks(len(single) + bool(stacked))
    with ExitStack() as stack:
        for matrix in single:
            if matrix.parameter == "attention.kv_expand":
                stack.callback(_watch_latents(layer, found[matrix], ticks))
            else:
                stack.callback(_watch_linear(layer, matrix, found[matrix], ticks))
        if stacked:
            down = next(matrix for matrix in stage if matrix.expert is not None).parameter.endswith("down")
            stack.callback(_watch_experts(layer, stacked, down, ticks))
        yield found


class _Ticks:
    """Raises ``Seen`` every time that all of ``awaited`` have come."""

    def __init__(self, awaited: int) -> None:
        self._awaited, self._come = awaited, 0

    def tick(self) -> None:
        self._come += 1
        if self._come % self._awaited == 0:
            raise Seen


class _WatchedLinear(Linear):
    """A Linear that says what comes into it."""

    def __init__(self, watched: Linear, see: Callable[[Tensor], None]) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self._see = watched.weight, watched.bias, see

    def forward(self, x: Tensor) -> Tensor:
        self._see(x)
        return super().forward(x)

    def of_normed_sum(self, x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        normed, total = (norm(x), x) if residual is None else norm.of_sum(x, residual)
        return self(normed), total

    def silu_mul_of(self, x: Tensor) -> Tensor:
        return silu_mul(self(x))

    def silu_mul_of_normed_sum(self, x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        gate_up, total = self.of_normed_sum(x, residual, norm)
        return silu_mul(gate_up), total


def _watch_linear(layer: Layer, matrix: Matrix, hessian: Hessian, ticks: _Ticks) -> Callable[[], None]:
    """Returns what ends the watch; so do the functions below."""
    path, _, name = matrix.parameter.removesuffix(".weight").rpartition(".")
    parent = layer.get_submodule(path)
    watched = getattr(parent, name)

    def see(x: Tensor) -> None:
        hessian.add(x)
        ticks.tick()

    setattr(parent, name, _WatchedLinear(watched, see))
    return lambda: setattr(parent, name, watched)


def _watch_latents(layer: Layer, hessian: Hessian, ticks: _Ticks) -> Callable[[], None]:
    """The input of the expansion of latents is what its norm puts out."""

    def see(_module: nn.Module, _inputs: Any, normed: Tensor) -> None:
        hessian.add(normed)
        ticks.tick()

    return layer.get_submodule("attention.kv_norm").register_forward_hook(see).remove


def _watch_experts(layer: Layer, hessians: dict[int, Hessian], down: bool, ticks: _Ticks) -> Callable[[], None]:
    """Each expert sees the tokens that are routed to it; of ``down``, what its first matrix makes of them."""
    mlp = layer.mlp
    assert isinstance(mlp, Experts)

    def see(_module: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        normed, _ = mlp.norm.of_sum(*inputs)
        ids, _ = mlp.route(normed)
        for expert, hessian in hessians.items():
            x = normed[(ids == expert).any(1)]
            if len(x):
                hessian.add(silu_mul(F.linear(x, mlp.gate_up[expert])) if down else x)
        ticks.tick()

    return mlp.register_forward_pre_hook(see).remove
