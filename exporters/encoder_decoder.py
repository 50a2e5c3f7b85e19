"""Exports encoder-decoder models: an encoder graph and a decoder graph, no merged one."""

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
from exporters.decoder_only import save_graph
from exporters.graft.padding import padding_as_bias
from exporters.graft.virtual_tokens import graft_virtual_tokens
from exporters.quantize.graph import quantize_graph

ENCODER = "encoder.onnx"
DECODER = "decoder.onnx"


def build(loaded: LoadedBase, options: ExportOptions, folder: Path, scratch: Path) -> BuiltGraphs:
    """Trace, quantise, graft and write both graphs.

    Raises:
        UnsupportedError: a route that does not build encoder-decoders.
    """
    from exporters.routes import seq2seq_graph

    if options.route not in ("auto", "torch"):
        raise UnsupportedError(
            f"route {options.route!r} does not build encoder-decoders ({loaded.config.model_type}); "
            "use --route torch, or leave it out"
        )
    loaded.family.prepare(loaded.model)
    geometry = geometry_of(loaded.config)
    quantize: dict[str, Any] = {
        "block_size": options.block_size, "stored": loaded.stored, "target": options.target,
    }  # fmt: skip
    encoder = seq2seq_graph.export_encoder(loaded.model, loaded.family)
    if options.target == names.WEB:
        padding_as_bias(encoder)
    weights = {"encoder": quantize_graph(encoder, options.precision, loaded.model, **quantize)}
    graft_virtual_tokens(
        encoder,
        vocab_size=geometry.vocab_size,
        hidden_size=geometry.hidden_size,
        after_scale=_scales_embeddings(loaded.model),
        prompt_input=options.prompt_input,
    )
    save_graph(encoder, folder / ENCODER)
    decoder = seq2seq_graph.export_decoder(loaded.model, loaded.family)
    if options.target == names.WEB:
        padding_as_bias(decoder)
    weights["decoder"] = quantize_graph(decoder, options.precision, loaded.model, **quantize)
    save_graph(decoder, folder / DECODER)
    return BuiltGraphs(
        {"encoder": ENCODER, "decoder": DECODER},
        "torch",
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
    from exporters.validate.seq2seq import validate_seq2seq

    loaded.family.prepare(loaded.model)
    return validate_seq2seq(loaded, folder, manifest, prompts, data)


def _scales_embeddings(model: Any) -> bool:
    """Whether ids are looked up and then scaled; rows of a prompt join behind that, as `inputs_embeds` do."""
    encoder = model.get_encoder()
    holders = (encoder, encoder.embed_tokens)
    return any(getattr(holder, "embed_scale", 1.0) != 1.0 for holder in holders)
