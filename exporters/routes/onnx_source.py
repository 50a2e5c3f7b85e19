"""Finds what somebody else's export holds: graphs, precision, config."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgeprompt.errors import SourceError

VARIANTS = {
    "fp32": ("",),
    "fp16": ("_fp16",),
    "int8": ("_quantized", "_int8", "_uint8"),
    "int4": ("_q4", "_q4f16", "_bnb4"),
}
"""Precision -> endings of file names, as Optimum and onnx-community write them."""
_DECODERS = ("model", "decoder_model_merged", "decoder_with_past_model")
_ENCODER, _FIRST, _NEXT, _MERGED = (
    "encoder_model",
    "decoder_model",
    "decoder_with_past_model",
    "decoder_model_merged",
)
GENAI_CONFIG = "genai_config.json"


@dataclass(frozen=True)
class OnnxSource:
    """A folder of graphs. `graphs` is keyed "model", or "encoder" with "first" and "next", or with "merged"."""

    folder: Path
    graphs: Mapping[str, Path]
    config: Any
    """A transformers config, or what genai_config.json says in its names."""

    def unquantised(self) -> Path | None:
        """The float variant of the graph that embeds the text, where it lies in the same folder."""
        file = self.graphs.get("model") or self.graphs["encoder"]
        stem = _stem(file.stem, _ending(file.stem))
        beside = (file.with_name(f"{stem}{ending}.onnx") for kind in ("fp32", "fp16") for ending in VARIANTS[kind])
        return next((path for path in beside if path != file and path.is_file()), None)


def find_source(base: Path, precision: str) -> OnnxSource:
    """Find the graphs of BASE in the precision asked for.

    Args:
        base: A folder (graphs in it or in its `onnx/`), or one `.onnx` file of it.
        precision: Taken where the folder has several; a folder with one takes that.

    Raises:
        SourceError: no graph, none of that precision, or no config; says what was looked for and what is there.
    """
    if not base.exists():
        raise SourceError(f"nothing is at {str(base)!r}; give a folder with .onnx files, or one of them")
    folder = base if base.is_dir() else base.parent
    home = next((place for place in (folder, folder.parent) if _has_config(place)), None)
    if home is None:
        raise SourceError(f"no config.json and no {GENAI_CONFIG} beside {str(base)!r}; they say what the graph is")
    places = [folder] if base.is_file() else [folder, folder / "onnx"]
    files = {file.stem: file for place in reversed(places) for file in sorted(place.glob("*.onnx"))}
    if base.is_file():
        ending = _ending(base.stem)
        graphs = _graphs(files, ending) if _stem(base.stem, ending) not in _DECODERS[:1] else {"model": base}
    else:
        ending = _choose(files, precision, home)
        graphs = _graphs(files, ending)
    if not graphs:
        raise SourceError(_not_found(files, home, f"variant {ending or 'without ending'}"))
    return OnnxSource(home, graphs, _config(home))


def graph_precision(models: Iterable[ir.Model]) -> str:
    """The weights' precision, read off the operators and initializers."""
    kinds: set[str] = set()
    for model in models:
        for node in model.graph.all_nodes():
            if node.op_type == "MatMulNBits":
                kinds.add(f"int{node.attributes['bits'].as_int() if 'bits' in node.attributes else 4}")
            elif node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul", "QLinearMatMul", "DynamicQuantizeLSTM"):
                kinds.add("int8")
            elif node.op_type == "MatMulBnb4":
                kinds.add("int4")
        if has_half(model):
            kinds.add("fp16")
    return next((kind for kind in ("int4", "int8", "fp16") if kind in kinds), "fp32")


def has_half(model: ir.Model) -> bool:
    """Whether matrices are stored in half precision."""
    values = model.graph.initializers.values()
    return any(value.dtype == ir.DataType.FLOAT16 and len(value.shape or ()) == 2 for value in values)


def _has_config(place: Path) -> bool:
    return (place / "config.json").is_file() or (place / GENAI_CONFIG).is_file()


def _ending(stem: str) -> str:
    endings = [ending for group in VARIANTS.values() for ending in group if ending and stem.endswith(ending)]
    return max(endings, key=len, default="")


def _stem(stem: str, ending: str) -> str:
    return stem.removesuffix(ending) if ending else stem


def _choose(files: Mapping[str, Path], precision: str, home: Path) -> str:
    known = (*_DECODERS, _ENCODER)
    there = {ending for stem in files if _stem(stem, ending := _ending(stem)) in known}
    wanted = [ending for ending in VARIANTS[precision] if ending in there]
    if wanted:
        return wanted[0]
    if len(there) == 1:
        return there.pop()
    raise SourceError(_not_found(files, home, f"precision {precision}"))


def _graphs(files: Mapping[str, Path], ending: str) -> dict[str, Path]:
    def find(stem: str) -> Path | None:
        return files.get(stem + ending)

    if encoder := find(_ENCODER):
        first, later, merged = find(_FIRST), find(_NEXT), find(_MERGED)
        if first and later:
            return {"encoder": encoder, "first": first, "next": later}
        return {"encoder": encoder, "merged": merged} if merged else {}
    return next(({"model": file} for stem in _DECODERS if (file := find(stem))), {})


def _not_found(files: Mapping[str, Path], home: Path, what: str) -> str:
    there = ", ".join(sorted(file.name for file in files.values())) or "no .onnx file"
    return (
        f"{str(home)!r} has no graphs for {what}: looked for model, decoder_model_merged or encoder_model with "
        f"decoder_model and decoder_with_past_model; found {there}; choose a --precision that is there"
    )


def _config(home: Path) -> Any:
    from transformers import AutoConfig, PretrainedConfig

    try:
        if (home / "config.json").is_file():
            return AutoConfig.from_pretrained(home)
        written = json.loads((home / GENAI_CONFIG).read_text("utf-8"))["model"]
        decoder = written["decoder"]
        config = PretrainedConfig(
            vocab_size=written["vocab_size"],
            hidden_size=decoder["hidden_size"],
            num_hidden_layers=decoder["num_hidden_layers"],
            num_attention_heads=decoder["num_attention_heads"],
            num_key_value_heads=decoder["num_key_value_heads"],
            head_dim=decoder["head_size"],
            max_position_embeddings=written["context_length"],
            **{key: written.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        )
        config.model_type = written["type"]
        return config
    except Exception as error:  # transformers checks values with exceptions of many kinds
        raise SourceError(f"cannot read the config in {str(home)!r}: {' '.join(str(error).split())[:200]}") from error
