"""A teacher's part of a run: it answers all texts, once, and what the student needs of it is kept."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeprompt import names
from edgeprompt.errors import BaseMismatchError, UnsupportedError
from edgeprompt.evaluation.data import data_hash
from edgeprompt.evaluation.evaluate import Columns, draw_shots
from edgeprompt.package.manifest import Base
from edgeprompt.package.tokenizer import Tokenizer
from edgeprompt.progress import show
from edgeprompt.prompts.file import PromptFile
from edgeprompt.prompts.hard_prompt import SHOT_SEPARATOR
from edgeprompt.prompts.template import Slot, Template, VirtualTokens
from edgeprompt.tuning.answers import Answer, AnswerFile
from edgeprompt.tuning.encoding import RecordEncoder
from edgeprompt.tuning.instruction import (
    Instruction,
    make_instruction,
    question_of,
    solved_text,
    with_shots,
)
from edgeprompt.tuning.loop import stopped
from edgeprompt.tuning.options import Distillation, TuneOptions, answers_path
from edgeprompt.tuning.plan import TaskPlan, make_plan
from edgeprompt.tuning.prepare import prompted, read_tokenizer
from edgeprompt.tuning.question import Question
from edgeprompt.tuning.teacher import Ends, FixedPrompt, Teacher, check_length, fixed_ids


@dataclass(frozen=True)
class Taught:
    """What the teacher leaves to the student."""

    answers: AnswerFile
    ends: Ends
    tokenizer: str
    """The teacher's tokenizer, by its fingerprint."""
    tokens: int
    """Tokens that the teacher reads around a text."""
    template: Template | None
    """The instruction with its solved examples."""
    hard: PromptFile | None
    """The instruction as a prompt without virtual tokens."""
    about: Mapping[str, Any]
    notes: tuple[str, ...]


def load_reader(base: Any) -> Any:
    """Load a base that reads instructions.

    Raises:
        UnsupportedError: it is an encoder.
    """
    from edgeprompt.base.load import LoadedBase, load_base

    loaded = base if isinstance(base, LoadedBase) else load_base(base)
    if loaded.family.architecture == names.ENCODER_ONLY:
        raise UnsupportedError(
            f"{loaded.name} is an encoder, which reads no instruction; distil decoders and encoder-decoders"
        )
    return loaded


def check_tokenizers(base: Any, teacher: Any) -> None:
    """Refuse, before any work, tokenizers that differ where the loss compares tokens."""
    from edgeprompt.base.geometry import geometry_of

    prints = []
    for one in (base, teacher):
        loaded = load_reader(one)
        prints.append((loaded.name, read_tokenizer(loaded, geometry_of(loaded.config).vocab_size).fingerprint))
        del loaded
        gc.collect()
    (student, ours), (other, theirs) = prints
    if ours != theirs:
        raise BaseMismatchError(
            f"--distil-loss kl compares tokens, and teacher {other} has tokenizer {theirs}, {student} has {ours}; take "
            "--distil-loss text, which learns the teacher's text"
        )


