"""Pins everything that some requirements bring, for every Python that labkit supports: ``lock.py FILE REQUIREMENT...``.

pip evaluates markers for the Python that it runs on only, so what another supported Python needs besides is found from
the metadata and resolved in a further round. Versions that FILE pins already are kept; ``--upgrade`` takes the newest.
Only wheels are taken, so that resolving runs no code of others, and as source what ``--source=NAME,...`` names.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYTHONS = ("3.11", "3.12")
# torch pins the CUDA packages that it wants, and brings them where it wants them.
BROUGHT_BY_TORCH = re.compile(r"cuda-|nvidia-(?!ml-py)")
LINUX_ONLY = {"triton"}


def wanted(requires: Iterable[str], extras: Iterable[str] = ()) -> list[Requirement]:
    """Those of a distribution's requirements that hold under any supported Python, with the extras asked for."""
    found = []
    for requirement in map(Requirement, requires):
        environments = [
            {"python_version": python, "python_full_version": f"{python}.9", "extra": extra}
            for python in PYTHONS
            for extra in ("", *extras)
        ]
        if requirement.marker is None or any(requirement.marker.evaluate(each) for each in environments):
            found.append(requirement)
    return found


def resolve(requirements: list[str], constraints: Path | None, source: str) -> dict[str, dict]:
    """Canonical name -> metadata of everything that pip would install; nothing is installed."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    command += ["--only-binary=:all:", f"--no-binary={source}", "--report", "-", *requirements]
    if constraints:
        command += ["--constraint", str(constraints)]
    report = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {
        canonicalize_name(each["metadata"]["name"]): {**each["metadata"], "extras": each.get("requested_extras", [])}
        for each in json.loads(report)["install"]
    }


def main() -> None:
    arguments = [each for each in sys.argv[1:] if each != "--upgrade" and not each.startswith("--source=")]
    source = next((each.partition("=")[2] for each in sys.argv[1:] if each.startswith("--source=")), ":none:")
    target, requirements = Path(arguments[0]), arguments[1:]
    constraints = target if target.exists() and "--upgrade" not in sys.argv else None
    while True:
        found = resolve(requirements, constraints, source)
        missing = {
            str(need.name)
            for metadata in found.values()
            for need in wanted(metadata.get("requires_dist", []), metadata["extras"])
            if canonicalize_name(need.name) not in found
        }
        if not missing:
            break
        requirements += sorted(missing)
    pins = []
    for name in sorted(found):
        if name == "labkit" or BROUGHT_BY_TORCH.match(name):
            continue
        version = found[name]["version"].partition("+")[0]
        pins.append(f"{name}=={version}" + ("; sys_platform == 'linux'" if name in LINUX_ONLY else ""))
    header = f"# Written by `make lock`; pip installs exactly this on Python {' and '.join(PYTHONS)}.\n"
    target.write_text(header + "\n".join(pins) + "\n")
    print(f"{target}: {len(pins)} packages")


if __name__ == "__main__":
    main()
