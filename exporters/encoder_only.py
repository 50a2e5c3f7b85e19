"""Exports encoder-only models: one graph with virtual tokens, deep prompts, hidden states and pooled vector."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeprompt import names
from edgeprompt.base.geometry import geometry_of
from edgeprompt.base.load import LoadedBase
from edgeprompt.errors import UnsupportedError
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import PromptFile
from exporters.contract import BuiltGraphs, ExportOptions
from exporters.decoder_only import GRAPH, save_graph
from exporters.graft.padding import padding_as_bias
from exporters.graft.virtual_tokens import graft_virtual_tokens
from exporters.pooling import pooling_of
from exporters.quantize.graph import SIGNED_7, quantize_graph
from exporters.routes.encoder_graph import trace_graph
from exporters.validate.encoder import validate_encoder


def build(loaded: LoadedBase, options: ExportOptions, folder: Path, scratch: Path) -> BuiltGraphs:
    """Trace, quantise, graft and write the graph.

    Raises:
        UnsupportedError: a route that has no encoders.
        ExportError: PyTorch's exporter failed.
    """
    if options.route == "genai":
        raise UnsupportedError("the genai route builds decoders only; give --route torch, or leave it out")
    geometry = geometry_of(loaded.config)
    model = trace_graph(loaded)
    if options.target == names.WEB:
        padding_as_bias(model)
    weights = quantize_graph(
        model,
        options.precision,
        loaded.model,
        levels=SIGNED_7,
        block_size=options.block_size,
        target=options.target,
    )
    width = geometry.embedding_size or geometry.hidden_size
    graft_virtual_tokens(model, vocab_size=geometry.vocab_size, hidden_size=width, prompt_input=options.prompt_input)
    save_graph(model, folder / GRAPH)
    return BuiltGraphs(
        {"model": GRAPH},
        "torch",
        pooling=pooling_of(loaded),
        kv_in_place=False,
        extra={"weights": weights},
    )


def validate(
    loaded: LoadedBase, folder: Path, manifest: Manifest, prompts: tuple[PromptFile, ...], data: Any = None
) -> Mapping[str, Any]:
    """Compare the package with the base.

    Raises:
        ValidationError: it does not compute what the base computes.
    """
    return validate_encoder(loaded, folder, manifest, prompts, data)
