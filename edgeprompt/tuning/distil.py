"""From an instruction, or another base's prompt, to a soft prompt: a teacher's answers instead of labels."""

from __future__ import annotations

import gc
import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeprompt import names
from edgeprompt.errors import BaseMismatchError, DataError, InputError, UnsupportedError
from edgeprompt.evaluation.cells import label_key, label_of, text_of
from edgeprompt.evaluation.data import DataSource, column_names, data_hash, read_records, source_name
from edgeprompt.evaluation.evaluate import Columns, draw_shots
from edgeprompt.evaluation.formats import Record
from edgeprompt.evaluation.metrics import score
from edgeprompt.package.manifest import Base
from edgeprompt.package.tokenizer import Tokenizer
from edgeprompt.progress import show
from edgeprompt.prompts.file import PromptFile, load_prompt, save_prompt
from edgeprompt.prompts.hard_prompt import SHOT_SEPARATOR
from edgeprompt.prompts.template import Slot, Template, VirtualTokens
from edgeprompt.tuning.answers import Answer, AnswerFile, LabelAnswer, TextAnswer
from edgeprompt.tuning.distilled import DistilClassify, DistilGenerate, DistilText
from edgeprompt.tuning.encoding import RecordEncoder
from edgeprompt.tuning.examples import Examples, sample, sorted_batches, split
from edgeprompt.tuning.files import save_adapter, text_source
from edgeprompt.tuning.first_token import measure_first_token
from edgeprompt.tuning.instruction import (
    SHOTS,
    Instruction,
    make_instruction,
    parse_instruction,
    question_of,
    solved_text,
    with_shots,
)
from edgeprompt.tuning.loop import stopped
from edgeprompt.tuning.options import Distillation, TuneOptions, answers_path
from edgeprompt.tuning.plan import MAX_LABELS, DataFacts, TaskPlan, inspect_data, make_plan
from edgeprompt.tuning.prepare import Run, prepare, prompted, read_tokenizer
from edgeprompt.tuning.runs import RunData, TuneResult, check_packages, closeness, make_loop, prompt_file, resume
from edgeprompt.tuning.teacher import CHUNK, Ends, FixedPrompt, Teacher, check_length, fixed_ids, write_answers

_WRITTEN = 64
"""Most held-out texts that the student answers freely, for the report."""
_TIMED = 15
"""Texts that the time to the first token is measured on."""
_EVAL_BATCHES = 2
_INITS = ("text", "sampled", "clustered")
"""Starts from the instruction, where no other text is given."""


@dataclass(frozen=True)
class _Question:
    """What is asked of a teacher, before any base is loaded."""

    texts: DataSource
    count: int
    """Texts to learn from; those behind them are for evaluation alone."""
    total: int
    facts: DataFacts
    verbalizer: Mapping[str, tuple[str, ...]]
    template: Template | None
    """The instruction without solved examples."""
    prompt: PromptFile | None
    """The teacher's prompt, where it has one."""


@dataclass(frozen=True)
class _Taught:
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


class _Joined(Sequence[Record]):
    """Records of two sources, one behind the other."""

    def __init__(self, first: DataSource, second: DataSource) -> None:
        self._sources = (first, second)
        self.name = f"{source_name(first)}, then {source_name(second)}"

    def __iter__(self) -> Iterator[Record]:
        return itertools.chain.from_iterable(map(read_records, self._sources))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]


