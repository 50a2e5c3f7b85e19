"""What to tune, and how."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeprompt import names
from edgeprompt.errors import InputError
from edgeprompt.evaluation.data import DataSource
from edgeprompt.prompts.template import Template

INITS = ("text", "vocab", "labels", "random", "sampled", "clustered")
"""The last two are of an instruction to distil, where it is longer than the prompt."""
ENCODERS = ("mlp", "lstm")
PRECISIONS = ("no", "bf16", "fp16")
LOSSES = ("auto", "kl", "text")
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
DEFAULT_STEPS, MAX_LENGTH = 200, 256
EVAL_EXAMPLES = 256
"""Examples that evaluation looks at where there are enough."""
_MOST_EVAL = 0.2
"""Share of the data that evaluation takes at most by default."""


@dataclass(frozen=True)
class Distillation:
    """A teacher whose answers are learned instead of labels: a base that reads an instruction, or a tuned prompt."""

    instruction: str | None = None
    """What the teacher reads, with `{text}` where the input stands; None: `teacher_prompt` says it."""
    chat: bool = False
    """Put the instruction into the base's chat template, as a user's message."""
    shots: int = 0
    """Solved examples of `shots_from` in the teacher's prompt, drawn by `shots_seed`."""
    shots_from: DataSource | None = None
    shots_seed: int | None = None
    """Draws the solved examples; None: the run's seed."""
    teacher: Any = None
    """Base of the teacher, as `tune` takes one; None: the student's own, in full precision."""
    teacher_prompt: Path | None = None
    """A prompt file of the teacher's base, instead of an instruction."""
    label_column: str | None = None
    """Labels, where there are some: cross-entropy is mixed in, and accuracy reported."""
    label_weight: float = 0.5
    """The share of cross-entropy in the loss of a text that has a label."""
    loss: str = "auto"
    """Of free text: "kl" (the teacher's distribution of every token), "text" (its tokens alone); "auto": "kl" where
    both have one tokenizer."""
    temperature: float = 0.0
    """At which the teacher's free text is sampled; 0: greedy."""
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    """Texts that end the teacher's answer; none: the empty line where there are solved examples."""
    answers: Path | None = None
    """File that keeps the teacher's answers; None: beside the output."""
    balance: bool = False
    """Subtract from every label's log-probability its mean over all texts, which removes a preference that does not
    depend on the text. For labels that are about equally common."""

    def __post_init__(self) -> None:
        """Refuse what no run could use.

        Raises:
            InputError: a value is out of its range, or options do not go together.
        """
        if (self.instruction is None) == (self.teacher_prompt is None):
            raise InputError("a teacher reads an instruction (--distil), or has a prompt (--teacher-prompt): give one")
        if self.teacher_prompt is not None and self.teacher is None:
            raise InputError("--teacher-prompt is for another base: name the one it was made for with --teacher")
        if self.teacher_prompt is not None and (self.chat or self.shots):
            raise InputError("--chat, --shots and --shots-from are for an instruction (--distil)")
        if bool(self.shots) != (self.shots_from is not None):
            raise InputError("--shots and --shots-from go together")
        if self.shots < 0 or self.max_new_tokens < 1 or not 0 <= self.temperature < float("inf"):
            raise InputError("shots must be at least 0, max_new_tokens at least 1, temperature at least 0")
        if not 0 <= self.label_weight <= 1:
            raise InputError(f"label_weight is {self.label_weight}, it must be from 0 to 1")
        if self.loss not in LOSSES:
            raise InputError(f"loss is {self.loss!r}, allowed: {', '.join(LOSSES)}")


MOST_RATE = 1_000_000
"""Beyond it the optimizer's own numbers overflow."""
MOST_SEED = 2**32 - 1
"""What random numbers of every library take."""


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
    eval_split: float | None = None
    """Fraction of the data kept for evaluation where no `eval_data` is given; 0: none; None: see `eval_share`."""
    eval_limit: int = EVAL_EXAMPLES
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
    max_length: int = MAX_LENGTH
    """Most tokens of one example, virtual tokens and target included; longer texts are cut. A base that takes fewer
    than the default has its own limit."""
    mixed_precision: str = "no"
    calibrate: bool = True
    """Try a contextual calibration of the verbalizer, and keep it where it helps on the eval data."""
    package: Path | Sequence[Path] | None = None
    """Package whose own, dequantised weights the prompt is tuned against; of several, one prompt serves all."""
    distil: Distillation | None = None
    """Learn a teacher's answers to texts without labels."""
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
        for name, most in (("learning_rate", MOST_RATE), ("seed", MOST_SEED)):
            value = getattr(self, name)
            if value is not None and value > most:
                raise InputError(f"{name} is {value}, it must be at most {most}")
        if self.distil is None and self.init in ("sampled", "clustered"):
            raise InputError(f"init {self.init!r} is for --distil; allowed: {', '.join(INITS[:4])}")
        if self.steps and self.epochs:
            raise InputError("give steps or epochs, not both")
        if self.eval_split is not None and not 0 <= self.eval_split < 1:
            raise InputError(f"eval_split is {self.eval_split}, it must be at least 0 and below 1")
        if self.template is not None:
            Template.parse(self.template)
        for label, words in self.verbalizer.items():
            if not words or not all(words):
                raise InputError(f"the verbalizer has no word for label {label!r}")

    def eval_share(self, count: int) -> float:
        """The fraction of `count` examples that is kept for evaluation.

        Without `eval_split` as many as `EVAL_EXAMPLES`, whose standard error is 2.5 points at 80 %, and at most a
        fifth.
        """
        return self.eval_split if self.eval_split is not None else min(_MOST_EVAL, EVAL_EXAMPLES / max(1, count))

    @property
    def packages(self) -> tuple[Path, ...]:
        """The packages that the prompt is tuned for."""
        if self.package is None:
            return ()
        return (Path(self.package),) if isinstance(self.package, (str, os.PathLike)) else tuple(self.package)

    @property
    def rate(self) -> float:
        """The learning rate: as given, or one that converges with the method."""
        if self.learning_rate is not None:
            return self.learning_rate
        return PROJECTED_RATE if self.projection else LEARNING_RATES[self.method]


def answers_path(output: str | os.PathLike[str], options: TuneOptions) -> Path:
    """Where a run that makes `output` keeps its teacher's answers."""
    if options.distil is not None and options.distil.answers is not None:
        return options.distil.answers
    return Path(output).with_suffix(".teacher.jsonl")


def checkpoint_path(output: str | os.PathLike[str]) -> Path:
    """Where a run that makes `output` keeps its checkpoint."""
    return Path(output).with_suffix(".checkpoint")
