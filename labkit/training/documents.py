"""Training documents: a blotter, a question as it is served, then as many more as fit; and processes that write them.

Batch ``counter`` of a bucket is a pure function of (seed, bucket, counter): however many processes write, whoever
resumes, it holds the same documents.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from labkit.training.ledger import FIRST_TRAINING_SEED, Blotter, Question, ask, make_blotter
from labkit.training.tokenizer import THINK, THINK_END, TURN_END, TURN_START, PieceTable, prompt_text

# room for the longest prompt of the bucket and any one answer
LENGTHS = {"short": 768, "medium": 2304, "long": 4352}
ANSWER_WEIGHT = 3
_FAMILY_SHARES = {
    "lookup": 1.0,
    "net": 1.5,
    "notional": 1.0,
    "fees": 1.3,
    "largest": 1.3,
    "count": 1.3,
    "limit": 1.0,
    "headline": 0.4,
}


@dataclass(frozen=True)
class Batch:
    """``ids`` int16 [rows, length]; ``weights`` uint8 of that shape: how much predicting this token counts, or 0."""

    bucket: str
    counter: int
    ids: np.ndarray
    weights: np.ndarray


def make_batch(table: PieceTable, seed: int, bucket: str, counter: int, rows: int, length: int | None = None) -> Batch:
    """Batch ``counter`` of ``bucket`` with ``rows`` documents of ``length`` tokens (the bucket's own by default)."""
    length = length or LENGTHS[bucket]
    ids = np.zeros((rows, length), dtype=np.int16)
    weights = np.zeros((rows, length), dtype=np.uint8)
    for row in range(rows):
        rng = random.Random(f"document/{FIRST_TRAINING_SEED + seed}/{bucket}/{counter}/{row}")
        tokens, counts = make_document(rng, table, bucket, length)
        ids[row, : len(tokens)] = tokens
        weights[row, : len(counts)] = counts
    return Batch(bucket, counter, ids, weights)


def make_document(rng: random.Random, table: PieceTable, bucket: str, length: int) -> tuple[list[int], list[int]]:
    """Token ids and weights of one document of at most ``length`` tokens; no question comes twice."""
    blotter = make_blotter(rng, bucket)
    asked: set[str] = set()
    tokens: list[int] = []
    weights: list[int] = []
    families, shares = list(_FAMILY_SHARES), _cumulated(list(_FAMILY_SHARES.values()))
    misses = 0
    while misses < 4:
        question = _ask_any(rng, blotter, families, shares)
        if question.key in asked:
            misses += 1
            continue
        text = f"\n{TURN_START}user\n{question.text}{TURN_END}\n{TURN_START}assistant\n"
        opening = text if tokens else prompt_text(f"{blotter.text}\n{question.text}")
        asking = table.encode(opening)
        thought = table.encode(f"{THINK}{question.thought}{THINK_END}")
        answer = table.encode(f"{question.answer}{TURN_END}")
        if len(tokens) + len(asking) + len(thought) + len(answer) > length:
            misses += 1
            continue
        asked.add(question.key)
        tokens += asking + thought + answer
        weights += [0] * len(asking) + [1] * len(thought) + [ANSWER_WEIGHT] * len(answer)
    return tokens, weights


def _ask_any(rng: random.Random, blotter: Blotter, families: list[str], shares: list[float]) -> Question:
    draw = rng.random() * shares[-1]
    family = next(name for name, share in zip(families, shares, strict=True) if draw < share)
    return ask(rng, blotter, family, held_out=False)


def _cumulated(shares: list[float]) -> list[float]:
    return [sum(shares[: index + 1]) for index in range(len(shares))]


class Feed:
    """Batches in the order they were asked for, written ahead by ``processes`` processes (0: here, when taken)."""

    def __init__(self, table: PieceTable, seed: int, processes: int) -> None:
        self._table, self._seed = table, seed
        self._pending: deque[Future[Batch] | tuple[str, int, int]] = deque()
        self._pool: ProcessPoolExecutor | None = None
        if processes:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(processes, context, initializer=_become_worker, initargs=(os.getpid(),))

    def __len__(self) -> int:
        return len(self._pending)

    def request(self, bucket: str, counter: int, rows: int) -> None:
        """Asks for a batch, to be taken after those asked for before."""
        if self._pool is None:
            self._pending.append((bucket, counter, rows))
        else:
            self._pending.append(self._pool.submit(make_batch, self._table, self._seed, bucket, counter, rows))

    def take(self) -> tuple[Batch, float]:
        """The next batch and the seconds waited for it. Raises BrokenProcessPool if a process died."""
        began = time.monotonic()
        item = self._pending.popleft()
        if isinstance(item, tuple):
            batch = make_batch(self._table, self._seed, *item)
        else:
            batch = item.result()
        return batch, time.monotonic() - began

    def close(self) -> None:
        """Ends the processes; batches asked for and not taken are dropped."""
        self._pending.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _become_worker(parent: int) -> None:
    """Leaves Ctrl-C to the parent, and ends with it: a parent killed outright says no goodbye."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