def distil(base: Any, data: DataSource, path: Path, options: TuneOptions, *, progress: bool) -> TuneResult:
    """Train a soft prompt that answers as a teacher does, and write it; see `edgeprompt.tuning.tune`.

    Raises:
        InputError: the instruction has no place for the text, or exceeds the context.
        DataError: a text is empty.
        BaseMismatchError: the teacher's prompt is of another base, or tokenizers differ where they must not.
        UnsupportedError: a base or a task that cannot be distilled.
        TuningError: the run was stopped; it goes on with the same command.
    """
    asked = options.distil
    assert asked is not None
    question = _ask(data, options, asked)
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        own = asked.teacher is None
        if not own and asked.loss == "kl" and question.facts.task == "generate":
            _check_tokenizers(base, asked.teacher)
        loaded = _load(base if own else asked.teacher)
        taught = _teach(loaded, question, path, options, asked, progress=progress)
        if not own:
            del loaded
            gc.collect()
            loaded = _load(base)
        options = _student_options(loaded, question, taught, options, asked)
        torch.manual_seed(options.seed)
        run = prepare(loaded, question.facts, options)
        objective, calls = _objective(run, taught, asked)
        run = replace(run, objective=objective)
        _start_from_instruction(run, taught)
        found = _read_data(run, question, taught)
        check_packages(run, found)
        loop, batches = make_loop(run, found, path)
        if options.resume is not None:
            resume(run, loop, options.resume)
        done = loop.run(show=progress)
        prompt = prompt_file(run, loop, done, path, found)
        figures = _figures(run, found, taught, loop)
    checks = closeness(run, found)
    prompt = replace(prompt, generation={**_generation(question, taught, asked), **prompt.generation})
    about = {
        **taught.about,
        "loss": calls,
        "texts": len(found.indices),
        "instruction_tokens": taught.tokens,
        "num_virtual_tokens": prompt.num_virtual_tokens,
        **figures,
    }
    if taught.hard is not None and run.weights.packages:
        timed = _held_fields(run, found, question)
        about["first_token"] = [
            {"precision": package.manifest.precision, **measure_first_token(package.path, prompt, taught.hard, timed)}
            for package in run.weights.packages
        ]
    prompt = replace(prompt, distilled_from=about)
    if loop.accelerator.is_main_process:
        save_prompt(prompt, path)
        if options.adapter is not None:
            save_adapter(run.objective.model.soft.as_peft(run.loaded.model), options.adapter)
    loop.forget_checkpoint()
    loop.accelerator.wait_for_everyone()
    shown = {name: value for name, value in about.items() if name not in ("template", "prompt", "fingerprint")}
    return TuneResult(
        path=path,
        prompt=prompt,
        steps=done.step,
        best_step=done.best_step,
        metric=objective.metric,
        value=done.best.get(objective.metric),
        examples_per_second=done.step * batches.batch_size / done.seconds if done.seconds else 0.0,
        checks={"distilled": shown, **checks},
        notes=(f"learned: {calls}", *taught.notes, *found.notes),
    )


# What is asked


def _ask(data: DataSource, options: TuneOptions, asked: Distillation) -> _Question:
    template = parse_instruction(asked.instruction) if asked.instruction is not None else None
    prompt = _teachers_prompt(asked.teacher_prompt) if asked.teacher_prompt is not None else None
    if template is not None and (SHOTS in template.slots) != bool(asked.shots) and not asked.shots:
        with_shots(template, "")  # says that there are none
    texts = text_source(data)
    slots = template.slots if template is not None else prompt.template.slots if prompt is not None else ()
    count = _check_texts(texts, [slot for slot in slots if slot != SHOTS], options)
    total = count
    if options.eval_data is not None:
        held = text_source(options.eval_data)
        total += _check_texts(held, [slot for slot in slots if slot != SHOTS], options)
        texts = _Joined(texts, held)
    verbalizer = dict(options.verbalizer) or dict(prompt.verbalizer if prompt is not None else {})
    facts = _facts(texts, options, asked, verbalizer, prompt)
    return _Question(texts, count, total, facts, verbalizer, template, prompt)


def _check_texts(texts: DataSource, slots: Sequence[str], options: TuneOptions) -> int:
    """How many texts there are; every one must hold something."""
    count = 0
    for count, record in enumerate(read_records(texts), 1):
        where = f"row {count} of {source_name(texts)!r}"
        for slot in slots:
            column = options.text_column if slot == "text" else slot
            if not text_of(record, column, where).strip():
                raise DataError(f"{where}: the text in column {column!r} is empty; fill it in, or leave the row out")
    return count


