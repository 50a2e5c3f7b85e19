"""Energy counters: RAPL of the processor, NVML of the graphics card. Where there is none, None."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules that the device has used, as far as it counts them."""

    def __init__(self, provider: str) -> None:
        self._packages = [folder for folder in sorted(_POWERCAP.glob("intel-rapl:*")) if folder.name.count(":") == 1]
        self._packages = [folder for folder in self._packages if _number(folder / "energy_uj") is not None]
        self._gpu = _nvml() if provider in ("cuda", "tensorrt") else None
        self.source = " + ".join(filter(None, ["RAPL" if self._packages else "", "NVML" if self._gpu else ""])) or None
        """Which counters are read, None: this device exposes none."""

    def read(self) -> list[float]:
        """Counters in joules, to be handed to `since`."""
        values = [(_number(folder / "energy_uj") or 0) / 1e6 for folder in self._packages]
        if self._gpu is not None:
            nvml, handle = self._gpu
            values.append(nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)
        return values

    def since(self, before: list[float]) -> float | None:
        """Joules used since `before`; None without a counter."""
        if self.source is None:
            return None
        total = 0.0
        for index, (old, new) in enumerate(zip(before, self.read(), strict=True)):
            used = new - old
            if used < 0 and index < len(self._packages):  # RAPL counters wrap around
                used += (_number(self._packages[index] / "max_energy_range_uj") or 0) / 1e6
            total += used
        return total


def _nvml() -> tuple[Any, Any] | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # not installed, no driver, or a card without the counter: pynvml raises its own kinds
        return None
    return pynvml, handle


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
