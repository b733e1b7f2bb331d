from __future__ import annotations

import http.server
import json
import threading

import pytest

from labkit.errors import UserError
from labkit.experiments.provenance import code_version, machine, versions
from labkit.experiments.record import record_load
from labkit.experiments.store import RunStore
from labkit.experiments.summary import summary, summary_text
from labkit.traffic.golden import Golden, Script
from labkit.traffic.workload import Workload


def test_a_load_becomes_a_run_with_all_that_reproduces_it(tmp_path):
    workload = Workload.article(arrivals="poisson", rate=60.0, requests=40, mix={"short": 1.0}, seed=5)
    with Golden([Script(ttft_s=0.05, itl_s=0.01, tokens=5), *[Script(tokens=5)] * 8, Script(fault="429")]) as golden:
        run = record_load(golden.url, workload, RunStore(tmp_path))
    manifest = run.manifest
    assert Workload.from_json(json.dumps(manifest["workload"])) == workload
    assert (manifest["seed"], manifest["model"], manifest["url"]) == (5, "golden", golden.url)
    assert manifest["arrivals"]["intended"] == manifest["arrivals"]["sent"] == 40
    calibration = manifest["client"]["calibration"]
    assert calibration["requests"] >= 40 and calibration["failures"] == 0
    assert manifest["valid"] == (not manifest["reasons"])

    rows = summary(run)
    assert rows["error rate"].value == 0.1 and rows["  shed"].value == 0.1
    assert rows["latency P50, from scheduled"].n == 36
    text = summary_text(run, limit_s=0.5)
    assert "P95 within 0.5 s: undecided" in text and "goodput within 0.5 s" in text
    assert "40 intended, 40 sent, 0 dropped" in text and "Little's law" in text and "TTFT P95" in text
    assert ("NO VERDICT" in text) == (not run.valid)


def test_where_a_run_came_from():
    assert set(code_version()) == {"commit", "changes"}
    assert versions()["labkit"] and versions()["torch"]
    assert machine()["ram_bytes"] > 2**28 and machine()["cores"] >= 1 and isinstance(machine()["gpus"], list)


def test_a_server_that_is_still_loading_is_said(tmp_path):
    class Loading(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Loading) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match="not ready yet"):
            record_load(f"http://127.0.0.1:{server.server_port}", Workload.article(), RunStore(tmp_path))
        server.shutdown()
    assert list(tmp_path.iterdir()) == []