def teach(
    loaded: Any, question: Question, path: Path, options: TuneOptions, asked: Distillation, *, progress: bool
) -> Taught:
    """Make sure that the teacher's answers lie on disk."""
    from accelerate import PartialState

    from edgeprompt.base.geometry import geometry_of, tokens_of

    geometry = geometry_of(loaded.config)
    tokenizer = read_tokenizer(loaded, geometry.vocab_size, chat=asked.chat)
    tokens = tokens_of(loaded.config, getattr(loaded.model, "generation_config", None), loaded.tokenizer)
    if question.facts.task == "generate" and not tokens.eos:
        raise UnsupportedError(f"{loaded.name} names no end token, so its answers would not end")
    ends = Ends(
        tokens.eos,
        asked.stop or ((SHOT_SEPARATOR,) if asked.shots and question.facts.task == "generate" else ()),
        asked.max_new_tokens,
        asked.temperature,
        options.seed if asked.temperature else 0,  # runs that differ in it alone share answers that are not drawn
    )
    fingerprint = loaded.fingerprint
    about: dict[str, Any] = {"base": loaded.name, "fingerprint": fingerprint}
    instruction: Instruction | None = None
    hard: PromptFile | None = None
    if question.template is not None:
        instruction, plan = _instruction(loaded, tokenizer, tokens.bos, question, options, asked)
        teacher, count = _reader(loaded, geometry, tokenizer, tokens, instruction, plan, ends, options, asked)
        about |= {"template": str(instruction.template), "chat": asked.chat, "shots": asked.shots}
        about["add_special_tokens"] = instruction.add_special_tokens
        hard = PromptFile(
            name="instruction", method="prompt-tuning", task=plan.task, base=Base(loaded.name, fingerprint),
            template=instruction.template, verbalizer=plan.verbalizer, labels=plan.labels,
            add_special_tokens=instruction.add_special_tokens,
        )  # fmt: skip
    else:
        assert question.prompt is not None
        teacher, count = _prompted_teacher(loaded, geometry, tokenizer, tokens, question, ends, options)
        about |= {"prompt": question.prompt.sha256, "template": str(question.prompt.template)}
    answers = AnswerFile(
        answers_path(path, options),
        {
            "teacher": fingerprint,
            "asked": hashlib.sha256(
                repr(
                    (about, teacher.words, ends, options.max_length, options.text_column, instruction is not None)
                ).encode()
            ).hexdigest(),
            "texts": data_hash(question.texts),
            "count": question.total,
            "task": question.facts.task,
        },
    )
    state = PartialState()
    if not answers.complete and state.is_main_process:
        _write(answers, teacher, question, progress=progress)
    state.wait_for_everyone()
    notes = [f"the teacher's answers lie in {str(answers.path)!r}; the same command takes them from there"]
    if answers.other:
        notes.append(f"{str(answers.path)!r} held answers to another question; they were made anew")
    if question.prompt is not None:
        notes.append(
            f"carried over from {question.prompt.name!r}: template, label words and what it answers; its numbers for "
            f"{loaded.name} are not, nor its calibration, which its answers include"
        )
    template = instruction.template if instruction is not None else None
    return Taught(answers, ends, tokenizer.fingerprint, count, template, hard, about, tuple(notes))


def _write(answers: AnswerFile, teacher: Teacher, question: Question, *, progress: bool) -> None:
    made = answers.rows
    with show("teacher", question.total, start=made, unit="texts", wanted=progress) as tell:

        def told() -> Iterator[tuple[Sequence[int], Sequence[Answer]]]:
            nonlocal made
            for rows, batch in teacher.answer(question.texts, answers.batches):
                yield rows, batch
                made += len(rows)
                tell(made, "")

        try:
            answers.write(told())
        except (KeyboardInterrupt, SystemExit) as error:
            where = (
                f"after {made} of {question.total} answers of the teacher, which {str(answers.path)!r} keeps; the same "
                "command goes on"
            )
            raise stopped(error, where) from error


def _instruction(
    loaded: Any, tokenizer: Tokenizer, bos: int | None, question: Question, options: TuneOptions, asked: Distillation
) -> tuple[Instruction, TaskPlan]:
    """The instruction as the teacher reads it, with the solved examples, and the teacher's label words."""
    assert question.template is not None
    first = question_of(question.template)
    plan = _plan(loaded, question, first, options)
    shots = ""
    if asked.shots and asked.shots_from is not None:
        drawing = PromptFile(
            name="instruction", method="prompt-tuning", task=plan.task, base=Base("", ""), template=first,
            verbalizer=plan.verbalizer, labels=plan.labels,
        )  # fmt: skip
        columns = Columns(options.text_column, asked.label_column or options.label_column, options.target_column)
        seed = options.seed if asked.shots_seed is None else asked.shots_seed
        drawn = draw_shots(drawing, asked.shots_from, columns, asked.shots, seed)
        space = "" if str(first)[-1].isspace() else " "
        solved = []
        for fields, answer in drawn:
            word = plan.verbalizer[answer][0] if plan.verbalizer else answer if answer[:1].isspace() else space + answer
            solved.append((fields, word))
        shots = solved_text(question.template, solved)
    chat = tokenizer.chat if asked.chat else None
    made = make_instruction(with_shots(question.template, shots), chat, text_of_bos(tokenizer, bos))
    return made, _plan(loaded, question, made.template, options)


def text_of_bos(tokenizer: Tokenizer, bos: int | None) -> str | None:
    """The token that begins a text, as text."""
    return tokenizer.decode([bos], skip_special_tokens=False) if bos is not None else None


