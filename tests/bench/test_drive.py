"""Against a core that answers a token a step to everyone, on a clock that it moves itself."""

from __future__ import annotations

import itertools

import pytest

from labkit.bench.drive import answer_all, closed_loop
from labkit.bench.workloads import Request
from labkit.errors import UserError
from labkit.request import TokenOutput


class OneTokenAStep:
    """Every step takes a second and gives everyone who is there a token: the request's own number."""

    def __init__(self, fails: int | None = None) -> None:
        self.now_s, self.left, self.fails, self.cancelled = 0.0, {}, fails, []

    def clock(self) -> float:
        return self.now_s

    def add(self, request_id, prompt_ids, sampling):
        assert sampling.ignore_eos and sampling.temperature == 0
        self.left[request_id] = sampling.max_tokens

    def cancel(self, request_id):
        self.cancelled.append(request_id)
        self.left.pop(request_id)

    def has_work(self):
        return bool(self.left)

    def wait_s(self):
        return 0.0

    def step(self):
        self.now_s += 1.0
        outputs = []
        for number in list(self.left):
            if number == self.fails:
                self.left.pop(number)
                outputs.append(TokenOutput(number, (), finish_reason="error", error="too long"))
                continue
            self.left[number] -= 1
            ended = self.left[number] == 0
            outputs.append(TokenOutput(number, (number,), finish_reason="length" if ended else None))
            if ended:
                del self.left[number]
        return outputs


def test_all_at_once():
    core = OneTokenAStep()
    answered = answer_all(core, [Request([1], 3), Request([1, 2], 1)], core.clock)
    assert [each.token_ids for each in answered] == [[0, 0, 0], [1]]
    assert [(each.ttft_s, each.e2e_s) for each in answered] == [(1.0, 3.0), (1.0, 1.0)]


def test_users_ask_again_at_once_and_their_first_requests_are_not_measured():
    core = OneTokenAStep()
    draw = (Request([1], new) for new in itertools.cycle((1, 2, 3)))
    answered = closed_loop(core, draw, users=2, measured=4, clock=core.clock)
    assert [each.request.new_tokens for each in answered] == [3, 1, 2, 3]
    assert [each.e2e_s for each in answered] == [3.0, 1.0, 2.0, 3.0]
    assert [each.added_s for each in answered] == [1.0, 2.0, 3.0, 4.0]
    assert core.cancelled and not core.has_work()


def test_a_request_that_is_given_up_ends_the_bench_with_its_reason():
    with pytest.raises(UserError, match="too long"):
        answer_all(OneTokenAStep(fails=1), [Request([1], 3), Request([1], 3)])
