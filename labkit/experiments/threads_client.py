"""The article's load generator, rebuilt from its text: threads, a semaphore, one shared session, a timeout of 5 s.

What its code leaves out is left out here: it reads the status and not the answer, its clock starts once the semaphore
let a thread through, and of all that ``requests`` can raise it knows the timeout alone. Anything else ends the thread,
and that request is in no count. The article does not print who calls ``worker``; here every payload has a thread.

``python -m labkit.experiments.threads_client`` runs it in a process of its own: an order in one line of JSON on stdin
(url, concurrency, timeout_s, payloads), the line ``started`` back, and at the end what it found in one line of JSON.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections import Counter
from typing import Any

import requests


class LoadGenerator:
    def __init__(self, url: str, concurrency: int = 100, timeout_s: float = 5.0) -> None:
        self.url, self.timeout_s = url, timeout_s
        self.session = requests.Session()
        self.semaphore = threading.Semaphore(concurrency)
        self.metrics: dict[str, Any] = {"success": 0, "timeout": 0, "latency": [], "error": 0}

    def worker(self, payload: dict[str, Any]) -> None:
        with self.semaphore:
            start = time.time()
            try:
                response = self.session.post(self.url, json=payload, timeout=self.timeout_s)
                self.metrics["latency"].append((time.time() - start) * 1000)
                if response.status_code == 200:
                    self.metrics["success"] += 1
                else:
                    self.metrics["error"] += 1
            except requests.exceptions.Timeout:
                self.metrics["timeout"] += 1


class _Discarded(logging.Handler):
    """Counts the connections that the session's pool, which keeps ten, had no room for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "pool is full" in record.getMessage()


def main() -> None:
    order = json.loads(sys.stdin.readline())
    uncaught: Counter[str] = Counter()
    # Python would print a traceback for each; the client itself learns nothing of them.
    threading.excepthook = lambda args: uncaught.update([args.exc_type.__name__])
    discarded = _Discarded()
    logging.getLogger("urllib3.connectionpool").addHandler(discarded)
    generator = LoadGenerator(order["url"], order["concurrency"], order["timeout_s"])
    threads = [threading.Thread(target=generator.worker, args=(payload,)) for payload in order["payloads"]]
    print("started", flush=True)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({**generator.metrics, "uncaught": uncaught, "discarded_connections": discarded.count}))


if __name__ == "__main__":
    main()
