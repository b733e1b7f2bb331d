"""The instructions of a CPU: two processes in turn, the older one slower."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from labkit.errors import UserError
from labkit.experiments import instructions
from labkit.experiments.contests import gain
from labkit.experiments.instructions import NEW, OLD, SIZE, instruction_rounds

X86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")


@pytest.mark.skipif(not X86, reason="oneDNN can be held back on x86 alone")
def test_old_instructions_are_slower() -> None:
    table = instruction_rounds(rounds=7)
    assert table.groupby("way")["round"].apply(list).to_dict() == {OLD: [*range(7)], NEW: [*range(7)]}
    # four numbers at once and no fused multiply-add, against at least eight and two units that have it
    assert gain(table, OLD, NEW, SIZE).value > 1.5


def test_elsewhere_it_says_why_there_are_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    table = instruction_rounds()
    assert set(table["note"]) == {"on x86 CPUs only"} and table["seconds"].isna().all()


def test_a_process_that_fails_is_named() -> None:
    command = [sys.executable, "-c", "raise SystemExit(1)"]
    with pytest.raises(UserError, match=r"SSE4\.1"), instructions._worker(command, os.environ) as worker:
        worker.wait()
        instructions._ask(worker)
