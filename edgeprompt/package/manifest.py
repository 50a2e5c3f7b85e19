"""The manifest of a package, `edgeprompt.json`: strict, versioned, and all that the runtime needs to know."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeprompt import names
from edgeprompt.errors import PackageError
from edgeprompt.package import fingerprint, strict_json
from edgeprompt.package.generation import check_generation
from edgeprompt.package.strict_json import check_keys, check_type

FORMAT = "edgeprompt-package"
VERSION = 1
MAX_BYTES = 4 << 20


@dataclass(frozen=True)
class Geometry:
    """Sizes that a prompt must fit. All are counts; `max_positions` 0 means no limit is known."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_size: int
    max_positions: int = 0
    num_encoder_layers: int = 0
    """Layers of the encoder (encoder-decoder only; `num_layers` then counts the decoder's)."""
    position_offset: int = 0
    """What absolute positions start at (RoBERTa: 2)."""
    embedding_size: int = 0
    """Width of token and prompt embeddings where it is not `hidden_size` (ALBERT, small ELECTRA); 0: it is."""


@dataclass(frozen=True)
class Tokens:
    """Special token ids; None where the base has none."""

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    mask: int | None = None
    decoder_start: int | None = None
    forced_bos: int | None = None
    """What a decoder says first, whatever its logits (mBART: the target language)."""
    forced_eos: int | None = None
    """What a decoder says last where the length limit cuts it (BART)."""


@dataclass(frozen=True)
class GraphFile:
    """One ONNX graph and its external data: file name -> SHA-256."""

    file: str
    sha256: str
    data: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Base:
    """The frozen model that was exported, or that a prompt was made for."""

    name: str
    fingerprint: str

    def matches(self, other: Base) -> bool:
        """Whether both are one base, as far as the older of both fingerprints says."""
        return not fingerprint.differences(self.fingerprint, other.fingerprint)

    def apart(self, other: Base) -> str:
        """What an error adds where bases do not match and more is known than that."""
        found = fingerprint.differences(self.fingerprint, other.fingerprint)
        return "".join(f"; {one}" for one in found if one != fingerprint.OTHER)

    def weaker(self, other: Base) -> str | None:
        """What to say where `matches` does not cover all of a base."""
        reason = fingerprint.weaker(self.fingerprint, other.fingerprint)
        if not reason:
            return None
        old = (
            self
            if self is other or fingerprint.rank(self.fingerprint) <= fingerprint.rank(other.fingerprint)
            else other
        )
        return f"the fingerprint of base {old.name!r} {reason}"

    @property
    def brief(self) -> str:
        """The fingerprint as messages show it."""
        return fingerprint.brief(self.fingerprint)


