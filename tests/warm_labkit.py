"""Runs `labkit` commands in forks of this process, which has loaded what they need: a start costs no import of torch.

``python tests/warm_labkit.py`` reads a line of JSON for each, {"arguments": [...], "log": PATH}, and answers with the
number of the process, which has a session of its own. When the input ends, so do they.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from importlib import import_module

from labkit import cli
from labkit.deployment import SHIPPED_MODEL
from labkit.models.loading import load_tokenizer

LOADED = (
    "labkit.engine",
    "labkit.runner.runner",
    "labkit.serving.server",
    "labkit.serving.grpc_server",
    "labkit.serving.http3",
    "transformers.models.qwen2.modeling_qwen2",
)


def run(arguments: list[str], log: str) -> None:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with open(log, "w") as said, open(os.devnull) as nothing:
        for file, number in ((nothing, 0), (said, 1), (said, 2)):
            os.dup2(file.fileno(), number)
    sys.argv = ["labkit", *arguments]
    try:
        cli.main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for module in LOADED:
        import_module(module)
    load_tokenizer(SHIPPED_MODEL)  # which imports more of transformers
    children = []
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            run(**json.loads(line))
            os._exit(0)
        children.append(child)
        print(child, flush=True)
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
