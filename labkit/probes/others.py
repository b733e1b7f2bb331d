"""How busy other programs kept the machine meanwhile: what they take, a measurement lacks."""

from __future__ import annotations

import resource
import time

from labkit.probes.host import busy_seconds

NOTABLE = 0.1
"""Share of the cores from which on other programs are mentioned."""


class OtherLoad:
    """Counts from when it is made."""

    def __init__(self) -> None:
        self._began, self._busy_s, self._own_s = time.perf_counter(), busy_seconds(), _own_s()

    def cores(self) -> float:
        """How many cores were busy on average with neither this process nor its descendants.

        Of the machine's cores those count that this process may use; time that a hypervisor gave to other guests
        ("steal") is busy too. A descendant is known as such once it has ended and been waited for, all the way up.
        """
        others_s = busy_seconds() - self._busy_s - (_own_s() - self._own_s)
        return max(0.0, others_s / (time.perf_counter() - self._began))


def disturbance(other_cores: float, cores: int) -> str | None:
    """What to say where other programs took so much that times are not to be relied on; None where they did not."""
    if other_cores < NOTABLE * cores:
        return None
    taken = f"{other_cores:.1f} of {cores} cores"
    return f"Other programs kept {taken} busy meanwhile: what was timed is not to be relied on. End them and repeat it."


def _own_s() -> float:
    spent = (resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in spent)
