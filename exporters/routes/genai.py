"""The genai route: onnxruntime-genai's model builder writes the graph, in float; the rest of the export is ours."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeprompt.base.geometry import geometry_of
from edgeprompt.base.load import LoadedBase
from edgeprompt.base.rope import rotary_size
from edgeprompt.errors import ExportError, MissingDependencyError
from exporters.contract import ExportOptions

GENAI_CONFIG = "genai_config.json"
_ROPE = ("default", "llama3", "dynamic")
"""Types of rotary scaling that the builder writes as transformers has them (dynamic: within the base's positions)."""


def build_graph(loaded: LoadedBase, options: ExportOptions, folder: Path, scratch: Path) -> Any:
    """Let the builder describe the model, and take the graph before it is quantised or written.

    The weights stay the PyTorch model's own tensors: nothing is copied until the graph is saved. Also writes
    `genai_config.json` into `folder`, which makes the package a model folder of ORT GenAI.

    Returns:
        An onnx_ir model in float32 with logits of the last position only.
    """
    if (reason := obstacle(loaded)) is not None:
        raise ExportError(f"the genai route cannot export {loaded.name!r}: {reason}; use --route torch")
    home = scratch / "genai"
    home.mkdir()
    loaded.config.save_pretrained(home)
    if getattr(loaded.model, "generation_config", None) is not None:
        loaded.model.generation_config.save_pretrained(home)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(home)
    builder = _import_builder()
    with _handed_over(builder, loaded.model, keep_tokenizer=loaded.tokenizer is not None) as taken, _quiet():
        details = {"extra_kwargs": {}, "hf_name": str(home), "hf_config": _builder_config(loaded)}
        try:
            builder.create_model(
                "",
                str(home),
                str(home),
                "fp32",
                options.provider,
                str(scratch / "cache"),
                prune_lm_head=True,
                shared_embeddings=False,
                hf_token=False,
                op_types_to_quantize=("MatMul",),
                hf_details=details,
            )
        except (NotImplementedError, KeyError, AttributeError, TypeError, ValueError) as error:
            raise ExportError(
                f"the genai builder cannot write {loaded.name!r} ({type(error).__name__}: {error}); use --route torch"
            ) from error
    if (home / GENAI_CONFIG).exists():
        _write_config(home / GENAI_CONFIG, folder / GENAI_CONFIG, options.precision)
    return taken[0]


def _write_config(source: Path, target: Path, precision: str) -> None:
    """The builder's config; at int8 with the option that keeps 8-bit products from saturating on x86 without VNNI.

    The runtime sets it itself. GenAI takes it from here.
    """
    config = json.loads(source.read_text("utf-8"))
    if precision == "int8":
        config["model"]["decoder"].setdefault("session_options", {})["session.x64quantprecision"] = "1"
    target.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")


def suits(loaded: LoadedBase) -> bool:
    """Whether the builder is here and writes this model as it is."""
    return is_built(loaded) and obstacle(loaded) is None


def is_built(loaded: LoadedBase) -> bool:
    """Whether the builder is installed and knows the family."""
    return importlib.util.find_spec("onnxruntime_genai") is not None and bool(loaded.family.genai)


def obstacle(loaded: LoadedBase) -> str | None:
    """Why the builder would write another model than this one, None where it writes this one."""
    if has_window(loaded.config):
        return f"its builder writes full attention, and the base has a sliding window of {loaded.config.sliding_window}"
    if scaling := rope_scaling(loaded.config):
        return f"its builder scales rotary positions by {scaling} otherwise than transformers"
    head_size = geometry_of(loaded.config).head_size
    if head_size % 16:
        return f"its builder rotates heads of multiples of 16 values, and the base has {head_size}"
    if (rotated := rotary_size(loaded.config, head_size)) % 16:
        return f"its builder rotates multiples of 16 values of a head, and the base {rotated}"
    return None


def rope_scaling(config: Any) -> str | None:
    """The type of scaling that the torch route writes exactly and the builder does not."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    types = (part.get("rope_type", "default") for part in (rope, *nested))
    return next((kind for kind in types if kind not in _ROPE), None)


def has_window(config: Any) -> bool:
    """Whether attention looks back over fewer positions than the context has."""
    window = getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True):
        return False
    return bool(window < config.max_position_embeddings)


def _builder_config(loaded: LoadedBase) -> Any:
    from copy import deepcopy

    config = deepcopy(loaded.config)
    config.architectures = [type(loaded.model).__name__]
    return config


def _import_builder() -> Any:
    root = logging.getLogger()
    before = [*root.handlers], root.level
    try:
        from onnxruntime_genai.models import builder
    except ImportError as error:
        raise MissingDependencyError(
            "the genai route needs onnxruntime-genai: pip install 'edgeprompt[export]', or use --route torch"
        ) from error
    finally:
        # One of its modules configures logging for the whole process, and every library's notes would be on stderr.
        root.handlers[:], root.level = before
    return builder


@contextlib.contextmanager
def _handed_over(builder: Any, model: Any, *, keep_tokenizer: bool) -> Iterator[list[Any]]:
    """Make the builder use the model in memory, and hand its graph over instead of writing it.

    The builder picks a class by the model's architecture. For as long as this lasts it finds subclasses of them in its
    module; its own classes stay as they are.
    """
    # The builder's own modules are top-level names: its package puts its folder on sys.path.
    base = sys.modules["builders.base"].Model
    taken: list[Any] = []

    def load_weights(self: Any, input_path: str) -> Any:
        return model

    def save_model(self: Any, out_dir: str) -> None:
        self.model.graph.sort()
        taken.append(self.model)

    def save_nothing(self: Any, *args: Any) -> None:
        """This base has no tokenizer."""

    methods = {"load_weights": load_weights, "save_model": save_model}
    if not keep_tokenizer:
        methods["save_processing"] = save_nothing
    before = {name: kind for name, kind in vars(builder).items() if isinstance(kind, type) and issubclass(kind, base)}
    try:
        for name, kind in before.items():
            setattr(builder, name, type(kind.__name__, (kind,), methods))
        yield taken
    finally:
        for name, kind in before.items():
            setattr(builder, name, kind)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # The builder narrates every layer on stdout, which is the command's result channel.
    with contextlib.redirect_stdout(io.StringIO()), open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink):
        yield