def _facts(
    texts: DataSource,
    options: TuneOptions,
    asked: Distillation,
    verbalizer: Mapping[str, tuple[str, ...]],
    prompt: PromptFile | None,
) -> DataFacts:
    """The task and its labels: by label words, a label column, or the solved examples."""
    task = options.task or (prompt.task if prompt is not None else None)
    if task not in (None, "classify", "generate"):
        raise UnsupportedError(f"task {task!r} cannot be distilled; a teacher answers classify and generate")
    if task == "generate" or (task is None and not verbalizer and asked.label_column is None):
        shots = asked.shots_from
        if task is None and shots is not None and options.target_column not in column_names(shots):
            return inspect_data(shots, replace(options, task="classify", distil=None))
        if verbalizer or asked.label_column is not None:
            raise InputError("a verbalizer and --label-column are for --task classify; leave them out")
        return DataFacts("generate")
    if verbalizer:
        return DataFacts("classify", tuple(verbalizer))
    if asked.label_column is not None:
        return DataFacts("classify", _labels(texts, asked.label_column))
    if asked.shots_from is not None:
        return inspect_data(asked.shots_from, replace(options, task="classify", distil=None))
    raise InputError(
        'the labels are not known: name them with --verbalizer LABEL=" word", once for each, or give --label-column'
    )


def _labels(texts: DataSource, column: str) -> tuple[str, ...]:
    found: dict[str, str] = {}
    for number, record in enumerate(read_records(texts), 1):
        if record.get(column) in (None, ""):
            continue
        label = label_of(record, column, f"row {number} of {source_name(texts)!r}")
        found.setdefault(label_key(label), label)
        if len(found) > MAX_LABELS:
            raise DataError(f"column {column!r} of {source_name(texts)!r} has more than {MAX_LABELS} labels")
    if not found:
        raise DataError(f"no row of {source_name(texts)!r} has a label in column {column!r}; leave out --label-column")
    return tuple(sorted(found.values()))


def _teachers_prompt(path: Path) -> PromptFile:
    """A prompt that another base may learn from.

    Raises:
        UnsupportedError: what it answers with cannot be carried over.
    """
    prompt = load_prompt(path)
    if prompt.head_spec is not None:
        raise UnsupportedError(
            f"prompt {str(path)!r} answers through a head that was trained on its base's hidden states, which no other "
            "base has; tune one for the new base with labels"
        )
    if prompt.task not in ("classify", "generate") or prompt.encoder_past_key_values is not None:
        what = f"for {prompt.task}" if prompt.encoder_past_key_values is None else "deep in an encoder"
        raise UnsupportedError(f"prompt {str(path)!r} is {what}, and cannot be a teacher; classify and generate can")
    return prompt


def _load(base: Any) -> Any:
    from edgeprompt.base.load import LoadedBase, load_base

    loaded = base if isinstance(base, LoadedBase) else load_base(base)
    if loaded.family.architecture == names.ENCODER_ONLY:
        raise UnsupportedError(
            f"{loaded.name} is an encoder, which reads no instruction; distil decoders and encoder-decoders"
        )
    return loaded


def _check_tokenizers(base: Any, teacher: Any) -> None:
    """Refuse, before any work, tokenizers that differ where the loss compares tokens."""
    from edgeprompt.base.geometry import geometry_of

    prints = []
    for one in (base, teacher):
        loaded = _load(one)
        prints.append((loaded.name, read_tokenizer(loaded, geometry_of(loaded.config).vocab_size).fingerprint))
        del loaded
        gc.collect()
    (student, ours), (other, theirs) = prints
    if ours != theirs:
        raise BaseMismatchError(
            f"--distil-loss kl compares tokens, and teacher {other} has tokenizer {theirs}, {student} has {ours}; take "
            "--distil-loss text, which learns the teacher's text"
        )


# The teacher


def _teach(
    loaded: Any, question: _Question, path: Path, options: TuneOptions, asked: Distillation, *, progress: bool
) -> _Taught:
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
        options.seed,
    )
    fingerprint = loaded.fingerprint
    about: dict[str, Any] = {"base": loaded.name, "fingerprint": fingerprint}
    instruction: Instruction | None = None
    hard: PromptFile | None = None
    if question.template is not None:
        instruction, plan = _instruction(loaded, tokenizer, tokens.bos, question, options, asked)
        teacher, count = _reader(loaded, geometry, tokenizer, tokens, instruction, plan, ends, options, asked)
        about |= {"template": str(instruction.template), "chat": asked.chat, "shots": asked.shots}
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
    return _Taught(answers, ends, tokenizer.fingerprint, count, template, hard, about, tuple(notes))


