"""Answers of any model to ledger problems, through labkit's engine: its chat template, greedy, as it is served."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from labkit.deployment import Deployment
from labkit.engine import Engine
from labkit.errors import UserError
from labkit.models.loading import load_tokenizer
from labkit.request import SamplingParams
from labkit.training.ledger import Problem

_TOGETHER = {"cpu": 16, "cuda": 512}
_BATCH = {"cpu": 16, "cuda": 256}


def prompt_ids(tokenizer: Any, problem: Problem) -> list[int]:
    """The problem as a user's message in the model's chat template, or as it stands where there is none."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": problem.prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(tokenizer.encode(text, add_special_tokens=False))
    return list(tokenizer.encode(f"{problem.prompt}\n"))


class EngineAnswers:
    """An engine that is asked one list of problems after the other."""

    def __init__(self, model: str, device: str, dtype: str, most_tokens: int, longest: int) -> None:
        """``longest``: tokens of the longest prompt. Raises UserError for a model or device that cannot be used."""
        if device not in ("cpu", "cuda"):
            raise UserError(f"the engine runs on cpu or cuda, not {device}; choose a GPU by CUDA_VISIBLE_DEVICES")
        knobs: dict[str, Any] = {"dtype": dtype, "max_batch": _BATCH[device], "max_context": longest + most_tokens}
        if device == "cuda":
            deployment = Deployment.at_full_speed(model, prefix_cache=False, **knobs)
        else:
            deployment = Deployment(model=model, device="cpu", **knobs)
        self._together = _TOGETHER[device]
        self._sampling = SamplingParams(max_tokens=most_tokens)
        self._engine = Engine(deployment)

    def __call__(self, problems: list[Problem]) -> Iterator[tuple[Problem, str]]:
        """Each problem with what the model wrote, in any order. Raises UserError where the engine fails."""
        tokenizer = load_tokenizer(self._engine.deployment.model)
        asked = sorted(
            ((prompt_ids(tokenizer, problem), problem) for problem in problems), key=lambda each: -len(each[0])
        )
        for start in range(0, len(asked), self._together):
            some = asked[start : start + self._together]
            try:
                completions = self._engine.generate([ids for ids, _ in some], self._sampling)
            except ValueError as error:
                raise UserError(f"the model cannot be asked this: {error}") from error
            for (_, problem), completion in zip(some, completions, strict=True):
                if completion.error is not None:
                    raise UserError(f"the engine could not answer a {problem.bucket} problem: {completion.error}")
                yield problem, completion.text
