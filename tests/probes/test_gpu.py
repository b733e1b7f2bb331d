from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from labkit.probes import gpu
from labkit.probes.gpu import GpuProbe
from labkit.probes.sampler import Sampler


class FakeNvml:
    """NVML of one GPU, as far as the probe uses it; ``refuses`` names the calls that the device does not support."""

    NVMLError = gpu.pynvml.NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, refuses: tuple[str, ...] = ()) -> None:
        self.refuses, self.asked = refuses, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        answers: dict[str, Any] = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetHandleByIndex": lambda index: self.asked.append(index) or index,
            "nvmlDeviceGetHandleByUUID": lambda uuid: self.asked.append(uuid) or uuid,
            "nvmlDeviceGetName": lambda _: b"NVIDIA Test",
            "nvmlSystemGetDriverVersion": lambda: "600.1",
            "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=87, memory=3),
            "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(used=5 << 30, total=141 << 30),
            "nvmlDeviceGetPowerUsage": lambda _: 412_500,
            "nvmlDeviceGetClockInfo": lambda _, kind: {1: 1980, 2: 3201}[kind],
            "nvmlDeviceGetTemperature": lambda _, __: 51,
        }
        if name in self.refuses:
            return lambda *_: (_ for _ in ()).throw(gpu.pynvml.NVMLError(3))
        return answers[name]


def test_one_reading_in_the_documented_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "pynvml", FakeNvml())
    probe = GpuProbe()
    assert probe.present and probe.description == "NVML: NVIDIA Test, driver 600.1"
    assert probe.read() == {
        "utilisation": 87.0,
        "memory_used_bytes": float(5 << 30),
        "memory_total_bytes": float(141 << 30),
        "power_w": 412.5,
        "sm_mhz": 1980.0,
        "memory_mhz": 3201.0,
        "temperature_c": 51.0,
    }


def test_what_a_slice_does_not_report_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "pynvml", FakeNvml(refuses=("nvmlDeviceGetUtilizationRates",)))
    probe = GpuProbe()
    assert "not reported by this device: utilisation" in probe.description
    assert "utilisation" not in probe.read() and probe.read()["power_w"] == 412.5


@pytest.mark.parametrize(
    ("visible", "asked"), [("2,3", [2]), ("GPU-abc", ["GPU-abc"]), (None, [0])], ids=["index", "uuid", "unset"]
)
def test_the_first_visible_device_is_read(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, asked: list[Any]
) -> None:
    fake = FakeNvml()
    monkeypatch.setattr(gpu, "pynvml", fake)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    GpuProbe()
    assert fake.asked == asked


def test_without_a_driver_the_probe_is_absent_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "pynvml", FakeNvml(refuses=("nvmlInit",)))
    with Sampler([GpuProbe()], hz=100) as sampler:
        pass
    assert sampler.frame().empty
    assert sampler.report()["probes"]["gpu"]["description"].startswith("absent: ")
    assert sampler.report()["probes"]["gpu"]["failures"] == 0


def test_hidden_devices_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "pynvml", FakeNvml())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    probe = GpuProbe()
    assert probe.description == "absent: CUDA_VISIBLE_DEVICES hides every GPU" and not probe.present


def test_this_machine_reads_or_says_absent() -> None:
    probe = GpuProbe()
    assert probe.description.startswith("NVML: " if probe.present else "absent: ")
    assert bool(probe.read()) == probe.present
