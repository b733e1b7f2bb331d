"""The GPU through NVML. Without a GPU, or without its driver, the probe is absent and says why."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import pynvml


class GpuProbe:
    """One GPU: utilisation (%), memory_used_bytes, memory_total_bytes, power_w, sm_mhz, memory_mhz, temperature_c.

    NVML's utilisation is the share of a recent window (1/6 s to 1 s, by device) in which any kernel ran at all; it says
    nothing about how much of the GPU that kernel filled. What a device cannot report (a MIG slice has no utilisation)
    is left out and named in the description.
    """

    name = "gpu"

    def __init__(self, device: int | str | None = None) -> None:
        """``device``: an NVML index or UUID; None is the first of CUDA_VISIBLE_DEVICES, or device 0. Never raises."""
        self._readers: dict[str, Callable[[], float]] = {}
        try:
            pynvml.nvmlInit()
            handle = _handle(device)
            self.description = self._describe(handle)
        except pynvml.NVMLError as error:
            self.description = f"absent: {error}"
        except (OSError, ValueError) as error:
            self.description = f"absent: {error}"

    @property
    def present(self) -> bool:
        return bool(self._readers)

    def read(self) -> Mapping[str, float]:
        """Empty where there is no GPU; a quantity that fails this once is left out."""
        reading = {}
        for name, reader in self._readers.items():
            try:
                reading[name] = reader()
            except pynvml.NVMLError:
                continue
        return reading

    def _describe(self, handle: Any) -> str:
        refused = []
        for name, reader in _readers(handle).items():
            try:
                reader()
            except pynvml.NVMLError:
                refused.append(name)
            else:
                self._readers[name] = reader
        text = f"NVML: {_text(pynvml.nvmlDeviceGetName(handle))}, driver {_text(pynvml.nvmlSystemGetDriverVersion())}"
        return text + (f"; not reported by this device: {', '.join(refused)}" if refused else "")


def _handle(device: int | str | None) -> Any:
    wanted = device if device is not None else os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if wanted in ("", "-1", -1):
        raise ValueError("CUDA_VISIBLE_DEVICES hides every GPU")
    if isinstance(wanted, int) or wanted.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(wanted))
    return pynvml.nvmlDeviceGetHandleByUUID(wanted)


def _readers(handle: Any) -> dict[str, Callable[[], float]]:
    return {
        "utilisation": lambda: float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        "memory_used_bytes": lambda: float(pynvml.nvmlDeviceGetMemoryInfo(handle).used),
        "memory_total_bytes": lambda: float(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "sm_mhz": lambda: float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        "memory_mhz": lambda: float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
        "temperature_c": lambda: float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
    }


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
