"""Requests per second of the deployment as first deployed and of the labkit engine, in process, on the article's mix.

    python benchmarks/cpu_ladder.py MODEL [--requests 24] [--first-batch 8] [--engines first,static,continuous]

All requests are there at the start; prompts are random tokens, so only speed and agreement mean anything. Every engine
answers the same prompts greedily, and the answers must agree. CPU seconds are printed beside wall seconds,
because they say more on a machine that does other things too.
"""

from __future__ import annotations

import argparse
import random
import time

from labkit.core import EngineCore
from labkit.deployment import Deployment
from labkit.engine import build_core
from labkit.request import SamplingParams

BUCKETS = (((60, 511), 0.6), ((512, 2047), 0.3), ((2048, 4096), 0.1))


def requests(count: int, vocab: int) -> list[tuple[list[int], SamplingParams]]:
    chance = random.Random(0)
    made = []
    for _ in range(count):
        ((low, high),) = chance.choices([bucket for bucket, _ in BUCKETS], [share for _, share in BUCKETS])
        prompt = [chance.randrange(vocab) for _ in range(chance.randint(low, high))]
        made.append((prompt, SamplingParams(max_tokens=chance.randint(50, 90), ignore_eos=True)))
    return made


def run(core: EngineCore, work: list[tuple[list[int], SamplingParams]]) -> dict[int, list[int]]:
    answers: dict[int, list[int]] = {i: [] for i in range(len(work))}
    for i, (prompt, sampling) in enumerate(work):
        core.add(i, prompt, sampling)
    while core.has_work():
        for output in core.step():
            answers[output.request_id] += output.token_ids
    return answers


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--first-batch", type=int, default=8)
    parser.add_argument("--engines", default="first,static,continuous")
    options = parser.parse_args()
    deployments = {
        "first": Deployment.as_first_deployed(options.model, max_batch=options.first_batch),
        "sdpa": Deployment.as_first_deployed(options.model, max_batch=options.first_batch, attention="sdpa"),
        "static": Deployment(options.model, batching="static", max_batch=options.first_batch),
        "continuous": Deployment(options.model),
    }
    reference: dict[int, list[int]] | None = None
    for name in options.engines.split(","):
        core = build_core(deployments[name])
        work = requests(options.requests, vocab=300)
        core.warm_up()
        wall, cpu = time.perf_counter(), time.process_time()
        answers = run(core, work)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        reference = reference or answers
        same = sum(answers[i] == reference[i] for i in answers)
        speed = f"{len(work) / wall:7.3f} requests/s  wall {wall:7.2f} s  CPU {cpu:7.2f} s"
        print(f"{name:12s} {speed}  same answers {same}/{len(work)}")


if __name__ == "__main__":
    main()
