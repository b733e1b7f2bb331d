"""From a load to a run in the store, with the manifest that says what it was."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from labkit.experiments.provenance import code_version, machine, versions
from labkit.experiments.store import Draft, Run, RunStore
from labkit.traffic.calibrate import Calibration, audit_arrivals, calibrate, client_facts, client_reasons, script_like
from labkit.traffic.generate import Load, Progress, send_load
from labkit.traffic.target import Connections
from labkit.traffic.workload import Workload


def record_load(
    url: str,
    workload: Workload,
    store: RunStore,
    model: str | None = None,
    *,
    api_key: str | None = None,
    transport: str | None = None,
    connections: Connections | None = None,
    cafile: str | None = None,
    processes: int | None = None,
    calibrated: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Sends ``workload`` to a server that somebody else runs, and keeps what happened as a run.

    ``calibrated``: afterwards, a few seconds of a server of known timing tell how much the client itself added.
    """
    with store.create(workload.name) as draft:
        load = send_load(
            url, workload, model, api_key=api_key, transport=transport, connections=connections, cafile=cafile,
            processes=processes, progress=progress, spool=draft.path,
        )  # fmt: skip
        calibration = None
        if calibrated:
            like, processes = script_like(load.events), len(load.cpu_shares)
            calibration = calibrate(workload, like, processes, load.transport, load.connections)
        return finish(draft, load, workload, calibration, {"url": url})


def finish(
    draft: Draft,
    load: Load,
    workload: Workload,
    calibration: Calibration | None,
    more: dict[str, Any],
    samples: pd.DataFrame | None = None,
) -> Run:
    """Writes the run; ``more`` is what the caller knows besides (deployment, server, probes, key)."""
    reasons = client_reasons(load, workload, calibration)
    manifest = {
        "deployment": None,
        **more,
        "model": load.model,
        "workload": json.loads(workload.to_json()),
        "seed": workload.seed,
        "code": code_version(),
        "versions": versions(),
        "machine": machine(),
        "clock": {"source": f"time.perf_counter on {sys.platform}, t_s is since zero", "zero": load.zero},
        "started_at": datetime.fromtimestamp(load.started_at, UTC).isoformat(timespec="milliseconds"),
        "window": list(load.window),
        "cut": load.cut,
        "valid": not reasons,
        "reasons": reasons,
        "client": {
            "transport": load.transport,
            "connections": load.connections,
            **client_facts(load),
            "calibration": dataclasses.asdict(calibration) if calibration else None,
        },
        "arrivals": audit_arrivals(load.events, workload),
    }
    return draft.finish(manifest, load.events, samples)
