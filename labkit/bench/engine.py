"""The engine workloads: our engine, its ablations and the peers on the same requests, interleaved."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from labkit.bench import workloads
from labkit.bench.ceilings import Ceilings
from labkit.bench.cost import Elements, ModelCost, elements_of, model_cost
from labkit.bench.drive import Answered, answer_all, closed_loop
from labkit.bench.peers import Peer, Target, free
from labkit.bench.profile import device_profile, host_profile
from labkit.bench.rows import Book, Row, number
from labkit.bench.users import FIRST_USERS, Load, load_of, measured_requests, most_users
from labkit.bench.workloads import Request
from labkit.core import LabkitCore
from labkit.deployment import Deployment
from labkit.errors import UserError
from labkit.models.loading import resolve_model
from labkit.runner.runner import DTYPES, torch_device

BATCHES: dict[str, Callable[..., list[Request]]] = {
    "throughput": workloads.throughput,
    "mix": workloads.mix,
    "decode": workloads.decode,
}
ENGINE_WORKLOADS = (*BATCHES, "users")
OURS = "labkit"
NEW_TOKENS_OF_USERS = (128, 32)
CPU_REQUESTS = {"throughput": 8, "mix": 64, "decode": 1}
"""By default on a CPU, so that each takes minutes with its peers: two static batches of the mix."""
SLOW_PEER_REQUESTS = 64
COMPARED_TOKENS = 64
LARGEST_ON_CPU = 5e8
"""Weights; a forward pass over more than these takes a CPU longer than anyone waits."""


@dataclass(frozen=True)
class Options:
    """What an engine bench is asked for. ``requests`` None: the workload's own number."""

    workloads: tuple[str, ...]
    deployment: Deployment
    without: tuple[tuple[str, Any], ...] = ()
    """Ablations: (knob, value) each, one line a knob."""
    repeat: int = 3
    requests: int | None = None
    slo_s: float = 0.8
    peers: tuple[Peer, ...] = ()
    profile: bool = False
    profile_host: bool = False

    @property
    def variants(self) -> dict[str, Deployment]:
        """Name of a line -> deployment. Raises UserError for a knob that does not go with the others."""
        made = {OURS: self.deployment}
        for knob, value in self.without:
            try:
                made[f"{knob}={value}"] = replace(self.deployment, **{knob: value})
            except ValueError as error:
                raise UserError(f"not a deployment: {error}") from error
        return made


Say = Callable[[str], None]


