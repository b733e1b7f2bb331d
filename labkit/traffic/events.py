"""From the lines that client processes spool to the table of events."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

KINDS = ("scheduled", "sent", "first_byte", "chunk", "done", "failed")
COLUMNS = ("request", "kind", "t_s", "tokens", "prompt_tokens", "bucket", "family", "detail", "correct", "text")


def read_spool(path: Path) -> list[dict[str, Any]]:
    """The records of one spool file; a last line without its end (the writer was killed) is left out."""
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def events_table(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """One row an event, in order of time (see KINDS).

    request int64; kind; t_s float64 (seconds since the start of the run, client's monotonic clock); tokens int32 (of
    the chunk; on done, all of the completion); prompt_tokens int32 (on done); bucket, family: str; detail: on chunk
    "reasoning" or "answer", on done the finish reason, on failed the kind of failure; correct: nullable boolean, on
    done; text: on done the whole output, on failed the error message.
    """
    rows: list[tuple[Any, ...]] = []
    for record in records:
        request, bucket, family = record["index"], record["bucket"], record["family"]

        def add(kind: str, t_s: float | None, tokens: int = 0, prompt_tokens: int = 0, detail: str = "",
                correct: bool | None = None, text: str = "") -> None:  # fmt: skip
            if t_s is not None:
                rows.append((request, kind, t_s, tokens, prompt_tokens, bucket, family, detail, correct, text))  # noqa: B023

        add("scheduled", record["scheduled"])
        add("sent", record["sent"])
        add("first_byte", record["first_byte"])
        for t_s, tokens, part in record["chunks"]:
            add("chunk", t_s, tokens, detail=part)
        if record["failure"]:
            add(
                "failed",
                record["end"],
                sum(n for _, n, _ in record["chunks"]),
                detail=record["failure"],
                text=record["message"],
            )
        else:
            thought = f"<think>{record['reasoning']}</think>" if record["reasoning"] else ""
            add("done", record["end"], record["completion_tokens"], record["prompt_tokens"], record["finish_reason"],
                record["correct"], thought + record["text"])  # fmt: skip
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    types = {"request": "int64", "t_s": "float64", "tokens": "int32", "prompt_tokens": "int32", "correct": "boolean"}
    table = table.astype(types | dict.fromkeys(("kind", "bucket", "family", "detail", "text"), "str"))
    return table.sort_values("t_s", kind="stable", ignore_index=True)