def _write(answers: AnswerFile, teacher: Teacher, question: _Question, *, progress: bool) -> None:
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
    loaded: Any, tokenizer: Tokenizer, bos: int | None, question: _Question, options: TuneOptions, asked: Distillation
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
    made = make_instruction(with_shots(question.template, shots), chat, _text_of_bos(tokenizer, bos))
    return made, _plan(loaded, question, made.template, options)


def _text_of_bos(tokenizer: Tokenizer, bos: int | None) -> str | None:
    return tokenizer.decode([bos], skip_special_tokens=False) if bos is not None else None


def _plan(loaded: Any, question: _Question, template: Template, options: TuneOptions) -> TaskPlan:
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
    question: _Question,
    ends: Ends,
    options: TuneOptions,
) -> tuple[Teacher, int]:
    """A teacher that has a tuned prompt, and how many tokens stand around a text."""
    prompt = question.prompt
    assert prompt is not None
    ours = Base(loaded.name, loaded.fingerprint)
    if not prompt.base.matches(ours):
        raise BaseMismatchError(
            f"prompt {prompt.name!r} was made for base {prompt.base.name} ({prompt.base.fingerprint}), the teacher is "
            f"{ours.name} ({ours.fingerprint}){prompt.base.apart(ours)}; name its own base with --teacher"
        )
    deep = prompt.past_key_values is not None
    array = prompt.past_key_values if deep else prompt.prompt_embeddings
    assert array is not None
    fixed = FixedPrompt(torch.from_numpy(np.asarray(array, np.float32).copy()), is_prefix=deep)
    encoder = RecordEncoder(
        architecture=loaded.family.architecture,
        template=prompt.template,
        tokenizer=tokenizer,
        options=replace(options, distil=None, init="text"),
        num_virtual_ids=0 if deep else fixed.num_virtual_tokens,
        prefix_length=fixed.num_virtual_tokens if deep else 0,
        vocab_size=geometry.vocab_size,
        add_special_tokens=prompt.add_special_tokens,
    )
    model = prompted(loaded, prompt.template, geometry, fixed.to(loaded.model.device), tokens)
    teacher = Teacher(
        model, encoder, verbalizer=question.verbalizer if question.facts.task == "classify" else {},
        calibration=prompt.calibration, ends=ends,
    )  # fmt: skip
    return teacher, len(encoder.encode(dict.fromkeys(prompt.template.slots, "")).ids) + encoder.prefix_length


# The student


def _student_options(
    loaded: Any, question: _Question, taught: _Taught, options: TuneOptions, asked: Distillation
) -> TuneOptions:
    """The options with the student's template, label words and start."""
    from edgeprompt.base.geometry import geometry_of, tokens_of

    template = options.template
    if template is None and question.prompt is not None:
        template = str(question.prompt.template)
    if template is None:
        assert question.template is not None
        chat = bos = None
        if asked.chat:
            tokenizer = read_tokenizer(loaded, geometry_of(loaded.config).vocab_size, chat=True)
            tokens = tokens_of(loaded.config, getattr(loaded.model, "generation_config", None), loaded.tokenizer)
            chat, bos = tokenizer.chat, _text_of_bos(tokenizer, tokens.bos)
        plain = Template(tuple(part for part in question.template.parts if part != Slot(SHOTS)))
        template = str(make_instruction(plain, chat, bos).student)
    return replace(options, template=template, verbalizer=question.verbalizer, calibrate=False)


def _objective(run: Run, taught: _Taught, asked: Distillation) -> tuple[Any, str]:
    """What the student learns, and what that is called."""
    if run.plan.task == "classify":
        objective = DistilClassify(
            run.model, run.encoder, run.plan.verbalizer, label_column=asked.label_column, weight=asked.label_weight
        )
        mixed = f", and {asked.label_weight:g} of cross-entropy where there is a label" if asked.label_column else ""
        return objective, f"the teacher's distribution over the labels (KL divergence{mixed})"
    whole = run.encoder.architecture == names.ENCODER_DECODER
    same = taught.tokenizer == run.tokenizer.fingerprint
    if asked.loss == "kl" and not same:
        raise BaseMismatchError(
            f"--distil-loss kl compares tokens, and the teacher has tokenizer {taught.tokenizer}, {run.loaded.name} "
            f"has {run.tokenizer.fingerprint}; take --distil-loss text, which learns the teacher's text"
        )
    if same and asked.loss != "text":
        kind: Any = DistilGenerate
        calls = "the teacher's distribution over every token of its answers (KL divergence, one tokenizer)"
    else:
        kind = DistilText
        why = "" if same else ", as the tokenizers differ"
        calls = f"the teacher's text (sequence-level distillation{why})"
    return kind(run.model, run.encoder, end=run.tokens.eos[0], whole_text=whole), calls


