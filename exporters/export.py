"""From a base model to a validated package: the one way in, for every architecture and route."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from edgeprompt import names
from edgeprompt.base import accounting
from edgeprompt.base.geometry import geometry_of
from edgeprompt.base.load import LoadedBase, load_base
from edgeprompt.base.memory import to_export, to_validate
from edgeprompt.base.source import find_local
from edgeprompt.base.tokenizer_files import check_tokenizer_files
from edgeprompt.errors import BaseMismatchError, ExportError, InputError, OtherWeightsError, ValidationError
from edgeprompt.package.files import atomic_folder
from edgeprompt.package.folder import open_package
from edgeprompt.package.manifest import Base, Manifest
from edgeprompt.package.outputs import PACKAGE
from edgeprompt.prompts.file import PromptFile, load_prompt
from edgeprompt.prompts.weights import ALLOWED, check_weights
from exporters.contract import Exporter, ExportOptions, Progress
from exporters.layout import arrange, check_layout
from exporters.package import make_manifest, said_of, write_prompts, write_tokenizer
from exporters.validate.core import check_positions
from exporters.validate.quality import check_calibrated, check_calibration, with_quality

_LOG = logging.getLogger("edgeprompt")
EXPORTERS = {
    names.DECODER_ONLY: "exporters.decoder_only",
    names.ENCODER_ONLY: "exporters.encoder_only",
    names.ENCODER_DECODER: "exporters.encoder_decoder",
}
"""Architecture -> module with `build` and `validate` (`exporters.contract.Exporter`)."""

_SMALL_MODEL = 500_000_000
"""Parameters up to which one thread exports."""


@dataclass(frozen=True)
class ExportReport:
    """A package that was exported, and its measurements."""

    path: Path
    manifest: Manifest
    size_bytes: int

    @property
    def validation(self) -> Mapping[str, Any]:
        """Measurements of the validation."""
        return self.manifest.validation


def export_model(
    base: str | os.PathLike[str] | LoadedBase,
    out: str | os.PathLike[str],
    *,
    precision: str | None = None,
    route: str = "auto",
    provider: str = "cpu",
    prompts: Sequence[str | os.PathLike[str]] = (),
    force: bool = False,
    prompt_input: str = "required",
    block_size: int = 32,
    target: str = names.NATIVE,
    layout: str = "edgeprompt",
    data: Any = None,
    calibration: Any = None,
    allow_quality_loss: bool = False,
    allow_other_weights: bool = False,
    against: str | os.PathLike[str] | LoadedBase | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Export a base model as a package. It appears at `out` once it is validated against PyTorch.

    Args:
        base: Hugging Face id, local folder, `.gguf` file, or a base that is loaded already.
        out: The package's folder; must not exist unless `force`.
        precision: "fp32", "fp16", "int8" (a scale per column of weights and per token), "int4" (weight-only, in
            blocks), or "gguf" (4 or 8 bits for each matrix, as its `.gguf` file has it). None: "int8" for the web,
            "gguf" for a `.gguf` file, else "fp32".
        route: "genai", "torch", "onnx", or "auto": genai where its builder knows the family, else torch.
        provider: "cpu" or "cuda": what the graph's operators and types are chosen for.
        prompts: Prompt files to validate with and to put into the package.
        force: Replace an older package, or an empty folder, at `out`, once the new package is complete.
        prompt_input: "required": `prompt_embeddings` must be fed, as ORT GenAI needs it; "optional": it has a default,
            as stock ORT's adapters need it.
        block_size: For int4. 32 keeps every block's offset in float. 64 and 128 round it to an integer zero point,
            which is faster and less exact, so tune prompts for that package.
        target: "native", or "web": operators that ONNX Runtime's WebAssembly build is fast at, and weights in files of
            at most 64 MB. Every runtime runs such a package.
        layout: "edgeprompt", or "hub": beside it a graph under transformers.js' name, on the same weights, with the
            base's config.json (decoders).
        data: Texts on which the package is compared with its base: a file or records as `tune` reads them, or lines of
            a `.txt` file. None: the texts shipped with edgeprompt.
        calibration: Texts, as for `data`, that show which activations matter to a decoder's int8 or int4 weights.
            None: the texts shipped with edgeprompt. No text may be in `data` too, which judges.
        allow_quality_loss: Write the package even if it is further from its base than the limits allow
            (`exporters.validate.quality.LIMITS`); its manifest says "allowed".
        allow_other_weights: Put prompts into the package that were tuned for other weights, though these or its own are
            far from the base (`edgeprompt.prompts.weights`); its manifest names them, and they are served.
        against: For the onnx route, where `base` is a folder of graphs: the base in PyTorch to compare with.
        progress: Called with a stage's name and the fraction done.

    Raises:
        SourceError: the base is missing, unreadable or of an unknown architecture.
        BaseMismatchError: a prompt was made for another base.
        OtherWeightsError: a prompt was tuned for weights too far from the package's.
        InputError: `out` exists and may not be replaced, or an option has an unknown value.
        ValidationError: the graph does not compute what the base computes, or is too far from it.
        ExportError: the export failed; nothing was written.
    """
    options = ExportOptions(
        precision or ("int8" if target == names.WEB else default_precision(base)),
        route,
        provider,
        prompt_input,
        block_size,
        data,
        allow_quality_loss,
        target,
        layout,
        calibration,
    )
    check_calibration(calibration, data)
    tell = progress or _silent
    files = _load_prompts(prompts)
    try:
        sources = (base, against, *prompts)
        with (
            atomic_folder(out, PACKAGE, force=force, sources=sources) as folder,
            tempfile.TemporaryDirectory(dir=folder.parent) as scratch,
        ):
            if route == "onnx" or (route == "auto" and not isinstance(base, LoadedBase) and is_onnx_folder(base)):
                options = dataclasses.replace(options, route="onnx")  # which checks them again
                onnx_route = import_module("exporters.routes.onnx_route")
                manifest = cast(Manifest, onnx_route.build_package(base, folder, options, files, against=against))
            else:
                if against is not None:
                    raise InputError("against is for the onnx route; every other route compares with its own base")
                manifest = _build(base, folder, Path(scratch), options, files, tell)
            if manifest.tokenizer_fingerprint is None:
                accounting.tell(
                    f"{manifest.base.name!r} has no tokenizer, so edgeprompt does not load this package; put the "
                    "base's tokenizer.json beside its weights and export it again"
                )
            manifest = _with_prompts(manifest, files, folder, str(out), allow_other_weights)
            manifest.write(folder)
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    except ValidationError as error:
        raise ValidationError(f"{error}; no package was written") from error
    except OSError as error:
        raise ExportError(f"cannot write {str(out)!r}: {error.strerror or error}; nothing was left behind") from error
    except Exception as error:
        # Libraries written in Rust (tokenizers, safetensors) report a full disk as kinds of their own.
        if "(os error " not in str(error):
            raise
        raise ExportError(f"cannot write {str(out)!r}: {error}; nothing was left behind") from error
    tell("done", 1.0)
    return ExportReport(Path(out), manifest, size)


