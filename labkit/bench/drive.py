"""Runs an engine core in this thread: all requests at once, or users who each wait for an answer before they ask on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from labkit.bench.workloads import Request
from labkit.core import EngineCore
from labkit.errors import UserError
from labkit.request import SamplingParams, TokenOutput

Clock = Callable[[], float]


@dataclass(eq=False)
class Answered:
    """A request and when what came of it, in seconds on the clock of the drive."""

    request: Request
    added_s: float
    first_s: float = math.nan
    end_s: float = math.nan
    token_ids: list[int] = field(default_factory=list)

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.added_s

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.added_s


def answer_all(core: EngineCore, requests: Sequence[Request], clock: Clock = time.perf_counter) -> list[Answered]:
    """Adds all requests and steps until the last one is answered; in the order of the requests.

    Raises UserError if the engine gives one up.
    """
    asked = [_ask(core, number, request, clock) for number, request in enumerate(requests)]
    open_ = dict(enumerate(asked))
    while core.has_work():
        for output in _step(core):
            _book(open_, output, clock())
    if open_:
        raise RuntimeError(f"the engine stopped with {len(open_)} requests unanswered")
    return asked


def closed_loop(
    core: EngineCore, draw: Iterator[Request], users: int, measured: int, clock: Clock = time.perf_counter
) -> list[Answered]:
    """``users`` ask, get an answer and ask again at once. Returns the requests number ``users`` to ``users + measured``
    in the order of asking: the first one of every user, who all start together, is not measured.

    The load is kept up until the last measured one has ended, so that slow ones are not left out.
    """
    asked: list[Answered] = []
    open_: dict[int, Answered] = {}

    def ask() -> None:
        open_[len(asked)] = _ask(core, len(asked), next(draw), clock)
        asked.append(open_[len(asked)])

    for _ in range(users):
        ask()
    unfinished = measured
    while unfinished:
        for output in _step(core):
            if _book(open_, output, clock()):
                unfinished -= users <= output.request_id < users + measured
                ask()
    for number in open_:
        core.cancel(number)
    while core.has_work():
        core.step()
    return asked[users : users + measured]


def _ask(core: EngineCore, number: int, request: Request, clock: Clock) -> Answered:
    asked = Answered(request, clock())
    core.add(number, request.prompt_ids, SamplingParams(max_tokens=request.new_tokens, ignore_eos=True))
    return asked


def _step(core: EngineCore) -> list[TokenOutput]:
    if (wait := core.wait_s()) > 0:
        time.sleep(wait)
    return core.step()


def _book(open_: dict[int, Answered], output: TokenOutput, now_s: float) -> bool:
    """Whether the request has ended."""
    if output.finish_reason == "error":
        raise UserError(f"the engine gave a request up: {output.error}")
    answered = open_[output.request_id]
    if output.token_ids and not answered.token_ids:
        answered.first_s = now_s
    answered.token_ids += output.token_ids
    if output.finish_reason is None:
        return False
    answered.end_s = now_s
    del open_[output.request_id]
    return True
