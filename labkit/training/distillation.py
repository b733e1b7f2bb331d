"""Distillation: a smaller ledger model learns from the logits of a larger one, over the documents that train both."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from labkit.errors import UserError
from labkit.training.decoding import greedy
from labkit.training.evidence import EVIDENCE
from labkit.training.modeldir import read_model
from labkit.training.network import Network, Shape, next_token_losses, weighted_mean
from labkit.training.options import DistillOptions, TrainOptions, has_bf16
from labkit.training.tokenizer import TURN_END, train_tokenizer
from labkit.training.trainer import Say, Trained, train

STUDENTS = {
    # how the shipped student is trained
    "ledger-r1-mini": TrainOptions(
        lr=2.5e-3,
        shape=Shape(layers=4, hidden=192, heads=6, kv_heads=2, intermediate=512),
        distill=DistillOptions(hints=1.0),
    ),
}
HINTED = 0.6
"""Of a training, the part in which hints count."""
LONGEST_COMPLETION = 176
"""Tokens that a student writes at most where it writes its own completions; the longest right one has fewer."""


@dataclass(frozen=True)
class Teacher:
    """A model that teaches: its network without gradients, and what the card of a student says of it.

    ``exact_match`` maps buckets to the share of right answers on record, and is empty where there is no record.
    """

    network: Network
    tokenizer: Tokenizer
    name: str
    digest: str
    exact_match: dict[str, float]


def student(preset: str, shape: dict[str, Any], taught: dict[str, Any], **changes: Any) -> TrainOptions:
    """The preset with other sizes, other ways of being taught and other options, those that are None aside.

    Raises UserError for what cannot be.
    """
    if preset not in STUDENTS:
        raise UserError(f"no preset {preset!r}; there are {', '.join(STUDENTS)}")
    options = STUDENTS[preset]
    return replace(
        options,
        shape=replace(options.shape, **_given(shape)),
        distill=replace(options.distill or DistillOptions(), **_given(taught)),
        **_given(changes),
    ).checked()


def _given(changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in changes.items() if value is not None}


def read_teacher(directory: Path, device: str, dtype: torch.dtype) -> Teacher:
    """Raises UserError for a directory that holds no ledger model."""
    network, tokenizer = read_model(directory, device, dtype)
    if tokenizer.to_str() != train_tokenizer().to_str():
        raise UserError(f"{directory} has another tokenizer than the ledger task; a student could not learn from it")
    digest = hashlib.sha256()
    for file in sorted(directory.glob("model*.safetensors")):
        digest.update(file.read_bytes())
    network.requires_grad_(False).eval()
    return Teacher(network, tokenizer, directory.resolve().name, digest.hexdigest(), _exact_match(directory))


def _exact_match(directory: Path) -> dict[str, float]:
    record = directory / EVIDENCE / "evaluation.json"
    if not record.is_file():
        return {}
    account = json.loads(record.read_text(encoding="utf-8"))
    return {bucket: share["share"] for bucket, share in account["buckets"].items()}


def distill(
    options: TrainOptions,
    teacher_directory: Path,
    out: Path,
    checkpoints: Path,
    runs: Path,
    resume: bool = False,
    say: Say | None = None,
) -> Trained:
    """Trains a student of ``options.shape`` into directory ``out``, as ``train`` does.

    Raises UserError as ``train``, and for a teacher that cannot be one.
    """
    fast = options.autocast and has_bf16(options.device)
    teacher = read_teacher(teacher_directory, options.device, torch.bfloat16 if fast else torch.float32)
    taught = replace(options.distill or DistillOptions(), teacher=teacher.name, digest=teacher.digest)
    if taught.copy_layers is None:
        taught = replace(taught, copy_layers=spread(options.shape.layers, teacher.network.shape.layers))
    _check_layers(taught.copy_layers or (), teacher)
    # what the student shares with the teacher whatever its sizes
    like = teacher.network.shape
    shape = replace(options.shape, context=like.context, rope_theta=like.rope_theta, norm_eps=like.norm_eps)
    options = replace(options, shape=shape, distill=taught)

    def teach(network: Network) -> Distillation:
        copied = copy_weights(network, teacher.network, taught.copy_layers or ())
        return Distillation(network, teacher, taught, options.seed, copied)

    return train(options, out, checkpoints, runs, resume, say, teach)


def _check_layers(layers: Sequence[int], teacher: Teacher) -> None:
    last = teacher.network.shape.layers - 1
    if any(not 0 <= layer <= last for layer in layers):
        raise UserError(f"--copy-layers must name layers of {teacher.name}, 0 to {last}")


def spread(few: int, many: int) -> tuple[int, ...]:
    """``few`` of the layers 0 to ``many`` - 1, as evenly as can be, the first and the last among them."""
    if few > many:
        return ()
    return tuple(round(place * (many - 1) / max(few - 1, 1)) for place in range(few))


@torch.no_grad()
def copy_weights(student: Network, teacher: Network, layers: Sequence[int]) -> list[str]:
    """Lets the student begin as parts of its teacher, where their shapes allow; returns the names of what was copied.

    Embedding and last norm go along with the layers. A narrower feed-forward takes the strongest of the teacher's
    neurons. A student of another width has nothing in common with its teacher.
    """
    if not layers or student.shape.hidden != teacher.shape.hidden:
        return []
    source = teacher.state_dict()
    wanted = {"model.embed_tokens.weight": "model.embed_tokens.weight", "model.norm.weight": "model.norm.weight"}
    for own, layer in enumerate(layers):
        for name in student.model.layers[own].state_dict():
            wanted[f"model.layers.{own}.{name}"] = f"model.layers.{layer}.{name}"
    copied = []
    for name, parameter in student.named_parameters():
        found = source[wanted[name]].float()
        if ".mlp." in name:
            found = _strongest(found, name, source, wanted, student.shape.intermediate)
        if found.shape == parameter.shape:
            parameter.copy_(found)
            copied.append(name)
    return copied


def _strongest(found: Tensor, name: str, source: dict[str, Tensor], wanted: dict[str, str], most: int) -> Tensor:
    """Of a feed-forward matrix, the rows or columns of the ``most`` neurons that write and are written to most."""
    prefix = name.rpartition(".mlp.")[0]
    up, down = (source[wanted[f"{prefix}.mlp.{part}_proj.weight"]].float() for part in ("up", "down"))
    kept = (up.norm(dim=1) * down.norm(dim=0)).topk(min(most, up.shape[0])).indices.sort().values
    return found[:, kept] if "down_proj" in name else found[kept]


class Distillation:
    """The loss of a student: towards the teacher's distributions and towards the right tokens."""

    def __init__(
        self, network: Network, teacher: Teacher, options: DistillOptions, seed: int, copied: Sequence[str] = ()
    ) -> None:
        self._student, self._teacher, self._about = network, teacher.network, teacher
        self._options, self._seed, self._copied = options, seed, copied
        stop = teacher.tokenizer.token_to_id(TURN_END)
        assert stop is not None, "the tokenizer is that of the ledger task"
        self._stop = stop
        # on the device from the start: a scalar sent in every step would have the host wait for it
        self._hard = torch.tensor(options.hard, device=next(network.parameters()).device)
        self._none = torch.zeros_like(self._hard)
        self._hinted = hinted_layers(network.shape.layers, teacher.network.shape.layers) if options.hints else ()
        self._bridges = _bridges(network, teacher.network, len(self._hinted))
        # of the network while it learns, so that they are learnt and kept with it; no part of the model
        network.add_module("hints", self._bridges)

    def inputs(self, ids: Tensor, weights: Tensor, key: str | None, done: float) -> tuple[Tensor, ...]:
        """Documents, weights, how much right tokens count (of completions that the student writes there are none) and
        how much hints do."""
        hard = self._hard
        if key is not None and random.Random(f"on-policy/{self._seed}/{key}").random() < self._options.on_policy:
            ids, weights = written_by(self._student, ids, weights, self._stop)
            hard = self._none
        hints = self._options.hints * max(0.0, 1 - done / HINTED)
        return ids, weights, hard, torch.full_like(self._hard, hints)

    def loss(self, ids: Tensor, weights: Tensor, hard: Tensor, hints: Tensor) -> Tensor:
        """Float32 scalar, nats; teacher and student in one pass."""
        with torch.no_grad():
            theirs = self._teacher.states(ids)
            wise = self._teacher.logits(theirs[-1])
        ours = self._student.states(ids)
        logits = self._student.logits(ours[-1])
        temperature = self._options.temperature
        soft = self._options.soft * temperature**2 * divergence(logits, wise, temperature)
        loss = weighted_mean(soft + hard * next_token_losses(logits, ids), weights)
        for bridge, (own, layer) in zip(self._bridges, self._hinted, strict=True):
            loss = loss + hints * distance(bridge(ours[own]), theirs[layer]) / len(self._hinted)
        return loss

    def facts(self) -> dict[str, Any]:
        """What the card of the student says of its teacher."""
        about, shape = self._about, self._teacher.shape
        teacher = {
            "name": about.name,
            "parameters": sum(parameter.numel() for parameter in about.network.parameters()),
            "shape": asdict(shape),
            "exact_match": about.exact_match,
        }
        return {"teacher": teacher, "copied": list(self._copied)}


