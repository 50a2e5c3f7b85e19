"""What a conversion must know of a base: from a package (no torch needed) or from the model itself."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from edgeprompt import names
from edgeprompt.package.folder import open_package
from exporters.importers.foreign import Array, BaseFacts


def read_base_facts(base: str | os.PathLike[str]) -> BaseFacts:
    """Facts of BASE: an exported package, or whatever `edgeprompt.base.load.load_base` takes.

    A package is read without torch and at once, whatever the size of its base.

    Raises:
        PackageError: a broken package.
        SourceError: no model there, or of an unknown architecture.
    """
    if (Path(base) / names.MANIFEST).is_file():
        package = open_package(base)
        manifest = package.manifest
        tokenizer = package.tokenizer if manifest.tokenizer_fingerprint else None
        return BaseFacts(
            manifest.base,
            manifest.architecture,
            manifest.model_type,
            manifest.geometry,
            manifest.tokenizer_fingerprint,
            tokenizer,
        )
    from edgeprompt.base.geometry import geometry_of
    from edgeprompt.base.load import load_base
    from exporters.package import write_tokenizer

    loaded = load_base(base)
    with tempfile.TemporaryDirectory() as scratch:
        fingerprint = write_tokenizer(loaded.tokenizer, Path(scratch), Path(scratch))
    return BaseFacts(
        loaded.base,
        loaded.family.architecture,
        loaded.config.model_type,
        geometry_of(loaded.config),
        fingerprint,
        loaded.tokenizer,
        loaded.config,
        lambda: _embeddings(loaded.model),
        loaded.model.state_dict,
        loaded.model.base_model_prefix,
    )


def _embeddings(model: Any) -> tuple[Array, Array | None]:
    output = model.get_output_embeddings()
    weights = [layer.weight.detach().float().numpy() for layer in (model.get_input_embeddings(), output) if layer]
    return weights[0], weights[1] if output is not None else None