class EngineBench:
    """One bench. ``answers`` holds what each workload's first repeat was answered, for the peers to agree with."""

    def __init__(self, options: Options, ceilings: Ceilings, book: Book, say: Say) -> None:
        self.options, self.ceilings, self.book, self.say = options, ceilings, book, say
        self.device = torch_device(options.deployment.device)
        self.variants = list(options.variants.items())
        self.directory = resolve_model(options.deployment.model)
        self.cost: ModelCost = model_cost(self.directory)
        self.answers: dict[str, list[list[int]]] = {}
        self.vocab = self.max_context = 0
        self._names = [name for name in options.workloads if name in BATCHES]
        if self.device.type == "cpu" and self.cost.resident > LARGEST_ON_CPU:
            raise UserError(
                f"{self.directory.name} has {self.cost.resident / 1e9:.1f} billion weights, too many for a CPU; run it "
                "on a GPU machine, or leave out --model and --random-weights to bench the shipped model"
            )

    def run(self) -> None:
        self._run_variants()
        for peer in self.options.peers if self._names else ():
            self._run_peer(peer)
            free()

    def _run_variants(self) -> None:
        """Repeats of the variants, to and fro, so that drift hits all alike; a core lives as long as it comes next."""
        variants = self.variants
        plan = [
            (repeat, *variant)
            for repeat in range(self.options.repeat)
            for variant in (variants if repeat % 2 == 0 else variants[::-1])
        ]
        began, done = time.monotonic(), 0
        for (name, deployment), turns in itertools.groupby(plan, key=lambda turn: turn[1:]):
            core = self._load(name, deployment)
            for repeat, _, _ in turns:
                for workload in self._names:
                    self._batch(core, workload, name, repeat)
                done += 1
                left = (time.monotonic() - began) / done * (len(plan) - done)
                if left and self._names:
                    self.say(f"about {left:.0f} s left for {len(plan) - done} more repeats")
                if repeat == self.options.repeat - 1:
                    self._last_turn(core, name)
            del core
            free()

    def _last_turn(self, core: LabkitCore, name: str) -> None:
        """What is done once a variant: the users, who repeat by their number, and the profiles."""
        if "users" in self.options.workloads:
            for new_tokens in NEW_TOKENS_OF_USERS:
                self._users(core, name, new_tokens)
        profiles = [device_profile] * self.options.profile + [host_profile] * self.options.profile_host
        for workload in self._names if profiles else ():
            requests = self._requests(workload, content=-1)
            for profiled in profiles:
                self.say(f"\n{workload}, {name}:\n{profiled(partial(answer_all, core, requests))}\n")

    def _load(self, name: str, deployment: Deployment) -> LabkitCore:
        began = time.monotonic()
        core = LabkitCore(deployment)
        loaded = time.monotonic()
        core.warm_up()
        self.say(f"{name}: loaded in {loaded - began:.1f} s, warm after {time.monotonic() - loaded:.1f} s more")
        self.vocab, self.max_context = core.vocab_size, core.max_context
        return core

    def _requests(self, workload: str, content: int) -> list[Request]:
        """``content`` differs by repeat, so that no prefix cache answers the second repeat."""
        count = self.options.requests
        if workload == "decode":
            count = 1
        elif count is None and self.device.type == "cpu":
            count = CPU_REQUESTS[workload]
        made = BATCHES[workload](self.vocab, **({} if count is None else {"count": count}), content=content + 1)
        workloads.check_context(made, self.max_context)
        return made

    def _batch(self, core: LabkitCore, workload: str, name: str, repeat: int) -> None:
        requests = self._requests(workload, repeat)
        before = core.stats().steps
        cpu, began = time.process_time(), time.perf_counter()
        answered = answer_all(core, requests)
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
        steps = core.stats().steps - before
        note = self._agreement(workload, [each.token_ids for each in answered]) if repeat == 0 else ""
        figures = self._figures(requests, seconds, cpu_s)
        figures |= self._moved(requests, seconds, steps, elements_of(core.runner.model)) | _latencies(answered)
        self._add(Row(workload, name, figures, note, repeat))

    def _figures(self, requests: Sequence[Request], seconds: float, cpu_s: float) -> dict[str, float]:
        new = sum(each.new_tokens for each in requests)
        flops_s = self.cost.flops(requests) / seconds
        return {
            "output tokens/s": new / seconds,
            "tokens/s": (new + sum(len(each.prompt_ids) for each in requests)) / seconds,
            "requests/s": len(requests) / seconds,
            "seconds": seconds,
            "CPU s": cpu_s,
            "TFLOP/s": flops_s / 1e12,
            "of matmul": flops_s / self.ceilings.flops_s,
        }

    def _moved(self, requests: Sequence[Request], seconds: float, steps: int, elements: Elements) -> dict[str, float]:
        """What is known only where steps are counted."""
        bytes_s = self.cost.bytes(requests, steps, elements) / seconds
        return {
            "TB/s": bytes_s / 1e12,
            "of copy": bytes_s / self.ceilings.bytes_s,
            "steps": float(steps),
            "ms/step": seconds / steps * 1e3,
        }

    def _agreement(self, workload: str, answers: list[list[int]]) -> str:
        """Remembers the first answers to a workload; of later ones says how many begin with the same tokens."""
        known = self.answers.setdefault(workload, answers)
        if known is answers:
            return ""
        pairs = list(zip(known, answers, strict=False))
        same = sum(one[:COMPARED_TOKENS] == other[:COMPARED_TOKENS] for one, other in pairs)
        return f"same answers {same}/{len(pairs)}" + ("" if same == len(pairs) else ": NOT the same work")

    def _users(self, core: LabkitCore, name: str, new_tokens: int) -> None:
        label, contents = f"users, {new_tokens} new tokens", itertools.count(1)

        def measure(users: int) -> Load:
            measured = self.options.requests or measured_requests(users)
            draw = _endless_mix(self.vocab, new_tokens, next(contents), self.max_context)
            load = load_of(users, closed_loop(core, draw, users, measured))
            self._add(Row(label, f"{name}, {users} users", load.figures()))
            return load

        limit_s = self.options.slo_s
        most = most_users(measure, limit_s, FIRST_USERS[self.device.type])
        repeats = [measure(most) for _ in range(self.options.repeat - 1)] if most else []
        held = sum(load.p95_s < limit_s for load in repeats)
        note = f"P95 E2E < {limit_s * 1e3:.0f} ms; {held} of {len(repeats)} further measurements below it"
        self._add(Row(label, f"{name}, most users", {"users": float(most)}, note))

    def _run_peer(self, peer: Peer) -> None:
        deployment = self.options.deployment
        dtype = DTYPES[deployment.dtype]
        target = Target(self.directory, self.device, dtype, deployment.random_weights, self.max_context)
        self.say(f"{peer.name}: loading")
        began = time.monotonic()
        try:
            with peer.serving(target) as answer:
                self.say(f"{peer.name}: loaded and warm in {time.monotonic() - began:.1f} s")
                for repeat in range(1 if peer.slow else self.options.repeat):
                    for workload in self._names:
                        self._ask_peer(peer, answer, workload, repeat)
        except Exception as error:  # what others' programs raise must not cost us our own lines
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            for workload in self._names:
                self._add(Row(workload, peer.name, note=f"failed: {reason[:120]}"))

    def _ask_peer(self, peer: Peer, answer: Any, workload: str, repeat: int) -> None:
        requests = self._requests(workload, repeat)
        asked = requests[:SLOW_PEER_REQUESTS] if peer.slow else requests
        cpu = time.process_time()
        seconds, answers = answer(asked)
        cpu_s = time.process_time() - cpu
        notes = [f"the first {len(asked)} requests"] if len(asked) < len(requests) else []
        # With random weights every program has weights of its own.
        if repeat == 0 and not self.options.deployment.random_weights:
            notes.append(self._agreement(workload, answers))
        self._add(Row(workload, peer.name, self._figures(asked, seconds, cpu_s), "; ".join(notes), repeat))

    def _add(self, row: Row) -> None:
        self.book.add(row)
        shown = ", ".join(f"{number(value)} {name}" for name, value in list(row.figures.items())[:4])
        self.say(f"{row.workload}, {row.name}: {'; '.join(part for part in (shown, row.note) if part)}")


def _latencies(answered: Sequence[Answered]) -> dict[str, float]:
    firsts = sorted(each.ttft_s for each in answered)
    return {"TTFT P50 ms": firsts[len(firsts) // 2] * 1e3}


def _endless_mix(vocab: int, new_tokens: int, content: int, max_context: int) -> Iterator[Request]:
    for seed in itertools.count():
        requests = workloads.mix(vocab, 100, new_tokens, seed=seed, content=content)
        workloads.check_context(requests, max_context)
        yield from requests
