"""The other processes of an engine whose model is split: started, told what to do, and ended with this one.

Rank 0 is the engine's own process. It tells the others what to do through pipes, and the results of each half of a
layer meet in ``torch.distributed``. All ranks must call the same methods in the same order, or each would wait for
another: whatever fails on one fails for all.
"""

from __future__ import annotations

import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from labkit.deployment import Deployment
from labkit.errors import UserError
from labkit.models.loading import Checkpoint
from labkit.models.parallel import Parallel

HOST = "127.0.0.1"
RENDEZVOUS_TIMEOUT = timedelta(minutes=2)
GRACE_S = 2.0
"""A process that fails takes the others' collectives along; so long its own reason for it is waited for."""
CLOSE_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Order:
    """All that a worker is told when it starts."""

    checkpoint: Checkpoint
    deployment: Deployment
    device: torch.device
    parallel: Parallel
    port: int
    """Where rank 0 has the store for the rendezvous."""


class Workers:
    """Ranks 1 and up of one model. There can be one such set in a process at a time."""

    def __init__(self, checkpoint: Checkpoint, deployment: Deployment, device: torch.device) -> None:
        """Starts the processes and joins them to a group; they load the model meanwhile. Raises UserError where the
        model or the machine has not enough to share, or a worker fails."""
        world = deployment.tensor_parallel
        self.parallel = Parallel(0, world)
        self.parallel.share(checkpoint.shape)
        if device.type == "cuda" and world > torch.cuda.device_count():
            raise UserError(
                f"tensor_parallel is {world}, but torch finds {torch.cuda.device_count()} CUDA devices here"
            )
        if dist.is_initialized():
            raise UserError("this process already has a torch.distributed group; it can hold one split model at a time")
        self._failure: str | None = None
        self._failed = threading.Event()
        self._lock = threading.Lock()
        self._answers: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []
        try:
            with self.together():
                self._start(checkpoint, deployment, device)
        except BaseException:
            self.close()
            raise

    def answers(self) -> list[int]:
        """The next number of each worker, in no order. Raises UserError if one fails instead."""
        found = []
        for _ in self._processes:
            answer = self._answers.get()
            self.check()
            assert answer is not None
            found.append(answer)
        return found

    def call(self, method: str, *args: Any) -> None:
        """Has every worker call a method of its runner, without waiting for it."""
        self.check()
        self._send([pickle.dumps((method, args))] * len(self._processes))

    def check(self) -> None:
        """Raises UserError if a process has failed."""
        if self._failure is not None:
            raise UserError(self._failure)

    @contextmanager
    def together(self) -> Iterator[None]:
        """For what all ranks do at once: if it fails here or there, all workers end, and UserError says who failed."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, UserError):
                self._failed.wait(GRACE_S)
            self._fail(0, describe(error))
            self._kill()
            if isinstance(error, UserError) or not isinstance(error, Exception):
                raise
            raise UserError(self._failure) from error

    def close(self) -> None:
        """Ends the workers and leaves the group. Captured CUDA graphs must be gone before."""
        self._fail(0, "the engine was closed")
        self._kill()
        for thread in self._threads:
            thread.join(CLOSE_TIMEOUT_S)
        if dist.is_initialized() and not any(thread.is_alive() for thread in self._threads):
            dist.destroy_process_group()

    def _start(self, checkpoint: Checkpoint, deployment: Deployment, device: torch.device) -> None:
        listener = socket.create_server((HOST, 0))
        port = listener.getsockname()[1]
        # The store would listen on all of the machine's addresses.
        store = dist.TCPStore(
            HOST,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=RENDEZVOUS_TIMEOUT,
            master_listen_fd=listener.detach(),
            use_libuv=False,
        )
        self._thread(self._release)
        orders = []
        for rank in range(1, self.parallel.world):
            # In sessions of their own, where Ctrl-C reaches rank 0 alone, which ends them when it is done.
            process = subprocess.Popen(
                [sys.executable, "-m", "labkit.runner.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            self._processes.append(process)
            self._thread(self._listen, rank, process)
            orders.append(Order(checkpoint, deployment, device, Parallel(rank, self.parallel.world), port))
        self._send([pickle.dumps(order) for order in orders])
        self.answers()
        join_group(self.parallel, store, device)

    def _send(self, packed: list[bytes]) -> None:
        """One message for each worker."""
        for process, message in zip(self._processes, packed, strict=True):
            assert process.stdin is not None
            process.stdin.write(message)
            process.stdin.flush()

    def _listen(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        """A thread for each worker: takes what it says until it ends, which it is not to do by itself."""
        assert process.stdout is not None
        reason = None
        try:
            while True:
                answer = pickle.load(process.stdout)
                if isinstance(answer, str):
                    reason = answer
                else:
                    self._answers.put(answer)
        except (EOFError, pickle.UnpicklingError):
            pass
        process.stdout.close()
        code = process.wait()
        ending = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._fail(rank, reason or ending)

    def _fail(self, rank: int, reason: str) -> None:
        """The first failure is the one that counts. Whoever waits for the failed process is woken."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure = f"process {rank} of {self.parallel.world} that share the model failed: {reason}"
        self._failed.set()
        self._answers.put(None)

    def _release(self) -> None:
        """A thread that frees this process once another has failed, for which its NCCL kernels would wait for ever."""
        self._failed.wait()
        group = dist.group.WORLD
        if group is not None and dist.get_backend(group) == "nccl":
            group.abort()  # which frees at once, but does not return while captured CUDA graphs refer to the group

    def _thread(self, work: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            with suppress(BrokenPipeError):  # what was not sent yet
                process.stdin.close()  # type: ignore[union-attr]


def join_group(parallel: Parallel, store: dist.Store, device: torch.device) -> None:
    """Makes this process one of those that ``Parallel.sum`` adds up, on its own GPU where there are GPUs."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(parallel.rank)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=parallel.rank,
        world_size=parallel.world,
        device_id=torch.device("cuda", parallel.rank) if cuda else None,
    )


def describe(error: BaseException) -> str:
    """What one process tells another of an error."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
