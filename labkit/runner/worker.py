"""The process of one rank above 0: ``python -m labkit.runner.worker``, as ``labkit.runner.workers`` starts it.

It does what it is told on standard input, says how it goes on standard output, and ends when its standard input closes:
that is how it notices that the engine is done, or was killed.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from labkit.errors import UserError
from labkit.runner.runner import Runner
from labkit.runner.workers import HOST, RENDEZVOUS_TIMEOUT, Order, describe, join_group


def main() -> None:
    # Whatever prints to standard output would garble what is said there.
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(inbox,), daemon=True).start()

    def say(answer: int | str) -> None:
        pickle.dump(answer, channel)
        channel.flush()

    try:
        obey(inbox, say)
    except BaseException as error:
        with contextlib.suppress(BrokenPipeError):  # rank 0 is gone, and does not want to know
            say(describe(error))
            # One that was killed lets its sockets go before its pipes: then the listener ends this process meanwhile.
            time.sleep(0.5)
            if not isinstance(error, UserError):
                traceback.print_exc()
    os._exit(1)


def obey(inbox: queue.SimpleQueue[Any], say: Callable[[int | str], None]) -> None:
    """Answers 0 once there, and how many KV blocks would fit once loaded; then calls what it is told to."""
    order: Order = inbox.get()
    say(0)
    store = dist.TCPStore(HOST, order.port, is_master=False, timeout=RENDEZVOUS_TIMEOUT)
    join_group(order.parallel, store, order.device)
    runner = Runner(order.checkpoint, order.deployment, order.parallel)
    say(runner.blocks)
    while True:
        method, args = inbox.get()
        getattr(runner, method)(*args)


def _listen(inbox: queue.SimpleQueue[Any]) -> None:
    """A thread of its own, because the main one may wait in a collective that never ends when rank 0 is lost."""
    try:
        while True:
            inbox.put(pickle.load(sys.stdin.buffer))
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
