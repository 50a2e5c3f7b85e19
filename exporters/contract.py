"""What the parts of an export hand to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from edgeprompt import names
from edgeprompt.base.load import LoadedBase
from edgeprompt.errors import InputError
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import PromptFile

ROUTES = ("auto", *names.ROUTES)
PROVIDERS = ("cpu", "cuda")
PROMPT_INPUTS = ("required", "optional")
HUB_LAYOUT = "hub"
LAYOUTS = ("edgeprompt", HUB_LAYOUT)
CALIBRATED = ("int8", "int4")
"""Precisions of decoders that look at calibration texts."""
WEB_PRECISIONS = ("int8", "fp32", "fp16")

Progress = Callable[[str, float], None]
"""Called with a stage's name and the fraction of the whole export done so far."""


@dataclass(frozen=True)
class ExportOptions:
    """What to make of a base model."""

    precision: str = "fp32"
    route: str = "auto"
    provider: str = "cpu"
    prompt_input: str = "required"
    block_size: int = 32
    """Of int4 weights."""
    data: Any = None
    """Texts that the package is judged by; None: those shipped with edgeprompt."""
    allow_quality_loss: bool = False
    """Whether a package is written that is further from its base than the limits allow."""
    target: str = names.NATIVE
    """"web": operators that are fast in browsers, and weights in files of at most `WEB_FILE` bytes."""
    layout: str = "edgeprompt"
    """"hub": beside our graph one under transformers.js' name, on the same weights, and the base's config.json."""
    calibration: Any = None
    """Texts that show which activations matter; None: those shipped with edgeprompt."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("precision", names.PRECISIONS),
            ("route", ROUTES),
            ("provider", PROVIDERS),
            ("prompt_input", PROMPT_INPUTS),
            ("block_size", names.BLOCK_SIZES),
            ("target", names.TARGETS),
            ("layout", LAYOUTS),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} {getattr(self, name)!r} is not one of {', '.join(map(str, allowed))}")
        if self.calibration is not None and self.route == "onnx":
            raise InputError("graphs that others exported are quantised already; leave calibration out")
        if self.calibration is not None and self.precision not in CALIBRATED:
            raise InputError(
                f"precision {self.precision!r} uses no calibration texts; leave them out, or take one of "
                f"{', '.join(CALIBRATED)}"
            )
        if self.calibration is not None and self.block_size != 32:
            raise InputError(f"blocks of {self.block_size} are made without calibration texts; leave them out")
        if self.block_size != 32 and self.precision != "int4":
            raise InputError(f"block_size {self.block_size} is for int4 weights, and precision is {self.precision!r}")
        if self.precision == "gguf" and self.route == "onnx":
            raise InputError("precision 'gguf' is for .gguf files; graphs that others exported have theirs already")
        if self.block_size != 32 and self.route == "onnx":
            raise InputError("graphs that others exported have their blocks already; leave block_size out")
        if self.target == names.WEB and self.precision not in WEB_PRECISIONS:
            raise InputError(
                f"target 'web' has no precision {self.precision!r}: browsers run 4-bit weights (MatMulNBits) many "
                f"times slower than int8; use one of {', '.join(WEB_PRECISIONS)}"
            )
        if self.route == "onnx" and (self.target == names.WEB or self.layout == HUB_LAYOUT):
            raise InputError(
                "target 'web' and layout 'hub' are for bases in PyTorch or GGUF; graphs that others exported keep "
                "their operators and names"
            )


@dataclass(frozen=True)
class BuiltGraphs:
    """What an architecture's exporter wrote into the package folder.

    `graphs` maps the manifest's key ("model", or "encoder" and "decoder") to the graph's file name; external data
    lies beside it as `<file name>.data`.
    """

    graphs: Mapping[str, str]
    route: str
    kv_dtype: str = "float32"
    pooling: str = "mean"
    kv_in_place: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)


class Exporter(Protocol):
    """An architecture's exporter: a module with these two functions (see `exporters.export.EXPORTERS`)."""

    def build(self, loaded: LoadedBase, options: ExportOptions, folder: Path, scratch: Path) -> BuiltGraphs:
        """Write the graphs into `folder`; whatever lies in `scratch` is removed afterwards."""
        ...

    def validate(
        self, loaded: LoadedBase, folder: Path, manifest: Manifest, prompts: tuple[PromptFile, ...], data: Any = None
    ) -> Mapping[str, Any]:
        """Compare the package with the base; return what was measured, over `data`'s texts where some are given.

        Raises:
            ValidationError: the package does not compute what its base computes.
        """
        ...
