from __future__ import annotations

import torch

from labkit.bench.profile import TOP, device_profile, host_profile, kernel_table, union_length


def test_the_union_of_overlapping_spans():
    assert union_length([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert union_length([]) == 0


def test_the_table_is_ordered_and_sums_up_the_rest():
    rows = [(f"kernel{i}", 1, float(i)) for i in range(TOP + 5)]
    lines = kernel_table(rows, wall_s=1.0).splitlines()
    assert len(lines) == TOP + 2
    assert lines[1].split() == ["1", "19.00", "1.9%", "kernel19"]
    assert lines[-1].split() == ["5", "10.00", "1.0%", "5", "others"]


def test_long_kernel_names_keep_both_ends():
    (_, line) = kernel_table([("void cutlass::" + "x" * 200 + "_end", 1, 1.0)], 1.0).splitlines()
    assert "void" not in line and line.endswith("_end") and len(line) < 120


def test_profiles_name_what_took_the_time():
    square = torch.randn(256, 256)
    text = device_profile(lambda: square @ square)
    assert "GPU busy" in text if torch.cuda.is_available() else "aten::mm" in text
    assert "sum" in host_profile(lambda: [sum(range(1000)) for _ in range(100)])
