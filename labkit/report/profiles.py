"""How big each experiment is on this kind of machine: the profiles quick, cpu and h200."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit.errors import UserError

PROFILES_FILE = Path(__file__).resolve().parent.parent.parent / "data" / "profiles.json"
PROFILE_VARIABLE = "LABKIT_PROFILE"
DEFAULT = "quick"


@dataclass(frozen=True)
class Profile:
    """``timeout_s``: the time limit of a notebook that has none of its own."""

    name: str
    description: str
    timeout_s: float
    notebooks: Mapping[str, Mapping[str, Any]]

    def sizes(self, notebook: str) -> dict[str, Any]:
        """The sizes of one notebook's experiment (users, requests, repeats, …). Raises UserError when it has none."""
        if notebook not in self.notebooks:
            raise UserError(f"profile {self.name} states no sizes for {notebook}; add them to {PROFILES_FILE.name}")
        return dict(self.notebooks[notebook]["sizes"])

    def limit_s(self, notebook: str) -> float:
        """The time limit of one notebook in seconds."""
        return float(self.notebooks.get(notebook, {}).get("timeout_s", self.timeout_s))


def load_profile(name: str | None = None, path: Path = PROFILES_FILE) -> Profile:
    """The profile of that name; None takes the environment variable LABKIT_PROFILE, or quick.

    Raises UserError for a name that does not exist and a file that is no list of profiles.
    """
    wanted = name or os.environ.get(PROFILE_VARIABLE) or DEFAULT
    try:
        profiles = json.loads(path.read_text(encoding="utf-8"))
        known = profiles[wanted] if wanted in profiles else None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path.name} cannot be read: {error}") from error
    if known is None:
        raise UserError(f"there is no profile {wanted!r}; choose one of {', '.join(profiles)}")
    try:
        return Profile(wanted, known["description"], float(known["timeout_s"]), known["notebooks"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"profile {wanted} in {path.name} is broken: {error!r}") from error
