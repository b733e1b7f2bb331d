"""One evaluation: exact match, perplexity, and where a reference is named how the two differ; kept as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from labkit.errors import UserError
from labkit.evaluation.answers import EngineAnswers, prompt_ids
from labkit.evaluation.paired import compare
from labkit.evaluation.scoring import WINDOW, Passage, Scorer, read_text, score, windows
from labkit.files import write_atomic
from labkit.models.loading import load_tokenizer, open_checkpoint, read_json, resolve_model
from labkit.training.evaluate import MOST_TOKENS, Progress, check_wishes, examine, facts_of
from labkit.training.evaluate import evaluate as evaluate_ledger_model
from labkit.training.ledger import BUCKETS, Problem, make_problem
from labkit.training.tokenizer import THINK, THINK_END, VOCABULARY

SCORED = 200
"""Of each bucket, the problems whose right completions are scored; some 60 tokens each."""
_WORDY = 1024
"""Tokens that a model may write which was not taught to be brief."""

Say = Callable[[str], None]
Account = dict[str, Any]


@dataclass(frozen=True)
class Wishes:
    """What to find out. ``problems`` of each bucket, 0 for none; ``text`` a file to be read; ``reference`` a model, or
    the account of an earlier evaluation. ``max_tokens`` bounds the answers of a model that is no ledger model."""

    problems: int = 1000
    buckets: tuple[str, ...] = BUCKETS
    seed: int = 0
    text: Path | None = None
    reference: str | None = None
    max_tokens: int | None = None


def evaluate(
    model: str,
    wishes: Wishes,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    result: Path | None = None,
    say: Say = print,
) -> Account:
    """Evaluates a directory or hub id; returns the account, and writes it to ``result`` after each part of the work.

    ``dtype`` is bfloat16 on CUDA and float32 on the CPU unless given. Raises UserError for a model, a text or wishes
    that cannot be.
    """
    text = _check(wishes)
    resolve_model(model)
    earlier = _earlier(wishes)
    if result is not None:
        # a place that cannot be written to shows before the work, not after
        result.parent.mkdir(parents=True, exist_ok=True)
    work = _Work(wishes, device, dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32), result, say)
    work.account = {"model": name_of(model), **facts_of(work.dtype, device)}
    if wishes.problems:
        work.account = {"model": name_of(model), **work.exact_match(model)}
    work.keep()
    if wishes.reference is not None:
        work.refer(earlier or wishes.reference)
    work.score(model, None if earlier else wishes.reference, text)
    return work.account


def name_of(model: str) -> str:
    """The last part of a directory's name, a hub id as it is."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def is_ledger_model(model: str) -> bool:
    """Whether the trainer's own network can run it, which is faster for many problems than an engine for serving."""
    path = resolve_model(model)
    config = read_json(path / "config.json")
    plain = config.get("model_type") == "qwen2" and config.get("tie_word_embeddings")
    small = config.get("vocab_size") == VOCABULARY and any(path.glob("model*.safetensors"))
    return bool(plain and small and "quantization_config" not in config)


def _check(wishes: Wishes) -> str | None:
    """The text to be read, if any."""
    if wishes.problems:
        check_wishes(wishes.problems, list(wishes.buckets), wishes.seed)
    elif wishes.text is None:
        raise UserError("nothing to find out: give --problems, or a --text")
    if wishes.max_tokens is not None and wishes.max_tokens < 1:
        raise UserError("--max-tokens must be at least 1")
    return None if wishes.text is None else read_text(wishes.text)


def _earlier(wishes: Wishes) -> Account | None:
    """The account that ``reference`` names, None if it names a model."""
    if wishes.reference is None or not wishes.reference.endswith(".json"):
        if wishes.reference is not None:
            resolve_model(wishes.reference)
        return None
    account = read_json(Path(wishes.reference))
    if "verdicts" not in account:
        raise UserError(f"{wishes.reference} holds no verdicts; `labkit evaluate --result` writes such a file")
    if account.get("seed") != wishes.seed:
        raise UserError(f"{wishes.reference} is of other problems: seed {account.get('seed')}, not {wishes.seed}")
    return account


