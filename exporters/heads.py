"""Task heads of transformers models, as the prompt file stores them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprompt.errors import UnsupportedError
from edgeprompt.prompts.file import Head, HeadStep

_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu", "tanh": "tanh"}
PROBLEMS = {
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}


def head_from_model(model: Any) -> tuple[Head, dict[str, npt.NDArray[np.float32]]]:
    """The classifier of a transformers model, or of a PEFT model around one, for a prompt file.

    The head's input is the one that transformers and PEFT read: with an embedding prompt, "first" and "pooler" are
    the first virtual token. Heads trained by ourselves may read "first_text" instead.

    Args:
        model: A `...ForSequenceClassification`, `...ForTokenClassification` or `...ForQuestionAnswering`.

    Returns:
        The head's description, and its float32 tensors by the names that transformers gives them.

    Raises:
        UnsupportedError: the model has no head that is known.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    kind = type(model).__name__
    if kind.endswith("ForSequenceClassification"):
        source, steps = _sequence_head(model)
    elif kind.endswith(("ForTokenClassification", "ForQuestionAnswering")):
        source, steps = "tokens", _token_head(model)
    else:
        raise UnsupportedError(f"{kind} has no task head that edgeprompt knows; {_KNOWN}")
    problem = getattr(model.config, "problem_type", None)
    if problem is None and source != "tokens":
        problem = "regression" if model.config.num_labels == 1 else None
    head = Head(source, tuple(steps), PROBLEMS.get(problem or "", "single_label"))
    return head, head_tensors(model, head)


def head_tensors(model: Any, head: Head) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors that `head` names, read from `model`."""
    tensors = {}
    for step in head.steps:
        if not step.name:
            continue
        module = model
        for part in step.name.split("."):
            module = _trained(getattr(module, part))
        if step.operation == "layer_norm" and abs(module.eps - 1e-5) > 1e-9:
            raise UnsupportedError(f"layer norm {step.name} has epsilon {module.eps}; heads in prompt files have 1e-5")
        for name in ("weight", "bias"):
            tensor = getattr(module, name, None)
            if tensor is not None:
                tensors[f"{step.name}.{name}"] = tensor.detach().float().cpu().numpy().copy()
    return tensors


def _trained(module: Any) -> Any:
    """The copy of a module that PEFT trained (`modules_to_save`), or the module itself."""
    copies = getattr(module, "modules_to_save", None)
    if copies is None:
        return module
    active = module.active_adapter
    return copies[active if isinstance(active, str) else active[0]]


def _linear(*names: str) -> list[HeadStep]:
    return [HeadStep("linear", name) for name in names]


def _activation(name: str) -> HeadStep:
    if name not in _ACTIVATIONS:
        raise UnsupportedError(f"head activation {name!r} is not one of {', '.join(_ACTIVATIONS)}")
    return HeadStep(_ACTIVATIONS[name])


def _dense_head(activation: str) -> Callable[[Any], tuple[str, list[HeadStep]]]:
    steps = [HeadStep("linear", "classifier.dense"), HeadStep(activation), HeadStep("linear", "classifier.out_proj")]
    return lambda config: ("first", steps)


def _modernbert_steps(config: Any) -> list[HeadStep]:
    act = _activation(config.classifier_activation)
    return [*_linear("head.dense"), act, HeadStep("layer_norm", "head.norm"), *_linear("classifier")]


def _modernbert(config: Any) -> tuple[str, list[HeadStep]]:
    return ("first" if config.classifier_pooling == "cls" else "mean_all"), _modernbert_steps(config)


_SEQUENCE: dict[str, Callable[[Any], tuple[str, list[HeadStep]]]] = {
    "bert": lambda config: ("pooler", _linear("classifier")),
    "albert": lambda config: ("pooler", _linear("classifier")),
    "roberta": _dense_head("tanh"),
    "xlm-roberta": _dense_head("tanh"),
    "camembert": _dense_head("tanh"),
    "mpnet": _dense_head("tanh"),
    "electra": _dense_head("gelu"),
    "distilbert": lambda config: ("first", [*_linear("pre_classifier"), HeadStep("relu"), *_linear("classifier")]),
    "deberta-v2": lambda config: (
        "first",
        [*_linear("pooler.dense"), _activation(config.pooler_hidden_act), *_linear("classifier")],
    ),
    "modernbert": _modernbert,
}
_KNOWN = f"sequence classification is known for {', '.join(_SEQUENCE)} and decoders with a score layer"


def sequence_head(model_type: str, config: Any) -> tuple[str, list[HeadStep]]:
    """Input and steps of a family's `...ForSequenceClassification`, for readers of checkpoints without a model.

    Args:
        model_type: The base's; decoders have one `score` layer and need no entry here.
        config: The base's transformers config; None where it is not at hand.

    Raises:
        UnsupportedError: the family is not known, or its head goes by the config and there is none.
    """
    if model_type not in _SEQUENCE:
        raise UnsupportedError(f"the classification head of {model_type!r} is not known; {_KNOWN}")
    try:
        return _SEQUENCE[model_type](config)
    except AttributeError as error:
        raise UnsupportedError(
            f"the head of {model_type!r} goes by its config: give the model itself as --base, not its package"
        ) from error


def _sequence_head(model: Any) -> tuple[str, list[HeadStep]]:
    known = _SEQUENCE.get(model.config.model_type)
    if known is not None:
        return known(model.config)
    if hasattr(model, "score"):
        return "last", _linear("score")
    raise UnsupportedError(f"the head of {type(model).__name__} is not known; {_KNOWN}")


def _token_head(model: Any) -> list[HeadStep]:
    if model.config.model_type == "modernbert":
        return _modernbert_steps(model.config)
    name = "qa_outputs" if hasattr(model, "qa_outputs") else "classifier" if hasattr(model, "classifier") else "score"
    if not hasattr(model, name):
        raise UnsupportedError(
            f"the head of {type(model).__name__} is not known; it has no classifier, score or qa_outputs"
        )
    return _linear(name)
