"""Task heads as foreign checkpoints name them, described for the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from edgeprompt import names
from edgeprompt.errors import SourceError, UnsupportedError
from edgeprompt.prompts.file import Head, HeadStep
from exporters.heads import sequence_head
from exporters.importers.foreign import BaseFacts

Array = npt.NDArray[Any]


_BIASLESS = {"SEQ_CLS": ("score",)}
"""Linear layers that transformers gives no bias."""


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
        UnsupportedError: an architecture that has no such head, a model type whose head is not known, or one whose
            head goes by a config that is not at hand.
    """
    if base.architecture == names.ENCODER_DECODER and task_type != "TOKEN_CLS":
        raise UnsupportedError(
            f"a {task_type} head on an encoder-decoder reads the decoder, where PEFT runs no virtual tokens and "
            "ignores a prefix: tune the prompt for label words instead (task classify)"
        )
    source, steps = "tokens", [HeadStep("linear", "qa_outputs")]
    if task_type == "TOKEN_CLS":
        steps = [HeadStep("linear", "score" if "score.weight" in tensors else "classifier")]
    elif task_type == "SEQ_CLS" and base.architecture == names.DECODER_ONLY:
        source, steps = "last", [HeadStep("linear", "score")]
    elif task_type == "SEQ_CLS":
        source, steps = sequence_head(base.model_type, base.config)
    for step in steps:
        if step.name and f"{step.name}.weight" not in tensors:
            raise SourceError(
                f"the {task_type} head of {base.model_type} needs {step.name}.weight, and the file has "
                f"{', '.join(sorted(tensors)) or 'no head'}; save it with the adapter (modules_to_save)"
            )
    for step in steps:
        biased = step.name and step.name not in _BIASLESS.get(task_type, ()) and base.model_type != "modernbert"
        if biased and f"{step.name}.bias" not in tensors:
            raise SourceError(
                f"the {task_type} head of {base.model_type} needs {step.name}.bias, and the file has "
                f"{', '.join(sorted(tensors))}; save the adapter again"
            )
    classes = tensors[f"{steps[-1].name}.weight"].shape[0]
    problem = "regression" if task_type == "SEQ_CLS" and classes == 1 else "single_label"
    return Head(source, tuple(steps), problem), tuple(step.name for step in steps if step.name)
