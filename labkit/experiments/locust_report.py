"""Loaded by Locust beside labkit/traffic/locustfile.py: writes all that it counted to the file LABKIT_LOCUST_REPORT.

None of its own outputs has both: the JSON names no errors, and the CSV lacks those of the last second.
"""

from __future__ import annotations

import json
import os
from typing import Any

from locust import events


@events.quitting.add_listener
def _write(environment: Any, **_: Any) -> None:
    errors = [error.to_dict() for error in environment.stats.errors.values()]
    with open(os.environ["LABKIT_LOCUST_REPORT"], "w") as out:
        json.dump({"entries": environment.stats.serialize_stats(), "errors": errors}, out)
