"""The model families that can be exported: one small file each, one line here."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from edgeprompt.errors import SourceError

_MODULES = {
    "bart": "bart",
    "albert": "bert",
    "bert": "bert",
    "bloom": "bloom",
    "camembert": "bert",
    "codegen": "codegen",
    "deberta-v2": "deberta",
    "distilbert": "bert",
    "electra": "bert",
    "gemma3_text": "rotary",
    "gpt2": "learned",
    "gpt_neox": "rotary",
    "gptj": "gptj",
    "llama": "rotary",
    "marian": "bart",
    "mbart": "bart",
    "mistral": "rotary",
    "mt5": "t5",
    "modernbert": "bert",
    "mpnet": "mpnet",
    "mpt": "mpt",
    "opt": "learned",
    "pegasus": "bart",
    "phi3": "rotary",
    "qwen2": "rotary",
    "qwen3": "rotary",
    "roberta": "bert",
    "smollm3": "rotary",
    "xlm-roberta": "bert",
    "t5": "t5",
}
"""model_type -> module in this folder, whose `FAMILIES` holds the entry."""


@dataclass(frozen=True)
class Family:
    """What an exporter must know about a family; architectures derive their own kinds from it."""

    model_type: str
    architecture: str
    """One of `edgeprompt.names.ARCHITECTURES`; it chooses the exporter and the transformers Auto class."""


def known_families() -> tuple[str, ...]:
    """The model types that have an entry."""
    return tuple(sorted(_MODULES))


def find_family(model_type: str) -> Any:
    """The entry of a model type.

    Raises:
        SourceError: there is none; the message lists those there are.
    """
    if model_type not in _MODULES:
        raise SourceError(
            f"model type {model_type!r} cannot be exported; known: {', '.join(known_families())}; "
            "a graph that another tool exported goes through --route onnx"
        )
    families = import_module(f"edgeprompt.base.families.{_MODULES[model_type]}").FAMILIES
    return next(family for family in families if family.model_type == model_type)
