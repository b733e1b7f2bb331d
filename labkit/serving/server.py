"""The server as a process: granian on a socket of ours, the engine beside it, from loading to the last request."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import json
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from labkit.deployment import Deployment
from labkit.errors import UserError
from labkit.models.directory import resolve_model
from labkit.serving.app import create_app
from labkit.serving.extras import require_http3
from labkit.serving.http import MOST_CONNECTIONS, listen, serve_app
from labkit.serving.intake import Service
from labkit.serving.options import ServerOptions
from labkit.serving.schedule import Schedule
from labkit.serving.schedule_engine import ScheduleEngine
from labkit.serving.tls import Certificate, given_certificate, own_certificate

if TYPE_CHECKING:
    from labkit.engine import AsyncEngine

PROGRESS_S = 2.0
HARD_EXIT_S = 3.0


@dataclass(frozen=True)
class Where:
    """The address to listen on; ``port`` 0 takes a free one. ``certificate`` and ``key`` are for ``http/2 tls`` and
    ``http/3``: PEM files, or None for a certificate that is made here."""

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: Path | None = None
    key: Path | None = None

    def tls(self) -> Certificate:
        """Raises UserError for files that are not a certificate and its key."""
        if self.certificate is None or self.key is None:
            if self.certificate or self.key:
                raise UserError("a certificate and its key belong together; give --certificate and --key")
            return own_certificate((self.host,))
        return given_certificate(self.certificate, self.key)


def serve(
    deployment: Deployment,
    options: ServerOptions,
    where: Where,
    log_level: str = "warning",
    die_with_parent: bool = False,
    schedule: Schedule | None = None,
) -> int:
    """Serves ``deployment`` until SIGTERM or SIGINT; returns the exit code. Prints ``labkit: ready on URL`` when warm.

    With a ``schedule`` no model runs: tokens come when it says. Raises UserError for a model that is not there or an
    address that cannot be had.
    """
    if not (resolve_model(deployment.model) / "config.json").is_file():
        raise UserError(f"{deployment.model} has no config.json; give a Hugging Face directory or a hub id")
    logging.basicConfig(level=log_level.upper(), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    _allow_many_connections()
    if options.api_key is None and not _is_loopback(where.host):
        _say(f"warning: {where.host} can be reached from other machines and no --api-key is set", error=True)
    return asyncio.run(_serve(deployment, options, where, log_level == "debug", die_with_parent, schedule))


async def _serve(
    deployment: Deployment,
    options: ServerOptions,
    where: Where,
    access_log: bool,
    die_with_parent: bool,
    schedule: Schedule | None,
) -> int:
    engine = _engine(deployment, schedule)
    service = Service.of(engine, options)
    stop = asyncio.Event()
    front, address = _fronts(service, where, stop, access_log)
    loop = asyncio.get_running_loop()
    ask_to_stop = _stopper(stop)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask_to_stop)
    # The engine must not see a start before the socket answers: /health says "loading" from the first moment.
    serving = asyncio.create_task(front)
    parent = asyncio.create_task(_stop_when_orphaned(os.getppid(), stop)) if die_with_parent else None
    code = 0
    try:
        engine.start()
        if await _announce(engine, deployment, address, stop):
            code = 1
        else:
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not stop.is_set():
                _say("the server ended by itself; see the messages above", error=True)
                code = 1
        service.draining = True
        stop.set()
        _exit_at_last(options.drain_s + HARD_EXIT_S, code)
        await asyncio.wait((serving,), timeout=options.drain_s)
    finally:
        # Streams that still run end with an error event once the engine is gone.
        await asyncio.to_thread(engine.stop)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(serving, HARD_EXIT_S / 2)
        if parent is not None:
            parent.cancel()
    return code


def _engine(deployment: Deployment, schedule: Schedule | None) -> AsyncEngine | ScheduleEngine:
    if schedule is not None:
        return ScheduleEngine(deployment, schedule)
    from labkit.engine import AsyncEngine  # brings PyTorch, without which a schedule is there in a tenth of the time

    return AsyncEngine(deployment)


def _fronts(
    service: Service, where: Where, stop: asyncio.Event, access_log: bool
) -> tuple[Coroutine[Any, Any, Any], str]:
    """What serves until ``stop``, and its address. Raises UserError when the address cannot be had."""
    transport, app = service.engine.deployment.transport, create_app(service)
    shown = f"[{where.host}]" if ":" in where.host else where.host
    if transport == "grpc":
        from labkit.serving.grpc_server import GrpcServer

        server, listener = GrpcServer(service, where.host, where.port), listen(where.host, 0)
        beside = f"http://{shown}:{listener.getsockname()[1]}"
        fronts = asyncio.gather(server.serve(stop), serve_app(app, listener, stop, access_log))
        return _both(fronts), f"grpc://{shown}:{server.port}, with health and metrics on {beside}"
    if transport == "http/3":
        require_http3()
        from labkit.serving.http3 import listen_http3, serve_http3

        tls = where.tls()
        listener, udp = listen_http3(where.host, where.port)
        address = _address(listener, tls)
        return serve_http3(app, udp, listener, stop, access_log, tls, service.options.drain_s), address
    own = where.tls() if transport == "http/2 tls" else None
    listener = listen(where.host, where.port)
    address = _address(listener, own)
    return serve_app(app, listener, stop, access_log, transport, own), address


def _address(listener: socket.socket, tls: Certificate | None) -> str:
    host, port = listener.getsockname()[:2]
    if tls is not None:
        _say(f"certificate {tls.certificate}")
    return f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"


async def _both(fronts: asyncio.Future[Any]) -> None:
    await fronts


async def _announce(engine: Any, deployment: Deployment, url: str, stop: asyncio.Event) -> bool:
    """Prints progress until the engine is ready; True when it failed."""
    began = shown = time.monotonic()
    _say(f"loading {deployment.model}")
    while not (engine.ready or engine.failed is not None or stop.is_set()):
        await asyncio.sleep(0.02)
        if time.monotonic() - shown >= PROGRESS_S:
            shown = time.monotonic()
            _say(f"still loading, {shown - began:.0f} s")
    if engine.failed is not None:
        _say(f"cannot serve {deployment.model}: {engine.failed}", error=True)
        return True
    if engine.ready:
        # What loading left behind lives as long as the process: a collector that goes through it holds up every stream.
        gc.collect()
        gc.freeze()
        _say(f"ready on {url}")
    return False


def _stopper(stop: asyncio.Event) -> Callable[[], None]:
    """The first signal asks to stop; the second one does not ask."""

    def signalled() -> None:
        if stop.is_set():
            os._exit(130)
        _say("stopping")
        stop.set()

    return signalled


async def _stop_when_orphaned(parent: int, stop: asyncio.Event) -> None:
    """A server that was started for a measurement must not outlive it, whatever killed the measurement."""
    while os.getppid() == parent:
        await asyncio.sleep(0.5)
    stop.set()


def _exit_at_last(seconds: float, code: int) -> None:
    """Ends the process even if a thread hangs in a step or a system call."""
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()


def end_process(code: int) -> NoReturn:
    """Ends without taking the interpreter down: threads of the HTTP server may still ask for it, and would abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _allow_many_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS * 2 if hard == resource.RLIM_INFINITY else min(hard, MOST_CONNECTIONS * 2)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _say(text: str, error: bool = False) -> None:
    print(f"labkit: {text}", file=sys.stderr if error else sys.stdout, flush=True)


def default_temperature(model: str) -> float:
    """0 where the model's generation_config.json says ``do_sample: false``, else OpenAI's default of 1.

    Raises UserError for a model that is not there.
    """
    try:
        config = json.loads((resolve_model(model) / "generation_config.json").read_text())
    except (OSError, ValueError):
        return 1.0
    return 0.0 if isinstance(config, dict) and config.get("do_sample") is False else 1.0