def validate_package(
    path: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | LoadedBase,
    prompts: Sequence[str | os.PathLike[str]] = (),
    data: Any = None,
    allow_quality_loss: bool = False,
    progress: Progress | None = None,
) -> Mapping[str, Any]:
    """Compare an existing package with a base model in PyTorch, and return the measurements.

    `data`, `allow_quality_loss` and `progress` are as for `export_model`. A package that was exported with
    `allow_quality_loss` keeps it.

    Raises:
        PackageError: the package is broken, or its files are not those of the manifest.
        BaseMismatchError: the package was exported from another base.
        ValidationError: it does not compute what the base computes.
    """
    tell = progress or _silent
    package = open_package(path)
    check_calibration(None, data)
    if not isinstance(against, LoadedBase):
        find_local(against)
    files = _load_prompts(prompts)
    tell("files", 0.0)
    package.verify()
    tell("load", 0.1)
    manifest = package.manifest
    loaded = (
        against
        if isinstance(against, LoadedBase)
        else load_base(against, need=to_validate(manifest.precision), mapped=True)
    )
    base = loaded.base
    if not base.matches(manifest.base):
        raise BaseMismatchError(
            f"package {str(path)!r} was exported from {manifest.base.name!r} ({manifest.base.brief}); "
            f"{base.name!r} has {base.brief}{base.apart(manifest.base)}"
        )
    _tell_weaker(manifest.base, base)
    for prompt in files.values():
        prompt.check_base(manifest)
    tell("compare", 0.3)
    exporter = find_exporter(manifest.architecture)
    measured = exporter.validate(loaded, Path(path), manifest, tuple(files.values()), data)
    allow = allow_quality_loss or manifest.quality_gate == "allowed"
    judged = with_quality(manifest, measured, allow=allow)
    return {**judged.validation, "quality": judged.quality, "quality_gate": judged.quality_gate}


