"""The server as a process: granian on a socket of ours, the engine beside it, from loading to the last request."""

from __future__ import annotations

import asyncio
import contextlib
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.net import SocketHolder
from granian.server.embed import Server
from starlette.types import ASGIApp

from labkit.deployment import Deployment
from labkit.errors import UserError
from labkit.models.loading import resolve_model
from labkit.serving.app import create_app
from labkit.serving.options import ServerOptions

BACKLOG = 4096
MOST_CONNECTIONS = 16_384
IDLE_CONNECTION_MS = 120_000
PROGRESS_S = 2.0
HARD_EXIT_S = 3.0


class _SocketServer(Server):
    """granian in this process, on a socket that is bound already.

    granian binds its own sockets with SO_REUSEPORT, so that a second server on a port in use would take half of the
    first one's connections instead of failing; and it cannot tell which port it got for port 0.
    """

    def __init__(self, app: ASGIApp, listener: socket.socket, access_log: bool) -> None:
        host, port = listener.getsockname()[:2]
        super().__init__(
            app,
            address=host,
            port=port,
            interface=Interfaces.ASGI,
            http=HTTPModes.http1,
            websockets=False,
            backlog=BACKLOG,
            backpressure=MOST_CONNECTIONS,
            http1_settings=HTTP1Settings(header_read_timeout=IDLE_CONNECTION_MS),
            log_level=LogLevels.error,
            log_access=access_log,
        )
        self._listener = listener

    def _init_shared_socket(self) -> None:
        # granian closes the descriptor when it is done.
        self._shd: Any = SocketHolder(self._listener.detach(), False, BACKLOG)  # type: ignore[call-arg]


async def serve_app(app: ASGIApp, listener: socket.socket, stop: asyncio.Event, access_log: bool = False) -> None:
    """Serves ``app`` on ``listener`` (bound, listening; taken over) until ``stop``, then lets running requests end."""
    server = _SocketServer(app, listener, access_log)
    serving = asyncio.create_task(server.serve())
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
        server.stop()
        await serving
    finally:
        stopped.cancel()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises UserError when the address cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}; give --host an address of this machine") from error
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --port (0: a free one)"
        ) from error
    return listener


def serve(
    deployment: Deployment,
    options: ServerOptions,
    host: str = "127.0.0.1",
    port: int = 8000,
    log_level: str = "warning",
    die_with_parent: bool = False,
) -> int:
    """Serves ``deployment`` until SIGTERM or SIGINT; returns the exit code. Prints ``labkit: ready on URL`` when warm.

    Raises UserError for a model that is not there or an address that cannot be had.
    """
    if not (resolve_model(deployment.model) / "config.json").is_file():
        raise UserError(f"{deployment.model} has no config.json; give a Hugging Face directory or a hub id")
    logging.basicConfig(level=log_level.upper(), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    _allow_many_connections()
    listener = listen(host, port)
    if options.api_key is None and not _is_loopback(host):
        _say(f"warning: {host} can be reached from other machines and no --api-key is set", error=True)
    return asyncio.run(_serve(deployment, options, listener, log_level == "debug", die_with_parent))


async def _serve(
    deployment: Deployment, options: ServerOptions, listener: socket.socket, access_log: bool, die_with_parent: bool
) -> int:
    from labkit.engine import AsyncEngine

    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    engine = AsyncEngine(deployment)
    app = create_app(engine, options)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    ask_to_stop = _stopper(stop)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask_to_stop)
    # The engine must not see a start before the socket answers: /health says "loading" from the first moment.
    serving = asyncio.create_task(serve_app(app, listener, stop, access_log))
    parent = asyncio.create_task(_stop_when_orphaned(os.getppid(), stop)) if die_with_parent else None
    code = 0
    try:
        engine.start()
        if await _announce(engine, deployment, url, stop):
            code = 1
        else:
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not stop.is_set():
                _say("the HTTP server ended by itself; see the messages above", error=True)
                code = 1
        app.state.draining = True
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


def name_of(model: str) -> str:
    """What clients call a model: a directory's name, or the hub id."""
    return Path(model).resolve().name if Path(model).is_dir() else model