def hinted_layers(few: int, many: int) -> tuple[tuple[int, int], ...]:
    """Layers of the student, each with the one of the teacher that it should have come as far as; the last, whose state
    is for the next token alone, is left out."""
    return tuple((own, round((own + 1) * many / few) - 1) for own in range(few - 1))


def _bridges(student: Network, teacher: Network, count: int) -> nn.ModuleList:
    """Maps from the student's states to the teacher's."""
    found = nn.ModuleList(nn.Linear(student.shape.hidden, teacher.shape.hidden) for _ in range(count))
    generator = torch.Generator().manual_seed(0)
    for bridge in found:
        nn.init.normal_(bridge.weight, std=student.shape.hidden**-0.5, generator=generator)  # type: ignore[arg-type]
        nn.init.zeros_(bridge.bias)  # type: ignore[arg-type]
    return found.to(next(student.parameters()).device)


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance of states [B, L, hidden], float32 scalar: the hints of FitNets,
    https://arxiv.org/abs/1412.6550.

    The teacher's are put to the same length at every token, and then to mean 0 and variance 1 in every dimension: a few
    tokens and dimensions are far louder than the others, and no more important.
    """
    teacher = F.rms_norm(teacher.float(), teacher.shape[-1:])
    variance, mean = torch.var_mean(teacher, dim=(0, 1), keepdim=True)
    return (student.float() - (teacher - mean) * torch.rsqrt(variance + 1e-6)).square().mean()


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) in nats, float32 [...], of logits [..., vocabulary], both divided by ``temperature``."""
    theirs = F.log_softmax(teacher.float() / temperature, dim=-1)
    ours = F.log_softmax(student.float() / temperature, dim=-1)
    return (theirs.exp() * (theirs - ours)).sum(-1)


def written_by(network: Network, ids: Tensor, weights: Tensor, stop: int) -> tuple[Tensor, Tensor]:
    """The first prompt of every document with what ``network`` makes of it, which counts once a token; shapes stay.

    Greedy, as the model is served. ``weights`` say where the prompts end.
    """
    first = weights.bool().long().argmax(dim=1).tolist()
    prompts = [row[:end] for row, end in zip(ids.tolist(), first, strict=True)]
    room = min(LONGEST_COMPLETION, network.shape.context - max(first))
    written, counted = torch.zeros_like(ids), torch.zeros_like(weights)
    for row, tokens in enumerate(greedy(network, prompts, stop, room)):
        end = len(prompts[row])
        tokens = tokens[: ids.shape[1] - end]
        written[row, :end] = ids[row, :end]
        written[row, end : end + len(tokens)] = torch.tensor(tokens, device=ids.device)
        counted[row, end : end + len(tokens)] = 1
    return written, counted