class _Work:
    """What the parts of an evaluation share."""

    def __init__(self, wishes: Wishes, device: str, dtype: torch.dtype, result: Path | None, say: Say) -> None:
        self.wishes, self.device, self.dtype, self.say = wishes, device, dtype, say
        self.account: Account = {}
        self._result = result

    def keep(self) -> None:
        if self._result is not None:
            write_atomic(self._result, json.dumps(self.account, indent=1) + "\n")

    def exact_match(self, model: str) -> Account:
        """Asks ``model`` all problems."""
        wishes = self.wishes
        buckets = list(dict.fromkeys(wishes.buckets))
        if is_ledger_model(model):
            path = resolve_model(model)
            return evaluate_ledger_model(
                path, wishes.problems, buckets, wishes.seed, self.device, self.dtype, say=self.say
            )
        tokenizer = load_tokenizer(model)
        problems = [make_problem(wishes.seed, i, bucket) for bucket in buckets for i in range(wishes.problems)]
        longest = max(len(prompt_ids(tokenizer, problem)) for problem in problems)
        brief = len(tokenizer) == VOCABULARY and THINK in tokenizer.get_vocab()
        most = wishes.max_tokens or (MOST_TOKENS if brief else _WORDY)
        answers = EngineAnswers(model, self.device, str(self.dtype).removeprefix("torch."), most, longest)
        facts = facts_of(self.dtype, self.device)
        account = examine(answers, wishes.problems, buckets, wishes.seed, facts, self.say)
        del answers
        _free()
        return account

    def refer(self, reference: str | Account) -> None:
        """Asks the reference the same problems, unless it is an account of having been asked them."""
        if isinstance(reference, str):
            self.say(f"the reference, {name_of(reference)}:")
            theirs = {"model": name_of(reference)}
            if self.wishes.problems:
                theirs |= self.exact_match(reference)
        else:
            theirs = reference
        kept = ("model", "dtype", "elapsed_s", "buckets", "verdicts")
        self.account["reference"] = {key: theirs[key] for key in kept if key in theirs}
        if self.wishes.problems:
            self.account["paired"] = paired(self.account, theirs)
        self.keep()

    def score(self, model: str, reference: str | None, text: str | None) -> None:
        """Scores the right completions and the text, beside a reference that reads the same tokens."""
        passages = {bucket: self._completions(model, bucket) for bucket in self.wishes.buckets if self.wishes.problems}
        window = min([WINDOW, *(open_checkpoint(each).shape.max_positions for each in (model, reference) if each)])
        if text is not None:
            passages["text"] = self._windows(model, text, window)
        if reference is not None and (reason := self._incomparable(model, reference, text)):
            self.say(f"no agreement with the reference: {reason}")
            self.account["reference"]["note"] = reason
            reference = None
        scorer = Scorer(model, self.device, self.dtype)
        other = None if reference is None else Scorer(reference, self.device, self.dtype)
        progress = Progress(self.say, sum(len(passage.ids) for listed in passages.values() for passage in listed))
        for name, listed in passages.items():
            scores = score(scorer, listed, other, lambda tokens, name=name: progress.add(tokens, f"scoring {name}"))  # type: ignore[misc]
            account = scores.account(other is not None)
            if name == "text":
                account |= {"file": self.wishes.text.name, "window": window}  # type: ignore[dict-item, union-attr]
                self.account["text"] = account
            else:
                self.account.setdefault("completions", {})[name] = account
            self.keep()
        del scorer, other
        _free()

    def _completions(self, model: str, bucket: str) -> list[Passage]:
        tokenizer = load_tokenizer(model)
        some = range(min(SCORED, self.wishes.problems))
        return [_completion(tokenizer, make_problem(self.wishes.seed, index, bucket)) for index in some]

    def _windows(self, model: str, text: str, window: int) -> list[Passage]:
        # it need not say that the whole text is longer than the model's context
        found = windows(list(load_tokenizer(model)(text, verbose=False)["input_ids"]), window)
        if not found:
            raise UserError(f"{self.wishes.text} is a single token to this model; give a text of some pages")
        return found

    def _incomparable(self, model: str, reference: str, text: str | None) -> str:
        """Why two models cannot be compared token by token; empty if they can."""
        sample = text[:2000] if text else make_problem(0, 0, BUCKETS[0]).prompt
        ours, theirs = (load_tokenizer(each) for each in (model, reference))
        problem = make_problem(0, 0, BUCKETS[0])
        same = ours(sample)["input_ids"] == theirs(sample)["input_ids"]
        if not same or _completion(ours, problem) != _completion(theirs, problem):
            return "its tokens are others"
        sizes = [read_json(resolve_model(each) / "config.json").get("vocab_size") for each in (model, reference)]
        return "" if sizes[0] == sizes[1] else f"its vocabulary has {sizes[1]} tokens, not {sizes[0]}"


def _completion(tokenizer: Any, problem: Problem) -> Passage:
    prompt = prompt_ids(tokenizer, problem)
    right = tokenizer.encode(f"{THINK}{problem.thought}{THINK_END}{problem.answer}", add_special_tokens=False)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Passage([*prompt, *right, *end], len(prompt))


def paired(account: Account, reference: Account) -> dict[str, dict[str, float]]:
    """``Paired`` of every bucket that both were asked, and of all; where one was asked more problems, of the first."""
    ours: list[bool] = []
    theirs: list[bool] = []
    found = {}
    for bucket, verdicts in account["verdicts"].items():
        pairs = list(zip(verdicts, reference["verdicts"].get(bucket, ""), strict=False))
        if pairs:
            one, other = ([pair[side] == "1" for pair in pairs] for side in (0, 1))
            found[bucket] = asdict(compare(one, other))
            ours, theirs = ours + one, theirs + other
    if ours:
        found["all"] = asdict(compare(ours, theirs))
    return found


def _free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