def _plan(loaded: Any, question: Question, template: Template, options: TuneOptions) -> TaskPlan:
    """The plan of a base that reads `template`."""
    own = replace(options, template=str(template), verbalizer=question.verbalizer, method="prompt-tuning", distil=None,
                  init="text")  # fmt: skip
    return make_plan(
        question.facts, own, architecture=loaded.family.architecture, name=loaded.name, predicts_masks=False
    )


def _reader(
    loaded: Any,
    geometry: Any,
    tokenizer: Tokenizer,
    tokens: Any,
    instruction: Instruction,
    plan: TaskPlan,
    ends: Ends,
    options: TuneOptions,
    asked: Distillation,
) -> tuple[Teacher, int]:
    """A teacher that reads an instruction, and how many tokens that takes."""
    architecture = loaded.family.architecture
    limit = geometry.max_positions
    open_encoder = RecordEncoder(
        architecture=architecture,
        template=instruction.template,
        tokenizer=tokenizer,
        options=replace(options, max_length=1 << 30, distil=None, init="text"),
        num_virtual_ids=0,
        prefix_length=0,
        vocab_size=geometry.vocab_size,
        add_special_tokens=instruction.add_special_tokens,
    )
    count = len(open_encoder.encode(dict.fromkeys(instruction.template.slots, "")).ids)
    room = ends.max_new_tokens if plan.task == "generate" and architecture == names.DECODER_ONLY else 1
    check_length(count, room, limit, loaded.name, asked.shots)
    longest = min(count + options.max_length, limit or 1 << 30)
    encoder = replace(open_encoder, options=replace(open_encoder.options, max_length=longest))
    lead = fixed_ids(open_encoder) if architecture == names.DECODER_ONLY else []
    table = loaded.model.get_input_embeddings()
    with torch.no_grad():
        rows = table(torch.tensor(lead, dtype=torch.long, device=table.weight.device))
    leading = Template((VirtualTokens(), Slot())) if lead else Template((Slot(), VirtualTokens()))
    model = prompted(loaded, leading, geometry, FixedPrompt(rows, is_prefix=False), tokens)
    return Teacher(model, encoder, lead=lead, verbalizer=plan.verbalizer, ends=ends), count


def _prompted_teacher(
    loaded: Any,
    geometry: Any,
    tokenizer: Tokenizer,
    tokens: Any,
    question: Question,
    ends: Ends,
    options: TuneOptions,
) -> tuple[Teacher, int]:
    """A teacher that has a tuned prompt, and how many tokens stand around a text."""
    prompt = question.prompt
    assert prompt is not None
    ours = Base(loaded.name, loaded.fingerprint)
    if not prompt.base.matches(ours):
        raise BaseMismatchError(
            f"prompt {prompt.name!r} was made for base {prompt.base.name!r} ({prompt.base.brief}), the teacher is "
            f"{ours.name!r} ({ours.brief}){prompt.base.apart(ours)}; name its own base with --teacher"
        )
    deep = prompt.past_key_values is not None
    if prompt.is_infix and loaded.family.architecture != names.DECODER_ONLY:
        raise UnsupportedError(f"prompt {prompt.name!r} has keys and values inside its text, which is for decoders")
    leads = deep and not prompt.is_infix
    array = prompt.past_key_values if deep else prompt.prompt_embeddings
    assert array is not None
    fixed = FixedPrompt(torch.from_numpy(np.asarray(array, np.float32).copy()), is_prefix=deep)
    encoder = RecordEncoder(
        architecture=loaded.family.architecture,
        template=prompt.template,
        tokenizer=tokenizer,
        options=replace(options, distil=None, init="text"),
        num_virtual_ids=0 if leads else fixed.num_virtual_tokens,
        prefix_length=fixed.num_virtual_tokens if leads else 0,
        vocab_size=geometry.vocab_size,
        add_special_tokens=prompt.add_special_tokens,
    )
    template = prompt.template.without_prompt() if leads else prompt.template
    model = prompted(loaded, template, geometry, fixed.to(loaded.model.device), tokens)
    teacher = Teacher(
        model, encoder, verbalizer=question.verbalizer if question.facts.task == "classify" else {},
        calibration=prompt.calibration, ends=ends,
    )  # fmt: skip
    return teacher, len(encoder.encode(dict.fromkeys(prompt.template.slots, "")).ids) + encoder.prefix_length
