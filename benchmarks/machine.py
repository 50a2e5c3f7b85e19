"""Where a figure was measured, for result files and for the line below a table."""

from __future__ import annotations

import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from edgeprompt.bench.device import describe_device

_LIBRARIES = ("onnxruntime", "onnxruntime-genai", "torch", "transformers", "peft")


def describe() -> dict[str, Any]:
    """Processor, cores, versions and day."""
    device = describe_device()
    return {
        "day": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **{key: device[key] for key in ("cpu", "isa", "cores", "os", "python", "edgeprompt")},
        "versions": {name: found for name in _LIBRARIES if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def line(machine: dict[str, Any]) -> str:
    """The same in one sentence."""
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    cpu = f"{machine['cpu']} ({', '.join(machine['isa'])}; {machine['cores']} cores)"
    return f"Measured on {machine['day']} on {cpu}, with {versions}."