def find_exporter(architecture: str) -> Exporter:
    """The module that builds and validates an architecture."""
    return cast(Exporter, import_module(EXPORTERS[architecture]))


def _build(
    base: str | os.PathLike[str] | LoadedBase,
    folder: Path,
    scratch: Path,
    options: ExportOptions,
    prompts: Mapping[str, PromptFile],
    tell: Progress,
) -> Manifest:
    tell("load", 0.0)
    check_tokenizer_files(base)
    loaded = (
        base
        if isinstance(base, LoadedBase)
        else load_base(base, need=to_export(options.precision), mapped=True, scratch=scratch)
    )
    if options.precision == "gguf" and not loaded.stored:
        raise InputError(f"precision 'gguf' keeps what a .gguf file stores, and {loaded.name!r} is none; give another")
    for prompt in prompts.values():
        _check_fingerprint(prompt, loaded)
    geometry = geometry_of(loaded.config)
    check_positions(geometry, loaded.name)
    check_layout(options, loaded)
    check_calibrated(options.calibration, loaded)
    said = said_of(loaded)
    exporter = find_exporter(loaded.family.architecture)
    with _few_threads(loaded.model):
        tell("build", 0.2)
        fingerprint = write_tokenizer(
            loaded.tokenizer, folder, scratch, vocab_size=geometry.vocab_size, base=loaded.name
        )
        built = arrange(exporter.build(loaded, options, folder, scratch), folder, options, loaded)
        manifest = make_manifest(loaded, built, options, folder, fingerprint, said)
        for prompt in prompts.values():
            prompt.check_base(manifest)
        manifest.write(folder)
        tell("validate", 0.7)
        measured = exporter.validate(loaded, folder, manifest, tuple(prompts.values()), options.data)
    return with_quality(manifest, measured, allow=options.allow_quality_loss)


@contextlib.contextmanager
def _few_threads(model: Any) -> Iterator[None]:
    """One thread for a small model: its many short operations otherwise make threads wait for each other, busily.

    On a machine that does other work too, that waiting was measured at seven times the CPU time of the work.
    """
    import torch

    before = torch.get_num_threads()
    if sum(parameter.numel() for parameter in model.parameters()) < _SMALL_MODEL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_fingerprint(prompt: PromptFile, loaded: LoadedBase) -> None:
    # Before the graph is built: a wrong prompt should cost seconds, not the whole export.
    base = loaded.base
    if not prompt.base.matches(base):
        raise BaseMismatchError(
            f"prompt {prompt.name!r} was made for {prompt.base.name!r} ({prompt.base.brief}), not for "
            f"{base.name!r} ({base.brief}){base.apart(prompt.base)}; export that base, or tune the prompt for "
            "this one"
        )
    _tell_weaker(prompt.base, base)


def _with_prompts(
    manifest: Manifest, files: Mapping[str, PromptFile], folder: Path, out: str, allow_other_weights: bool
) -> Manifest:
    """The manifest with prompts put into the folder; those that were tuned for far weights need to be allowed."""
    allowed = []
    for prompt in files.values():
        try:
            check_weights(prompt, manifest, package=out)
        except OtherWeightsError:
            if not allow_other_weights:
                raise
            allowed.append(prompt.sha256)
    extra = {**manifest.extra, **({ALLOWED: allowed} if allowed else {})}
    return dataclasses.replace(manifest, prompts=write_prompts(files, folder), extra=extra)


def _tell_weaker(one: Base, other: Base) -> None:
    weaker = one.weaker(other)
    if weaker:
        _LOG.warning("note: %s", weaker)


def _load_prompts(paths: Sequence[str | os.PathLike[str]]) -> dict[str, PromptFile]:
    files: dict[str, PromptFile] = {}
    for path in paths:
        name = Path(path).name
        if name in files:
            raise InputError(f"two prompt files are called {name!r}; rename one")
        files[name] = load_prompt(path)
    return files


def default_precision(base: str | os.PathLike[str] | LoadedBase) -> str:
    """ "gguf" for a `.gguf` file, "fp32" for any other base."""
    stored = base.stored if isinstance(base, LoadedBase) else str(base).endswith(".gguf")
    return "gguf" if stored else "fp32"


def is_onnx_folder(base: str | os.PathLike[str]) -> bool:
    """Whether a base is graphs that another tool exported."""
    folder = Path(base).expanduser()
    if folder.suffix == ".onnx":
        return True
    if not folder.is_dir():
        return False
    weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    return not weights and any(folder.rglob("*.onnx"))


def _silent(stage: str, fraction: float) -> None:
    """No progress wanted."""