@dataclass(frozen=True)
class Manifest:
    """Description of a package. `graphs` has the key "model", or the keys "encoder" and "decoder"."""

    architecture: str
    model_type: str
    base: Base
    geometry: Geometry
    tokens: Tokens
    precision: str
    route: str
    graphs: Mapping[str, GraphFile]
    tokenizer_fingerprint: str | None = None
    tokenizer_sha256: str | None = None
    """Hash of `tokenizer.json`. If it is unchanged, the slow `tokenizer_fingerprint` need not be computed."""
    prompt_input: str = "required"
    """"required": `prompt_embeddings` must be fed; "optional": it has a default, and stock ORT adapters can fill it.
    Older packages say "door": "input" or "adapter"."""
    target: str = names.NATIVE
    """"web": the graphs' operators are fast in ONNX Runtime's WebAssembly build too. Left out of the file where it is
    "native"."""
    kv_dtype: str = "float32"
    """Type of past_key_values: "float32" or "float16"."""
    pooling: str = "mean"
    """Default of `embed` (encoders): "mean", "cls" or "last"."""
    kv_in_place: bool = True
    """Decoders: whether attention (GroupQueryAttention) appends to the KV cache in place. If False, the graph returns
    past and new keys concatenated. Older packages have the negation as "batched_prefill"."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the base's generation_config, under transformers' names (`package.generation`)."""
    prompts: tuple[str, ...] = ()
    """Prompt files inside the package, relative paths."""
    validation: Mapping[str, Any] = field(default_factory=dict)
    """Measurements of the export's validation."""
    quality: Mapping[str, Any] = field(default_factory=dict)
    """How near the package is to its base on real text: "texts", "kl_mean", "kl_p90", "top1", "perplexity",
    "perplexity_base"; for encoders the distance of embeddings. Empty if there was no base to compare with."""
    quality_gate: str | None = None
    """"passed"; "allowed": beyond the limits, and written because the user allowed it; None: not compared."""
    versions: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Facts for tools other than the runtime (for example where each weight went)."""

    @property
    def weights_hash(self) -> str:
        """One hash over all files with weights. A prompt that was tuned for a package names it."""
        import hashlib

        text = strict_json.dumps({key: dict(graph.data) or graph.sha256 for key, graph in self.graphs.items()})
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        """The file's text."""
        data = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        if self.target == names.NATIVE:
            del data["target"]
        return strict_json.dumps(data, indent=1) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> Manifest:
        """Read and check the file's text.

        Raises:
            PackageError: not a manifest, another version, unknown or missing keys, or bad values.
        """
        try:
            data = check_type(strict_json.loads(text), dict, "the manifest")
            if data.pop("format", None) != FORMAT:
                raise ValueError(f'"format" is not {FORMAT!r}')
            version = data.pop("version", None)
            if type(version) is not int or version != VERSION:
                raise ValueError(
                    f"contract version {version!r}, this edgeprompt reads {VERSION}; export the base again"
                )
            if "door" in data:
                old = data.pop("door")
                data["prompt_input"] = {"input": "required", "adapter": "optional"}.get(str(old), old)
            data.pop("pads_right", None)  # of older packages; nothing reads it
            if "batched_prefill" in data:
                data["kv_in_place"] = not check_type(data.pop("batched_prefill"), bool, "batched_prefill")
            check_keys(Manifest, data, "the manifest")
            return _checked(Manifest(**{**data, **_parts(data)}))
        except (ValueError, TypeError, UnicodeDecodeError) as error:
            raise PackageError(f"bad {names.MANIFEST}: {error}") from error

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write `edgeprompt.json` into `folder`."""
        (Path(folder) / names.MANIFEST).write_text(self.to_json(), encoding="utf-8")


def _parts(data: Mapping[str, Any]) -> dict[str, Any]:
    tokens = dict(check_keys(Tokens, data["tokens"], "tokens"))
    tokens["eos"] = tuple(check_type(tokens.get("eos", []), list, "tokens.eos"))
    graphs = {
        key: GraphFile(**check_keys(GraphFile, value, f"graphs.{key}"))
        for key, value in check_type(data["graphs"], dict, "graphs").items()
    }
    return {
        "base": Base(**check_keys(Base, data["base"], "base")),
        "geometry": Geometry(**check_keys(Geometry, data["geometry"], "geometry")),
        "tokens": Tokens(**tokens),
        "graphs": graphs,
        "generation": check_generation(data.get("generation", {})),
        "prompts": tuple(check_type(data.get("prompts", []), list, "prompts")),
    }


def _checked(manifest: Manifest) -> Manifest:
    for spec in dataclasses.fields(Geometry):
        value = getattr(manifest.geometry, spec.name)
        check_type(value, int, f"geometry.{spec.name}")
        if not 0 <= value < 1 << 31:
            raise ValueError(f"geometry.{spec.name} is {value}")
    for name, allowed in (
        ("architecture", names.ARCHITECTURES),
        ("precision", names.PRECISIONS),
        ("route", names.ROUTES),
        ("prompt_input", ("required", "optional")),
        ("target", names.TARGETS),
        ("kv_dtype", ("float32", "float16")),
        ("pooling", ("mean", "cls", "last")),
    ):
        if getattr(manifest, name) not in allowed:
            raise ValueError(f"{name} is {getattr(manifest, name)!r}, allowed: {', '.join(allowed)}")
    needed = {"encoder", "decoder"} if manifest.architecture == names.ENCODER_DECODER else {"model"}
    if set(manifest.graphs) != needed:
        raise ValueError(f"graphs are {sorted(manifest.graphs)}, needed: {sorted(needed)}")
    size = manifest.geometry.vocab_size
    # A graph is fed them, and one beyond the vocabulary would be a row of a prompt; decoders are fed none.
    limit = None if manifest.architecture == names.DECODER_ONLY else size
    for spec in dataclasses.fields(Tokens):
        value = getattr(manifest.tokens, spec.name)
        for token in value if spec.name == "eos" else (value,) if value is not None else ():
            if check_type(token, int, f"tokens.{spec.name}") < 0:
                raise ValueError(f"tokens.{spec.name} is {token}")
            if limit is not None and token >= limit and spec.name != "eos":
                raise ValueError(f"tokens.{spec.name} is {token}, and the base has {size} tokens")
    check_type(manifest.kv_in_place, bool, "kv_in_place")
    check_type(manifest.tokenizer_fingerprint, (str, type(None)), "tokenizer_fingerprint")
    for graph in manifest.graphs.values():
        for text in (graph.sha256, *check_type(graph.data, dict, "a graph's data").values()):
            check_type(text, str, "a graph's hash")
    files = [file for graph in manifest.graphs.values() for file in (graph.file, *graph.data)]
    for file in (*files, *manifest.prompts):
        check_type(file, str, "a file name")
        if Path(file).is_absolute() or ".." in Path(file).parts or "\\" in file or not file:
            raise ValueError(f"file {file!r} points out of the package")
    for value in (manifest.base.name, manifest.base.fingerprint, manifest.model_type):
        check_type(value, str, "base and model_type")
    if manifest.quality_gate not in (None, "passed", "allowed"):
        raise ValueError(f"quality_gate is {manifest.quality_gate!r}, allowed: passed, allowed, null")
    for name in ("validation", "quality", "versions", "extra"):
        check_type(getattr(manifest, name), dict, name)
    return manifest
