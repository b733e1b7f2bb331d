"""The process that executes one notebook: ``python -m labkit.report.worker ORDER``, as ``labkit.report.execute`` does.

It says what it does as lines of JSON on standard output, and ends with all it started as soon as its standard input
closes: that is how it notices that `labkit run` was killed.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from labkit.report import processes


def main() -> None:
    order = json.loads(sys.argv[1])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # A kernel and what it leaves behind inherit standard output; the parent is told things where they cannot write.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**event: Any) -> None:
        print(json.dumps(event), file=channel, flush=True)

    import papermill
    from papermill.exceptions import PapermillExecutionError

    def on_cell_start(cell: Any, cell_index: int) -> None:
        if cell["cell_type"] == "code":
            say(event="start", cell=cell.get("id"), index=cell_index)

    def on_cell_executed(cell: Any, cell_index: int, **_: Any) -> None:
        say(event="end", cell=cell.get("id"), index=cell_index)

    try:
        papermill.execute_notebook(
            order["source"],
            order["output"],
            parameters=order["parameters"],
            cwd=order["cwd"],
            progress_bar=False,
            start_timeout=120,
            coalesce_streams=True,
            on_cell_start=on_cell_start,
            on_cell_executed=on_cell_executed,
        )
    except PapermillExecutionError as error:
        say(event="raised", cell=None, reason=f"{error.ename}: {error.evalue}")
        sys.exit(1)
    except BaseException as error:
        say(event="died", cell=None, reason=f"{type(error).__name__}: {error}")
        sys.exit(2)


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    processes.end(os.environ[processes.TOKEN_VARIABLE], os.getpid())
    os._exit(137)


if __name__ == "__main__":
    main()
