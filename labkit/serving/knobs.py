"""A deployment from what was typed on the command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from labkit.deployment import Deployment
from labkit.errors import UserError


def deployment_from(
    model: str | None,
    given: str | None = None,
    as_first_deployed: bool = False,
    knobs: Sequence[str] = (),
    at_full_speed: bool = False,
) -> Deployment:
    """``given`` is a JSON object or a file that holds one, each of ``knobs`` is ``name=value``; the later ones win, and
    ``model`` wins over all. Raises UserError for a knob or value that does not exist.
    """
    if (given is not None) + as_first_deployed + at_full_speed > 1:
        raise UserError("--deployment, --as-first-deployed and --at-full-speed are starting points; give one")
    try:
        if given is not None:
            start = Deployment.from_json(given if given.lstrip().startswith("{") else _read(given))
        elif as_first_deployed:
            start = Deployment.as_first_deployed()
        else:
            start = Deployment.at_full_speed() if at_full_speed else Deployment()
        changes = dict(map(_knob, knobs))
        if model is not None:
            changes["model"] = model
        return dataclasses.replace(start, **changes)
    except (ValueError, TypeError) as error:
        raise UserError(f"not a deployment: {error}") from error


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the deployment file {path}: {error}") from error


def _knob(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    names = [field.name for field in dataclasses.fields(Deployment)]
    if not equals:
        raise UserError(f"--set takes knob=value, got {text!r}; the knobs are {', '.join(names)}")
    if name not in names:
        raise UserError(f"there is no knob {name!r}; the knobs are {', '.join(names)}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