@torch.no_grad()
def _start_from_instruction(run: Run, taught: _Taught) -> None:
    """Start the prompt as the instruction: its own embeddings, or its first keys and values."""
    options, soft = run.options, run.objective.model.soft
    if taught.template is None or options.init not in _INITS or options.init_text is not None:
        return
    words = "".join(part.text for part in taught.template.parts if not isinstance(part, Slot))  # type: ignore[union-attr]
    ids = run.tokenizer.encode(words, add_special_tokens=soft.is_prefix) or [0]
    count = soft.num_virtual_tokens
    ids = (ids * math.ceil(count / len(ids)))[: max(count, len(ids))]
    if soft.is_prefix:
        target = run.model.start_prefix(ids[:count])
        if target is None:
            return
        soft.start_from(target.float())
        if not options.projection:
            soft.freeze_first()
        return
    table = run.model.base.get_input_embeddings()
    rows = table(torch.tensor(ids, device=table.weight.device)).float()
    if len(ids) > count:
        choose = sampled_rows if options.init == "sampled" else clustered_rows
        rows = torch.from_numpy(choose(rows.cpu().numpy(), count, options.seed)).to(rows.device)
    soft.start_from(rows)


def sampled_rows(rows: Any, count: int, seed: int) -> Any:
    """`count` of the rows, drawn by the seed, in their order."""
    chosen = np.random.default_rng([seed, 6]).choice(len(rows), count, replace=False)
    return rows[np.sort(chosen)]


def clustered_rows(rows: Any, count: int, seed: int, rounds: int = 20) -> Any:
    """The means of `count` clusters of the rows (Lloyd's algorithm, started from rows drawn by the seed), in the order
    of where their rows stand."""
    random = np.random.default_rng([seed, 7])
    centres = rows[np.sort(random.choice(len(rows), count, replace=False))].copy()
    for _ in range(rounds):
        distances = ((rows**2).sum(1)[:, None] - 2 * rows @ centres.T) + (centres**2).sum(1)
        owner = distances.argmin(1)
        for index in range(count):
            if (owner == index).any():
                centres[index] = rows[owner == index].mean(0)
    places = [np.flatnonzero(owner == index).mean() if (owner == index).any() else len(rows) for index in range(count)]
    return np.ascontiguousarray(centres[np.argsort(places, kind="stable")], np.float32)


def _read_data(run: Run, question: _Question, taught: _Taught) -> RunData:
    """The texts as examples, each with what the teacher said."""
    options, objective = run.options, run.objective
    assert isinstance(objective, (DistilClassify, DistilGenerate, DistilText))
    encode: Any = objective.encode_answered
    kind: Any = LabelAnswer if run.plan.task == "classify" else TextAnswer
    first: dict[str, str] = {}

    def encoded() -> Iterator[Any]:
        answers = taught.answers.read(kind, CHUNK)
        for number, (record, answer) in enumerate(zip(read_records(question.texts), answers, strict=True), 1):
            where = f"row {number} of {source_name(question.texts)!r}"
            if not first:
                first.update(objective.fields(record, where))
            yield encode(record, where, answer)

    examples = Examples(encoded())
    if options.eval_data is not None:
        indices, held = np.arange(question.count), np.arange(question.count, question.total)
    else:
        indices, held = split(examples.groups, options.eval_split, options.seed)
    held = sample(held, options.eval_limit, options.seed)
    batches = list(sorted_batches(held, examples.lengths, options.batch_size * _EVAL_BATCHES))
    return RunData(question.texts, examples, indices, examples, batches, first)


