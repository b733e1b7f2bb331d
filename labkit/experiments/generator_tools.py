"""How each load generator is run against a server, and what it says of the run, brought into one form.

Ours, the article's client and three programs of others: Locust and JMeter, which ask what our workload asks (through
``labkit.traffic.locustfile`` and ``labkit.traffic.jmeter``), and guidellm with the same prompts. A program that is not
installed is named with the reason.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from labkit.errors import UserError
from labkit.experiments.intervals import Estimate, percentile
from labkit.experiments.metrics import itl, requests_table, ttft
from labkit.traffic.generate import send_load
from labkit.traffic.jmeter import read_jtl, write_plan
from labkit.traffic.target import Target
from labkit.traffic.worker import prepare
from labkit.traffic.workload import Workload, schedule

ROOT = Path(__file__).resolve().parents[2]
LABKIT, ARTICLE, LOCUST, JMETER, GUIDELLM = "labkit", "the article's client", "Locust", "JMeter", "guidellm"
MODEL = "golden"
PATIENCE_S = 120.0
"""How much longer than expected a program may take before it is ended."""


@dataclass(frozen=True)
class Told:
    """What a load generator says. ``failures`` go by the words of ``labkit.traffic.answer``; times in seconds, NaN for
    what it does not measure."""

    success: int
    failures: Mapping[str, int]
    latencies: tuple[float, ...]
    """Those that its percentiles are of."""
    ttft_p50_s: float = math.nan
    itl_p50_s: float = math.nan
    mix: Mapping[str, int] = field(default_factory=dict)
    """How often it asked for each length of prompt."""
    remark: str = ""
    """What it let slip besides."""

    @property
    def requests(self) -> int:
        return self.success + sum(self.failures.values())

    def latency(self, q: float) -> Estimate:
        return percentile(self.latencies, q, "s")


Generator = Callable[[str, Workload, float, Path], Told]
"""(url, a closed workload with a number of requests, about how many seconds it will take, an empty folder) -> Told."""


def labkit_generator(url: str, workload: Workload, seconds: float, folder: Path) -> Told:
    """Latency from the moment of sending, as all the others take it."""
    load = send_load(url, workload, MODEL)
    table = requests_table(load.events)
    told = told_of_requests(table)
    return Told(told.success, told.failures, told.latencies, ttft(table, load.window, 50).value,
                itl(table, load.window, 50).value, told.mix)  # fmt: skip


def article_generator(url: str, workload: Workload, seconds: float, folder: Path) -> Told:
    with threads_client(url, workload, seconds) as found:
        return told_of_threads(found(), workload)


def locust_generator(url: str, workload: Workload, seconds: float, folder: Path) -> Told:
    """It ends by the clock, and lets the users finish what they began; so it asks more or less often than the others.
    Its percentiles are of failed requests too, and keep two digits."""
    files = [str(ROOT / "labkit" / name) for name in ("traffic/locustfile.py", "experiments/locust_report.py")]
    report = folder / "report.json"
    command = [
        find_program("locust"), "-f", ",".join(files), "--host", url, "--headless",
        "--users", workload.users, "--spawn-rate", workload.users, "--run-time", f"{math.ceil(seconds)}s",
        "--stop-timeout", math.ceil(workload.timeout_s) + 2, "--only-summary",
    ]  # fmt: skip
    words = {"LABKIT_WORKLOAD": workload.to_json(), "LABKIT_MODEL": MODEL, "PYTHONPATH": str(ROOT),
             "LABKIT_LOCUST_REPORT": str(report)}  # fmt: skip
    _run(command, seconds, folder, may_end=(0, 1), **words)  # 1: there were failures
    found = json.loads(report.read_text())
    entries = found["entries"]
    times = {kind: _histogram(entries, kind) for kind in ("chat", "TTFT", "ITL")}
    chats = [entry for entry in entries if entry["name"].startswith("chat ")]
    failures: Counter[str] = Counter()
    for error in found["errors"]:
        failures[_kind(error["error"])] += error["occurrences"]
    return Told(
        sum(entry["num_requests"] - entry["num_failures"] for entry in chats), failures, times["chat"],
        percentile(times["TTFT"], 50).value, percentile(times["ITL"], 50).value,
        {entry["name"].removeprefix("chat "): entry["num_requests"] for entry in chats},
    )  # fmt: skip


def jmeter_generator(url: str, workload: Workload, seconds: float, folder: Path) -> Told:
    """Its own percentiles would be of failed requests too; these are taken from its results, of the successes. It takes
    the time to the first byte of the body for what comes closest to a TTFT."""
    plan, results = folder / "plan.jmx", folder / "plan.jtl"
    write_plan(plan, workload, Target.parse(url).settled(), MODEL)
    command = [find_program("jmeter"), "-n", "-t", plan, f"-Jresults={results}", "-Jsample_variables=index"]
    _run([*command, "-j", folder / "jmeter.log"], seconds, folder)
    if not results.exists():
        raise UserError("JMeter ended without results; its own words: " + _last_error(folder / "jmeter.log"))
    table = requests_table(read_jtl(results))
    told = told_of_requests(table)
    first = (table["first_byte"] - table["sent"])[table["failure"] == ""].dropna()
    return Told(told.success, told.failures, told.latencies, percentile(first, 50).value, mix=told.mix)


def guidellm_generator(url: str, workload: Workload, seconds: float, folder: Path) -> Told:
    """One process of its own, so that it does not compete with the server for cores."""
    data, report = folder / "mix.jsonl", folder / "report.json"
    asked = payloads(workload)
    data.write_text("".join(json.dumps({"prompt": body["messages"][0]["content"]}) + "\n" for body in asked))
    backend = f"kind=openai_http,target={url},max_tokens={workload.max_tokens},timeout={workload.timeout_s}"
    command = [
        find_program("guidellm"), "run", "--disable-console", "--backend", backend,
        "--data", f"kind=json_file,path={data}", "--profile", f"kind=concurrent,streams={workload.users}",
        "--constraint", f"kind=max_requests,count={len(asked)}", "--output", f"kind=json,path={report}",
    ]  # fmt: skip
    _run(command, seconds, folder, HF_HUB_OFFLINE="1", GUIDELLM__MAX_WORKER_PROCESSES="1")
    benchmark = json.loads(report.read_text())["benchmarks"][0]
    done, failed = benchmark["requests"]["successful"], benchmark["requests"]["errored"]
    metrics = benchmark["metrics"]
    half = {name: metrics[name]["successful"]["percentiles"]["p50"] / 1e3
            for name in ("time_to_first_token_ms", "inter_token_latency_ms")}  # fmt: skip
    return Told(
        len(done), Counter(_kind(json.dumps(each["info"]["error"])) for each in failed),
        tuple(each["request_latency"] for each in done), half["time_to_first_token_ms"],
        half["inter_token_latency_ms"],
    )  # fmt: skip


GENERATORS: Mapping[str, Generator] = {
    LABKIT: labkit_generator,
    ARTICLE: article_generator,
    LOCUST: locust_generator,
    JMETER: jmeter_generator,
    GUIDELLM: guidellm_generator,
}


def find_program(name: str) -> Path:
    """The program in the environment of its own, beside this Python, or on the PATH. Raises UserError."""
    environment = ROOT / ".venv-peers" / name
    if any(environment.glob(".installed-*")):
        return environment / "bin" / name
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise UserError(f"{name} is not installed; `make peer-{name}` installs it")
    return Path(found)


def payloads(workload: Workload) -> list[dict[str, Any]]:
    """The bodies of all requests of a closed workload, in order; as all generators send them, streaming."""
    return [json.loads(prepare(one, workload, MODEL).body) for one in islice(schedule(workload), workload.requests)]


@contextmanager
def threads_client(url: str, workload: Workload, seconds: float) -> Iterator[Callable[[], dict[str, Any]]]:
    """The article's client at work, from the moment when it begins to send. The value waits for what it found.

    It is ended with the block. Raises UserError when it fails or takes too long.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "labkit.experiments.threads_client"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, env=_environment(),
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    order = {"url": f"{url}/v1/chat/completions", "concurrency": workload.users, "timeout_s": workload.timeout_s,
             "payloads": payloads(workload)}  # fmt: skip

    def found() -> dict[str, Any]:
        try:
            said, _ = process.communicate(timeout=seconds + PATIENCE_S)
            return dict(json.loads(said))
        except (subprocess.TimeoutExpired, json.JSONDecodeError):
            raise UserError("the article's client failed or did not end; is the machine overloaded?") from None

    try:
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        if process.stdout.readline() != "started\n":
            raise UserError("the article's client did not start; what it said is above")
        yield found
    finally:
        _end(process)


