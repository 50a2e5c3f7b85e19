"""Task heads as foreign checkpoints name them, described for the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from edgeprompt import names
from edgeprompt.errors import SourceError, UnsupportedError
from edgeprompt.prompt_file import Head, HeadStep
from exporters.importers.foreign import BaseFacts

Array = npt.NDArray[Any]

_CLASSIFY: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "bert": ("pooler", (("linear", "classifier"),)),
    "albert": ("pooler", (("linear", "classifier"),)),
    "distilbert": ("first", (("linear", "pre_classifier"), ("relu", ""), ("linear", "classifier"))),
    "roberta": ("first", (("linear", "classifier.dense"), ("tanh", ""), ("linear", "classifier.out_proj"))),
    "electra": ("first", (("linear", "classifier.dense"), ("gelu", ""), ("linear", "classifier.out_proj"))),
    "deberta-v2": ("first", (("linear", "pooler.dense"), ("gelu", ""), ("linear", "classifier"))),
}
"""model_type -> input and steps of its `...ForSequenceClassification` (transformers 5)."""
_SAME = {"xlm-roberta": "roberta", "camembert": "roberta"}


def describe_head(tensors: Mapping[str, Array], task_type: str, base: BaseFacts) -> tuple[Head, tuple[str, ...]]:
    """The head of a transformers model for PEFT's task types SEQ_CLS, TOKEN_CLS and QUESTION_ANS.

    Args:
        tensors: Head tensors as the base names them (`classifier.weight`, `score.weight`, `qa_outputs.bias`).
        task_type: PEFT's name.
        base: For the architecture and model type.

    Returns:
        The head, and the prefixes of the tensors it uses.

    Raises:
        SourceError: a tensor that the head needs is not there.
        UnsupportedError: a model type whose head is not known.
    """
    kind = _SAME.get(base.model_type, base.model_type)
    spec: tuple[str, tuple[tuple[str, str], ...]]
    if task_type == "QUESTION_ANS":
        spec = ("tokens", (("linear", "qa_outputs"),))
    elif task_type == "TOKEN_CLS":
        spec = ("tokens", (("linear", "score" if "score.weight" in tensors else "classifier"),))
    elif base.architecture == names.DECODER_ONLY:
        spec = ("last", (("linear", "score"),))
    elif kind in _CLASSIFY:
        spec = _CLASSIFY[kind]
    else:
        raise UnsupportedError(
            f"the classification head of {base.model_type!r} is not known; known: {', '.join([*_CLASSIFY, *_SAME])}"
        )
    steps = tuple(HeadStep(operation, name) for operation, name in spec[1])
    for step in steps:
        if step.name and f"{step.name}.weight" not in tensors:
            raise SourceError(
                f"the {task_type} head of {base.model_type} needs {step.name}.weight, and the file has "
                f"{', '.join(sorted(tensors)) or 'no head'}; save it with the adapter (modules_to_save)"
            )
    classes = tensors[f"{steps[-1].name}.weight"].shape[0]
    problem = "regression" if task_type == "SEQ_CLS" and classes == 1 else "single_label"
    return Head(spec[0], steps, problem), tuple(step.name for step in steps if step.name)
