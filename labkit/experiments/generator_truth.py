"""What load generators are held against: a golden server in a process of its own, and what its log says happened."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from labkit.errors import UserError
from labkit.experiments.intervals import Estimate, percentile
from labkit.traffic.golden_play import Script

WHOLE = "whole"
FAILURES = ("truncated", "5xx", "stream_error", "timeout")
"""The failures that are played, in the words of ``labkit.traffic.answer``. timeout: an answer that takes longer in all
than the client is willing to wait."""
LEAST_TIMEOUT_S = 0.8
TAKES_LONGER_S = 0.5
"""By how much a slow answer exceeds the timeout."""

_OUTCOME = {"truncate": "truncated", "no finish": "truncated", "5xx": "5xx", "data error": "stream_error"}


@dataclass(frozen=True)
class Truth:
    """What became of the requests, by the server's log. Times in seconds at the server: from the last byte of the
    request in to the last of the answer out."""

    outcomes: Mapping[str, int]
    """How many answers were WHOLE or one of FAILURES."""
    parts: Mapping[str, int]
    """The same by what exactly was played, see ``name_of``."""
    latencies: tuple[float, ...]
    """Of the whole answers."""
    ttft_p50_s: float
    itl_p50_s: float
    span_s: float
    """From the first request in to the last answer out."""
    late_p95_s: float
    """How late the server was behind its own script."""

    @property
    def requests(self) -> int:
        return sum(self.outcomes.values())

    @property
    def failed(self) -> int:
        return self.requests - self.outcomes.get(WHOLE, 0)

    def latency(self, q: float) -> Estimate:
        return percentile(self.latencies, q, "s")


@dataclass
class GoldenProcess:
    """``log``, one row a request in order of arrival, is there once the server has ended."""

    url: str
    pid: int
    log: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def golden_process(scripts: Sequence[Script]) -> Iterator[GoldenProcess]:
    """Plays ``scripts`` in turn, by request id or else by order of arrival. It ends with the block, whatever happens.

    Raises UserError when it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="labkit-") as directory:
        log = Path(directory) / "golden.jsonl"
        played = json.dumps([asdict(script) for script in scripts])
        process = subprocess.Popen(
            [sys.executable, "-m", "labkit.traffic.golden", "--script", played, "--log", str(log)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            ready = process.stdout.readline().split()
            if not ready:
                raise UserError("the server of known timing did not start; what it said is above")
            server = GoldenProcess(ready[-1], process.pid)
            yield server
            process.stdin.close()
            process.wait(timeout=30)
            server.log = [json.loads(line) for line in log.read_text().splitlines()]
        finally:
            process.kill()
            process.wait()


def faulty_scripts(timeout_s: float = 5.0) -> tuple[Script, ...]:
    """Twenty answers in turn: thirteen whole ones of 0.4 to 0.64 s, and one of each fault (see ``name_of``).

    Raises ValueError for a timeout that whole answers would not keep.
    """
    if timeout_s < LEAST_TIMEOUT_S:
        raise ValueError(
            f"timeout_s must be at least {LEAST_TIMEOUT_S}, for whole answers to keep it; got {timeout_s!r}"
        )
    slow_s = timeout_s + TAKES_LONGER_S
    whole = [Script(ttft_s=0.1 + 0.02 * number, itl_s=0.02, tokens=16) for number in range(13)]
    broken = [Script(ttft_s=0.1, itl_s=0.02, tokens=16, fault=fault) for fault in _OUTCOME]
    slow = [
        Script(ttft_s=slow_s, headers_s=slow_s, tokens=1),
        Script(ttft_s=slow_s, tokens=1),
        Script(ttft_s=0.1, itl_s=(slow_s - 0.1) / 15, tokens=16),
    ]
    # The slow ones first: users are held up at once and not at the end, one after the other.
    return (*slow, *(script for three in zip(*[iter(whole[:12])] * 3, strict=True) for script in three), *broken,
            whole[12])  # fmt: skip


def outcome_of(script: Script, timeout_s: float) -> str:
    """What a client that sees everything must call it: WHOLE or one of FAILURES."""
    if script.fault:
        return _OUTCOME[script.fault]
    return "timeout" if takes_s(script) > timeout_s else WHOLE


def name_of(script: Script, timeout_s: float) -> str:
    """What was played, in words."""
    if outcome_of(script, timeout_s) != "timeout":
        return {"truncate": "connection broken", "no finish": "no end", "5xx": "HTTP 500",
                "data error": "error inside a 200"}.get(script.fault, WHOLE)  # fmt: skip
    if script.headers_s > timeout_s:
        return "slow: not a byte"
    return "slow: headers only" if script.ttft_s > timeout_s else "slow: token by token"


def takes_s(script: Script) -> float:
    """How long the answer takes by script, were it not broken off."""
    return script.due_s(script.tokens - 1)


def truth_of(log: Sequence[Mapping[str, Any]], scripts: Sequence[Script], timeout_s: float) -> Truth:
    """From the golden server's log. Which script a request was played follows from its id or place in the log, by the
    server's own rule."""
    outcomes: Counter[str] = Counter(dict.fromkeys((WHOLE, *FAILURES), 0))
    parts: Counter[str] = Counter()
    latencies, firsts, late = [], [], []
    gaps: list[float] = []
    for position, row in enumerate(log):
        number = int(row["request_id"]) if row["request_id"].isdigit() else position
        script = scripts[number % len(scripts)]
        outcome = outcome_of(script, timeout_s)
        outcomes[outcome] += 1
        parts[name_of(script, timeout_s)] += 1
        late += [at - due for due, at in row["sends"]]
        if outcome == WHOLE and row["ended"] is not None:
            sends = [at for _, at in row["sends"]]
            latencies.append(row["ended"] - row["received"])
            firsts.append(sends[0] - row["received"])
            gaps += np.diff(sends).tolist()
    ends = [row["ended"] for row in log if row["ended"] is not None]
    span = max(ends) - min(row["received"] for row in log) if ends else math.nan
    return Truth(
        dict(outcomes), dict(parts), tuple(latencies), percentile(firsts, 50).value, percentile(gaps, 50).value, span,
        percentile(late, 95).value,
    )  # fmt: skip