def told_of_threads(found: Mapping[str, Any], workload: Workload) -> Told:
    """Its ``error`` is a status other than 200; the server of known timing has none but 500."""
    remarks = [f"{count} × {name} ended a thread unnoticed" for name, count in sorted(found["uncaught"].items())]
    if found["discarded_connections"]:
        remarks.append(f"{found['discarded_connections']} connections not kept, for the session's pool keeps ten")
    return Told(
        found["success"], {"5xx": found["error"], "timeout": found["timeout"]},
        tuple(milliseconds / 1e3 for milliseconds in found["latency"]),
        mix=Counter(one.bucket for one in islice(schedule(workload), workload.requests)), remark="; ".join(remarks),
    )  # fmt: skip


def told_of_requests(table: pd.DataFrame) -> Told:
    """Of a table of requests (see ``labkit.experiments.metrics``): successes have no failure."""
    done = table[table["failure"] == ""]
    failures = Counter(table["failure"][table["failure"] != ""])
    latencies = (done["end"] - done["sent"]).to_numpy(dtype=float)
    return Told(len(done), failures, tuple(latencies), mix=Counter(table["bucket"]))


def children_cpu_s() -> float:
    """CPU time of all child processes that have ended, theirs included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _run(command: Sequence[object], seconds: float, folder: Path, may_end: tuple[int, ...] = (0,),
         **environment: str) -> None:  # fmt: skip
    """Runs a program, in a session of its own that is ended with all its processes. Raises UserError."""
    words = [str(word) for word in command]
    name = Path(words[0]).name
    with open(folder / "said", "w+") as said:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder,
            env=_environment(**environment),
        )  # fmt: skip
        try:
            code = process.wait(seconds + PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise UserError(f"{name} did not end; is the machine overloaded?") from None
        finally:
            _end(process)
        if code not in may_end:
            said.seek(0)
            lines = [line for line in said.read().splitlines() if line.strip()]
            raise UserError(f"{name} failed with exit code {code}; its last words: {' | '.join(lines[-3:])}")


def _end(process: subprocess.Popen[Any]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _environment(**more: str) -> dict[str, str]:
    """No proxy stands between a client and this machine."""
    return {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **more}


def _last_error(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line for line in reversed(lines) if " ERROR " in line), "none")


def _histogram(entries: Sequence[Mapping[str, Any]], kind: str) -> tuple[float, ...]:
    """All of Locust's response times under names that begin with ``kind``, in seconds, as often as they occurred."""
    counts: Counter[float] = Counter()
    for entry in entries:
        if entry["name"].startswith(f"{kind} "):
            for milliseconds, count in entry["response_times"].items():
                counts[float(milliseconds)] += count
    return tuple(np.repeat(list(counts), list(counts.values())) / 1e3) if counts else ()


def _kind(message: str) -> str:
    """Our name of a failure from the words of another program."""
    said = message.lower()
    for kind, words in _WORDS.items():
        if any(word in said for word in words):
            return kind
    return "other"


# In this order: Locust tells of a stream that stalled that it was truncated because it timed out.
_WORDS = {
    "timeout": ("timed out", "timeout"),
    "stream_error": ("streamerror", "scripted error"),
    "5xx": ("500",),
    "truncated": ("truncated", "incomplete", "disconnected"),
}
