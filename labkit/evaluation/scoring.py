"""What models make of given text: how likely they find it, and how far two of them agree about each next token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.errors import UserError
from labkit.kernels.metadata import AttentionMetadata
from labkit.models.loading import load_model, open_checkpoint
from labkit.runner.cache import allocate

WINDOW = 2048
"""Tokens of a text that are read together; none is predicted from what lies before its window."""
_BLOCK = 16
_STEP_TOKENS = {"cpu": 4096, "cuda": 16384}
_ROWS = 1024


@dataclass(frozen=True)
class Passage:
    """Token ids, of which those from ``start`` on (1 or more) are to be predicted, each from all before it."""

    ids: list[int]
    start: int


@dataclass
class Scores:
    """Sums over predicted tokens, in nats; the last three are of a reference model where there is one."""

    tokens: int = 0
    loss: float = 0.0
    reference_loss: float = 0.0
    divergence: float = 0.0
    agreeing: int = 0

    def account(self, compared: bool) -> dict[str, float]:
        """JSON-ready: means, perplexities, and the share of tokens on whose first choice both agree."""
        found = {"tokens": self.tokens, "loss": self.loss / self.tokens, "perplexity": _perplexity(self.loss, self)}
        if compared:
            found |= {
                "reference_loss": self.reference_loss / self.tokens,
                "reference_perplexity": _perplexity(self.reference_loss, self),
                "divergence": self.divergence / self.tokens,
                "agreement": self.agreeing / self.tokens,
            }
        return found


def _perplexity(loss: float, scores: Scores) -> float:
    return math.exp(min(loss / scores.tokens, 700.0))


class Scorer:
    """A model that reads but does not write: labkit's own decoder, whatever it can load."""

    def __init__(self, model: str, device: str, dtype: torch.dtype) -> None:
        """Raises UserError for a model that cannot be loaded."""
        checkpoint = open_checkpoint(model)
        self.vocabulary, self.context = checkpoint.shape.vocab_size, checkpoint.shape.max_positions
        self._device, self._dtype = torch.device(device), dtype
        self._decoder = load_model(checkpoint, self._device, dtype)

    def hidden(self, passages: Sequence[Passage]) -> Tensor:
        """[predicted tokens, hidden]: what each is predicted from, passage after passage."""
        lengths = [len(passage.ids) for passage in passages]
        blocks = [-(-length // _BLOCK) for length in lengths]
        tables = torch.zeros(len(passages), max(blocks), dtype=torch.int32)
        slots, rows, first_block, first_row = [], [], 0, 0
        for row, (passage, count) in enumerate(zip(passages, blocks, strict=True)):
            tables[row, :count] = torch.arange(first_block, first_block + count)
            slots.append(first_block * _BLOCK + torch.arange(len(passage.ids)))
            rows.append(first_row + torch.arange(passage.start - 1, len(passage.ids) - 1))
            first_block, first_row = first_block + count, first_row + len(passage.ids)
        on = self._device
        meta = AttentionMetadata(
            query_lens=lengths,
            context_lens=lengths,
            contexts=torch.tensor(lengths, dtype=torch.int32, device=on),
            query_starts=torch.tensor([0, *lengths]).cumsum(0).int().to(on),
            block_tables=tables.to(on),
            slots=torch.cat(slots).to(on),
            decodes=0,
        )
        cache = allocate(self._decoder.shape, first_block, _BLOCK, on, self._dtype)
        ids = torch.tensor([token for passage in passages for token in passage.ids], device=on)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(on)
        out: Tensor = self._decoder(ids, positions, cache, meta)
        return out[torch.cat(rows).to(on)]

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, vocabulary] float32 of rows of ``hidden``; on CUDA rounded to the weights' dtype, as when serving."""
        return self._decoder.logits(hidden).float()


@torch.inference_mode()
def score(
    model: Scorer,
    passages: Sequence[Passage],
    reference: Scorer | None = None,
    read: Callable[[int], None] = lambda tokens: None,
) -> Scores:
    """Sums over all predicted tokens of ``passages``; ``read`` is told how many tokens more were read.

    Raises UserError for a passage that is longer than a model's context.
    """
    both = [model] if reference is None else [model, reference]
    longest = max((len(passage.ids) for passage in passages), default=0)
    if longest > (most := min(each.context for each in both)):
        raise UserError(f"a text of {longest} tokens is longer than a model's context of {most}")
    scores = Scores()
    for some in _steps(passages, _STEP_TOKENS[model._device.type]):
        targets = torch.tensor([token for passage in some for token in passage.ids[passage.start :]])
        hidden = [each.hidden(some) for each in both]
        for begin in range(0, len(targets), _ROWS):
            part = slice(begin, begin + _ROWS)
            _add(scores, [each.logits(rows[part]) for each, rows in zip(both, hidden, strict=True)], targets[part])
        read(sum(len(passage.ids) for passage in some))
    return scores


def _steps(passages: Sequence[Passage], most: int) -> Iterator[list[Passage]]:
    step: list[Passage] = []
    for passage in passages:
        if step and sum(len(each.ids) for each in step) + len(passage.ids) > most:
            yield step
            step = []
        step.append(passage)
    if step:
        yield step


def _add(scores: Scores, logits: list[Tensor], targets: Tensor) -> None:
    """``logits``: of the model and, if there is one, of the reference, each [rows, vocabulary] float32."""
    targets = targets.to(logits[0].device)
    logs = [F.log_softmax(each, dim=-1) for each in logits]
    losses = [-each.gather(1, targets[:, None]).double().sum().item() for each in logs]
    scores.tokens += len(targets)
    scores.loss += losses[0]
    if len(logs) > 1:
        ours, theirs = logs
        scores.reference_loss += losses[1]
        scores.divergence += (theirs.exp() * (theirs - ours)).sum(-1).double().sum().item()
        scores.agreeing += int((ours.argmax(-1) == theirs.argmax(-1)).sum())


def read_text(path: Path) -> str:
    """A user's text. Raises UserError for a file that is missing, empty or no UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"no text file {path}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise UserError(f"{path} is empty; give a text of some pages")
    return text


def windows(ids: list[int], size: int) -> list[Passage]:
    """The text in pieces of ``size`` tokens, of which all but the first are predicted; a last one of 1 is dropped."""
    pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
    return [Passage(piece, 1) for piece in pieces if len(piece) > 1]
