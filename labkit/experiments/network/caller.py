"""The process on the client's host that asks, and the handle by which an experiment tells it what to ask.

``python -m labkit.experiments.network.caller`` answers one line of JSON after the other. It stays for all runs of a
link, so that no run pays for its start.
"""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from labkit.errors import UserError
from labkit.link.link import Link
from labkit.serving.schedule import Schedule, lateness_s
from labkit.traffic.answer import Record
from labkit.traffic.client import Client
from labkit.traffic.generate import send_load
from labkit.traffic.http1 import SseParser
from labkit.traffic.target import Target
from labkit.traffic.worker import prepare
from labkit.traffic.workload import Workload, schedule

TIMEOUT_S = 90.0
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Seen:
    """What the streams of one run were to their client, in milliseconds."""

    late_ms: tuple[float, ...]
    """Of every token of every whole stream: how long after it was due at the server it was there. A stream that broke
    has none."""
    ttft_ms: tuple[float, ...]
    """From the sent time to the first content token, of every whole stream."""
    failures: tuple[str, ...]
    took_s: float


class Caller:
    """A process on the host "client" of an open link, for a ``with`` block."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def __enter__(self) -> Caller:
        command = [sys.executable, "-m", "labkit.experiments.network.caller"]
        self._process = self._link.popen("client", command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def streams(self, target: Target, count: int, plan: Schedule, ramp_s: float = 0.1, model: str = "") -> Seen:
        """``count`` streams of ``plan``, begun over ``ramp_s``, against a server that sends by it. Given the name of
        its ``model``, they ask what the article's workload asks, otherwise "hello"."""
        return self._seen("streams", target, plan, count=count, ramp_s=ramp_s, model=model)

    def cold_and_warm(self, target: Target, plan: Schedule) -> Seen:
        """Two streams, one after the other: over a new connection, and over the same, which is open then."""
        return self._seen("cold and warm", target, plan)

    def uploads(
        self, host: str, port: int, count: int, prompt_bytes: int, chunks: int, chunked: bool, over_ms: float
    ) -> list[float]:
        """Milliseconds to the first token of ``count`` requests over HTTP/1.1, one after the other, each over an open
        connection. The prompt comes to the sender in ``chunks`` pieces over ``over_ms``, from when the time counts;
        ``chunked`` sends each at once, otherwise all together when the last one is there."""
        sizes = {"prompt_bytes": prompt_bytes, "chunks": chunks, "chunked": chunked, "over_ms": over_ms}
        found: list[float] = self._ask({"do": "uploads", "host": host, "port": port, "count": count, **sizes})
        return found

    def load(self, url: str, workload: Workload, transport: str, cafile: str | None) -> dict[str, Any]:
        """``workload`` by the load generator: requests, failures, right answers, tokens each way."""
        order = {"url": url, "workload": workload.to_json(), "transport": transport, "cafile": cafile}
        found: dict[str, Any] = self._ask({"do": "load", **order})
        return found

    def _seen(self, what: str, target: Target, plan: Schedule, **more: Any) -> Seen:
        found = self._ask({"do": what, "target": asdict(target), "plan": asdict(plan), **more})
        late, ttft, failures = (tuple(found.pop(name)) for name in ("late_ms", "ttft_ms", "failures"))
        return Seen(late, ttft, failures, **found)

    def _ask(self, order: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the client's process on the link ended; its error is above")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"on the client's host: {answer['error']}")
        return answer["found"]


async def streams(target: Target, count: int, plan: Schedule, ramp_s: float, model: str = "") -> Seen:
    """All at once, over as many connections as the target says."""
    records, bodies = [Record(index) for index in range(count)], _bodies(count, plan.tokens, model)
    client = Client(target)

    async def one(record: Record, body: bytes) -> None:
        await asyncio.sleep(ramp_s * record.index / count)
        await client.chat(body, record, TIMEOUT_S)

    began = time.perf_counter()
    try:
        await asyncio.gather(*map(one, records, bodies))
    finally:
        await client.close()
    return _seen(records, plan, time.perf_counter() - began)


async def cold_and_warm(target: Target, plan: Schedule) -> Seen:
    """See ``Caller.cold_and_warm``."""
    records, client, began = [Record(0), Record(1)], Client(target), time.perf_counter()
    for record, body in zip(records, _bodies(2, plan.tokens), strict=True):
        await client.chat(body, record, TIMEOUT_S)
    await client.close()
    return _seen(records, plan, time.perf_counter() - began)


def _seen(records: Sequence[Record], plan: Schedule, took_s: float) -> Seen:
    whole = [record for record in records if not record.failure]
    late = [late_s * 1e3 for record in whole for late_s in _late_tokens(record, plan)]
    ttft = [(record.chunks[0][0] - record.sent) * 1e3 for record in whole if record.chunks and record.sent is not None]
    failures = tuple(f"{record.failure}: {record.message}" for record in records if record.failure)
    return Seen(tuple(late), tuple(ttft), failures, took_s)


def _late_tokens(record: Record, plan: Schedule) -> list[float]:
    """Of each token of a stream from a server that sends by ``plan``: seconds from when it was due to when it came."""
    words = [word + " " for word in record.text.split(" ")[:-1]]
    chunks, used = [], 0
    for arrived, tokens, _ in record.chunks:
        chunks.append((arrived, "".join(words[used : used + tokens])))
        used += tokens
    return lateness_s(plan, chunks)


def upload_ms(host: str, port: int, prompt_bytes: int, chunks: int, chunked: bool, over_ms: float) -> float:
    """See ``Caller.uploads``. Raises OSError or HTTPException."""
    body = _bodies(1, 1)[0].replace(b"hello", b"ledger " * (prompt_bytes // 7))
    size = -(-len(body) // chunks)
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    connection.request("GET", "/health")
    connection.getresponse().read()
    began = time.perf_counter()

    def coming() -> Iterator[bytes]:
        for number, piece in enumerate(pieces):
            due = began + over_ms / 1e3 * number / max(len(pieces) - 1, 1)
            time.sleep(max(0.0, due - time.perf_counter()))
            yield piece

    headers = {"Content-Type": "application/json"}
    if chunked:
        headers["Transfer-Encoding"] = "chunked"
        connection.request("POST", CHAT, coming(), headers, encode_chunked=True)
    else:
        connection.request("POST", CHAT, b"".join(coming()), headers)
    first = _first_token(connection.getresponse())
    connection.close()
    return (first - began) * 1e3


def _first_token(response: http.client.HTTPResponse) -> float:
    """When it came, on ``time.perf_counter``. Raises UserError if none did."""
    parser, first = SseParser(), 0.0
    while line := response.readline():
        now = time.perf_counter()
        for payload in parser.feed(line):
            if payload != b"[DONE]" and not first:
                choices = json.loads(payload).get("choices") or [{}]
                first = now if (choices[0].get("delta") or {}).get("content") else 0.0
    if not first:
        raise UserError(f"the server answered {response.status} and no token")
    return first


def _bodies(count: int, tokens: int, model: str = "") -> list[bytes]:
    if model:
        workload = Workload.article(requests=count, max_tokens=tokens)
        return [prepare(arrival, workload, model).body for arrival in islice(schedule(workload), count)]
    question = {"messages": [{"role": "user", "content": "hello"}], "stream": True, "max_tokens": tokens}
    return [json.dumps(question).encode()] * count


def _loaded(order: dict[str, Any]) -> dict[str, Any]:
    workload = Workload.from_json(order["workload"])
    load = send_load(
        order["url"], workload, transport=order["transport"], cafile=order["cafile"], processes=1
    )  # fmt: skip
    ended = load.events[load.events["kind"].isin(("done", "failed"))]
    done = ended[ended["kind"] == "done"]
    return {
        "requests": len(ended),
        "failures": len(ended) - len(done),
        "correct": int(done["correct"].sum()),
        "prompt_tokens": int(done["prompt_tokens"].sum()),
        "tokens": int(done["tokens"].sum()),
    }


def answer(order: dict[str, Any]) -> Any:
    """What one order found, ready for JSON."""
    what = order.pop("do")
    if what == "load":
        return _loaded(order)
    if what == "uploads":
        count = order.pop("count")
        return [upload_ms(**order) for _ in range(count)]
    order |= {"target": Target(**order["target"]), "plan": Schedule(**order["plan"])}
    return asdict(asyncio.run(streams(**order) if what == "streams" else cold_and_warm(**order)))


def main() -> None:
    # The client must not be what is late; what loading left behind need not be looked through after every run.
    gc.disable()
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        try:
            said = {"found": answer(json.loads(line))}
        except (UserError, OSError, http.client.HTTPException, ValueError) as error:
            said = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
