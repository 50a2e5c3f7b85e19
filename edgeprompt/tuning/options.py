"""What to tune, and how."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgeprompt import names
from edgeprompt.errors import InputError
from edgeprompt.evaluation.data import DataSource
from edgeprompt.prompts.template import Template

INITS = ("text", "vocab", "labels", "random")
ENCODERS = ("mlp", "lstm")
PRECISIONS = ("no", "bf16", "fp16")
METHODS = (*names.METHODS, "head")
"""How to tune; "head" trains an encoder's task head alone, with no prompt."""

LEARNING_RATES: Mapping[str, float] = {
    "prompt-tuning": 0.03,
    "p-tuning": 0.003,
    "prefix-tuning": 0.02,
    "p-tuning-v2": 0.02,
    "multitask-prompt-tuning": 0.03,
    "head": 0.005,
}
PROJECTED_RATE = 0.001
"""Learning rate of a prefix behind a projection."""
HEAD_RATE = 0.005
"""Learning rate of a task head."""
DEFAULT_STEPS = 200


@dataclass(frozen=True)
class TuneOptions:
    """How to tune one prompt; None leaves the choice to the data and the method."""

    method: str = "prompt-tuning"
    task: str | None = None
    """"classify", "generate", "tag" or "qa"; None: by the columns that the data has."""
    problem_type: str | None = None
    """Of classification with a head: "single_label", "multi_label" or "regression"; None: lists of labels are several,
    everything else is one."""
    num_virtual_tokens: int = 16
    encoder: str = "mlp"
    """P-tuning's network: "mlp" or "lstm"."""
    projection: bool = False
    """Train a prefix behind a two-layer network (prefix tuning, P-Tuning v2)."""
    init: str = "text"
    """"text", "vocab" (sampled tokens), "labels" (the label words), or "random"."""
    init_text: str | None = None
    """Text to start from; None: one sentence that names the task and the label words."""
    template: str | None = None
    verbalizer: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Label -> label words; empty: each label is its own word."""
    text_column: str = "text"
    label_column: str = "label"
    target_column: str = "target"
    eval_data: DataSource | None = None
    eval_split: float = 0.1
    """Fraction of the data kept for evaluation where no `eval_data` is given; 0: none."""
    eval_limit: int = 256
    """Most examples that one evaluation during training looks at."""
    eval_steps: int | None = None
    """Steps between two evaluations; None: a fifth of the run."""
    patience: int | None = 4
    """Evaluations without a better result after which tuning stops; None: never."""
    shots: int | None = None
    """Training examples per class, drawn by the seed; None: all."""
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    learning_rate: float | None = None
    seed: int = 0
    max_length: int = 256
    """Most tokens of one example, virtual tokens and target included; longer texts are cut."""
    mixed_precision: str = "no"
    calibrate: bool = True
    """Try a contextual calibration of the verbalizer, and keep it where it helps on the eval data."""
    package: Path | None = None
    """Package whose own, dequantised weights the prompt is tuned against."""
    resume: Path | None = None
    """A checkpoint to go on from, or a prompt file to start from."""
    adapter: Path | None = None
    """Folder for the same prompt as a PEFT adapter."""
    log: Path | None = None
    """Folder for metrics.jsonl and TensorBoard events."""
    name: str | None = None
    """The prompt's name; None: the output file's."""

    def __post_init__(self) -> None:
        """Refuse what no run could use.

        Raises:
            InputError: a value is out of its range.
            TemplateError: the template does not parse.
        """
        for name, allowed in (
            ("method", METHODS),
            ("task", (None, *names.TASKS)),
            ("problem_type", (None, *names.PROBLEM_TYPES)),
            ("init", INITS),
            ("encoder", ENCODERS),
            ("mixed_precision", PRECISIONS),
        ):
            if getattr(self, name) not in allowed:
                known = ", ".join(str(value) for value in allowed if value is not None)
                raise InputError(f"{name} is {getattr(self, name)!r}, allowed: {known}")
        for name, least in (
            ("num_virtual_tokens", 1), ("batch_size", 1), ("eval_limit", 1), ("max_length", 2), ("seed", 0),
            ("steps", 1), ("epochs", 0), ("shots", 1), ("eval_steps", 1), ("patience", 1), ("learning_rate", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                raise InputError(f"{name} is {value}, it must be a number of at least {least}")
        if self.steps and self.epochs:
            raise InputError("give steps or epochs, not both")
        if not 0 <= self.eval_split < 1:
            raise InputError(f"eval_split is {self.eval_split}, it must be at least 0 and below 1")
        if self.template is not None:
            Template.parse(self.template)
        for label, words in self.verbalizer.items():
            if not words or not all(words):
                raise InputError(f"the verbalizer has no word for label {label!r}")

    @property
    def rate(self) -> float:
        """The learning rate: as given, or one that converges with the method."""
        if self.learning_rate is not None:
            return self.learning_rate
        return PROJECTED_RATE if self.projection else LEARNING_RATES[self.method]


def checkpoint_path(output: str | os.PathLike[str]) -> Path:
    """Where a run that makes `output` keeps its checkpoint."""
    return Path(output).with_suffix(".checkpoint")