def _generation(question: _Question, taught: _Taught, asked: Distillation) -> Mapping[str, Any]:
    if question.prompt is not None:
        return dict(question.prompt.generation)
    return {"max_new_tokens": asked.max_new_tokens} if question.facts.task == "generate" else {}


# The report


@torch.no_grad()
def _figures(run: Run, found: RunData, taught: _Taught, loop: Any) -> dict[str, Any]:
    """How closely the student follows its teacher on the held-out texts, on every package's weights."""
    if not found.eval_batches:
        return {}
    model = run.objective.model
    model.eval()
    made = []
    for turn in range(max(1, len(run.weights))):
        run.weights.use(turn)
        with loop.accelerator.autocast():
            shared = model.shared()
            is_label = run.plan.task == "classify"
            one = _labelled(run, found, shared) if is_label else _written(run, found, taught, shared)
        if len(run.weights) > 1:
            one = {"package": run.weights.packages[turn].path.name, **one}
        made.append(one)
    run.weights.use(0)
    return made[0] if len(made) == 1 else {"on": made}


def _labelled(run: Run, found: RunData, shared: Any) -> dict[str, Any]:
    student, teacher, labels = [], [], []
    assert isinstance(run.objective, DistilClassify)
    for batch in found.eval_batches:
        scores, said, given = run.objective.compare([found.eval_examples[index] for index in batch], shared)
        student += scores.argmax(-1).tolist()
        teacher += said.argmax(-1).tolist()
        labels += given.tolist()
    figures: dict[str, Any] = {"agreement": _share([int(a == b) for a, b in zip(student, teacher, strict=True)])}
    known = [index for index, label in enumerate(labels) if label >= 0]
    if known:
        figures["accuracy"] = _share([int(student[index] == labels[index]) for index in known])
        figures["teacher_accuracy"] = _share([int(teacher[index] == labels[index]) for index in known])
    return figures


def _share(values: Sequence[float]) -> dict[str, Any]:
    """A mean with its standard error, of at least one text that might be otherwise where all are alike."""
    count = len(values)
    mean = sum(values) / count
    spread = max(mean * (1 - mean), 1 / (count + 1) * (1 - 1 / (count + 1)))
    return {"value": round(mean, 4), "standard_error": round(math.sqrt(spread / count), 4), "n": count}


def _written(run: Run, found: RunData, taught: _Taught, shared: Any) -> dict[str, Any]:
    right, count = [], []
    for batch in found.eval_batches:
        for index in batch:
            outcome = run.objective.measure([found.eval_examples[index]], shared)
            right.append(outcome.correct)
            count.append(outcome.count)
    share = sum(right) / sum(count)
    # A ratio of sums over texts: the linearised error.
    error = math.sqrt(sum((a - share * b) ** 2 for a, b in zip(right, count, strict=True))) / sum(count)
    tokens = {"value": round(share, 4), "standard_error": round(error, 4), "n": len(count)}
    wanted = sorted(index for batch in found.eval_batches for index in batch)[:_WRITTEN]
    texts = {}
    for index, answer in enumerate(taught.answers.read(TextAnswer, CHUNK)):
        if index in wanted and isinstance(answer, TextAnswer):
            texts[index] = answer.text.strip()
    ends = replace(taught.ends, eos=run.tokens.eos, temperature=0.0, stop=())
    student = []
    for index in wanted:
        (answer,) = write_answers(run.model, run.tokenizer, [found.eval_examples[index].ids], shared, ends)
        student.append(answer.text.strip())
    figures: dict[str, Any] = {"token_agreement": tokens}
    with suppress(ImportError):  # rouge is optional
        rouge = score("rouge", student, [texts[index] for index in wanted])
        figures["rouge_to_teacher"] = {
            "value": round(rouge.value, 4), "standard_error": round(rouge.standard_error, 4), "n": rouge.n
        }  # fmt: skip
    return figures


def _held_fields(run: Run, found: RunData, question: _Question) -> list[dict[str, str]]:
    """Fields of some held-out texts."""
    wanted = set(sorted(index for batch in found.eval_batches for index in batch)[:_TIMED])
    wanted = wanted or set(found.indices[:_TIMED].tolist())
    return [
        run.objective.fields(record, f"row {number + 1}")
        for number, record in enumerate(read_records(question.texts))
        if number in wanted
    ]
