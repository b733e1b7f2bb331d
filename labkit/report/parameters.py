"""Parameters from the command line: name=value, the value as YAML, so that true is a boolean and [1, 2] a list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from labkit.errors import UserError


def parse(pairs: Sequence[str]) -> dict[str, Any]:
    """Raises UserError for a pair that is none, a name that is no Python name, and a value that is no YAML."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"a parameter is given as name=value, got {pair!r}")
        try:
            found[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"the value of parameter {name} is no YAML: {text!r}") from error
    return found
