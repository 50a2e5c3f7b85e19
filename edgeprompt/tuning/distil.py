"""From an instruction, or another base's prompt, to a soft prompt: a teacher's answers instead of labels."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeprompt import names
from edgeprompt.errors import BaseMismatchError, DataError, InputError
from edgeprompt.evaluation.data import DataSource, read_records, source_name
from edgeprompt.prompts.file import save_prompt
from edgeprompt.prompts.template import Slot, Template
from edgeprompt.tuning.agreement import figures_of, held_fields
from edgeprompt.tuning.answers import LabelAnswer, TextAnswer
from edgeprompt.tuning.distilled import DistilClassify, DistilGenerate, DistilText
from edgeprompt.tuning.examples import Examples, sample, sorted_batches, split
from edgeprompt.tuning.files import save_adapter
from edgeprompt.tuning.first_token import measure_first_token
from edgeprompt.tuning.instruction import (
    SHOTS,
    make_instruction,
)
from edgeprompt.tuning.loop import stopped
from edgeprompt.tuning.objectives import GOLDEN_CANDIDATES, texts_at_once
from edgeprompt.tuning.options import Distillation, TuneOptions
from edgeprompt.tuning.prepare import Run, prepare, read_tokenizer
from edgeprompt.tuning.question import Question, ask
from edgeprompt.tuning.runs import RunData, TuneResult, check_packages, closeness, make_loop, prompt_file, resume
from edgeprompt.tuning.soft_prompt import PREFIX_METHODS
from edgeprompt.tuning.teach import Taught, check_tokenizers, load_reader, teach, text_of_bos
from edgeprompt.tuning.teacher import CHUNK

_LOG = logging.getLogger("edgeprompt")
_EVAL_BATCHES = 2
_ONE_SIDED = 0.9
"""Share of one label among a teacher's answers from which on a note says so."""
_UNSHOWN = ("template", "prompt", "fingerprint", "add_special_tokens", "calibration")
"""What the file says of the teacher and the terminal does not."""
_INITS = ("text", "sampled", "clustered")
"""Starts from the instruction, where no other text is given."""


def distil(base: Any, data: DataSource, path: Path, options: TuneOptions, *, progress: bool) -> TuneResult:
    """Train a soft prompt that answers as a teacher does, and write it; see `edgeprompt.tuning.tune`.

    Raises:
        InputError: the instruction has no place for the text, or exceeds the context; or free text is to be balanced.
        DataError: a text is empty.
        BaseMismatchError: the teacher's prompt is of another base, or tokenizers differ where they must not.
        UnsupportedError: a base or a task that cannot be distilled.
        TuningError: the run was stopped; it goes on with the same command.
    """
    asked = options.distil
    assert asked is not None
    question = ask(data, options, asked)
    if asked.balance and question.facts.task != "classify":
        raise InputError("--balance-teacher is for labels, and the teacher answers in free text; leave it out")
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        own = asked.teacher is None
        if not own and asked.loss == "kl" and question.facts.task == "generate":
            check_tokenizers(base, asked.teacher)
        loaded = load_reader(base if own else asked.teacher)
        taught = teach(loaded, question, path, options, asked, progress=progress)
        with _kept(taught.answers.path):
            if not own:
                del loaded
                gc.collect()
                loaded = load_reader(base)
            options = _student_options(loaded, question, taught, options, asked)
            torch.manual_seed(options.seed)
            run = prepare(loaded, question.facts, options)
            objective, calls = _objective(run, taught, asked)
            run = replace(run, objective=objective)
            _start_from_instruction(run, taught)
            balance = _balance(run, taught, asked)
            found = _read_data(run, question, taught, balance)
            check_packages(run, found)
            loop, batches = make_loop(run, found, path)
            if options.resume is not None:
                resume(run, loop, options.resume)
        done = loop.run(show=progress)
        with loop.kept():
            prompt = prompt_file(run, loop, done, path, found, show=progress)
            figures = figures_of(run, found, taught, loop, show=progress)
    with loop.kept():
        checks = closeness(run, found)
        most = (figures.get("on") or [figures])[0].get("teacher_says_most")
        notes = []
        if most is not None and most["share"] >= _ONE_SIDED:
            notes.append(
                f"the teacher says {most['label']!r} of {most['share']:.0%} of the held-out texts, so agreement shows "
                "little; try another instruction, or other examples (--shots-seed)"
                + ("" if balance else ", or --balance-teacher where labels are about equally common")
            )
        prompt = replace(prompt, generation={**_generation(question, taught, asked), **prompt.generation})
        about = {
            **taught.about,
            "loss": calls,
            "texts": len(found.indices),
            "instruction_tokens": taught.tokens,
            "num_virtual_tokens": prompt.num_virtual_tokens,
            **({"calibration": list(balance)} if balance else {}),
            **figures,
        }
        if taught.hard is not None and run.weights.packages:
            timed = held_fields(run, found, question)
            about["first_token"] = [
                {
                    "precision": package.manifest.precision,
                    **measure_first_token(package.path, prompt, taught.hard, timed),
                }
                for package in run.weights.packages
            ]
        prompt = replace(prompt, distilled_from=about)
        if loop.accelerator.is_main_process:
            save_prompt(prompt, path)
            if options.adapter is not None:
                save_adapter(run.objective.model.soft.as_peft(run.loaded.model), options.adapter)
    loop.forget_checkpoint()
    loop.accelerator.wait_for_everyone()
    shown = {name: value for name, value in about.items() if name not in _UNSHOWN}
    return TuneResult(
        path=path,
        prompt=prompt,
        steps=done.step,
        best_step=done.best_step,
        metric=objective.metric,
        value=done.best.get(objective.metric),
        examples_per_second=done.step * batches.batch_size / done.seconds if done.seconds else 0.0,
        checks={"distilled": shown, **checks},
        notes=(f"learned: {calls}", *taught.notes, *found.notes, *notes),
    )


@contextmanager
def _kept(answers: Path) -> Iterator[None]:
    """Say where the teacher's answers lie, where a signal comes before the first step."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        where = f"before the first step; {str(answers)!r} keeps the teacher's answers, and the same command goes on"
        raise stopped(error, where) from error


def _student_options(
    loaded: Any, question: Question, taught: Taught, options: TuneOptions, asked: Distillation
) -> TuneOptions:
    """The options with the student's template, label words and start."""
    from edgeprompt.base.geometry import geometry_of, tokens_of

    template = options.template
    if template is None and question.prompt is not None:
        prompt, decoder = question.prompt, loaded.family.architecture == names.DECODER_ONLY
        deep = options.method in PREFIX_METHODS and not (prompt.is_infix and decoder)
        template = str(prompt.template.without_prompt() if deep else prompt.template)
    if template is None:
        assert question.template is not None
        chat = bos = None
        if asked.chat:
            tokenizer = read_tokenizer(loaded, geometry_of(loaded.config).vocab_size, chat=True)
            tokens = tokens_of(loaded.config, getattr(loaded.model, "generation_config", None), loaded.tokenizer)
            chat, bos = tokenizer.chat, text_of_bos(tokenizer, tokens.bos)
        plain = Template(tuple(part for part in question.template.parts if part != Slot(SHOTS)))
        template = str(make_instruction(plain, chat, bos).student)
    return replace(options, template=template, verbalizer=question.verbalizer, calibrate=False)


def _objective(run: Run, taught: Taught, asked: Distillation) -> tuple[Any, str]:
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
def _start_from_instruction(run: Run, taught: Taught) -> None:
    """Start the prompt as the instruction: its own embeddings, or its first keys and values."""
    options, soft = run.options, run.objective.model.soft
    if taught.template is None or options.init not in _INITS or options.init_text is not None:
        return
    words = "".join(part.text for part in taught.template.parts if not isinstance(part, Slot))  # type: ignore[union-attr]
    leads = soft.is_prefix and run.plan.template.prompt_is_prefix
    ids = run.tokenizer.encode(words, add_special_tokens=leads) or [0]
    count = soft.num_virtual_tokens
    ids = (ids * math.ceil(count / len(ids)))[: max(count, len(ids))]
    if soft.is_prefix:
        target = run.model.start_prefix(ids[:count])
        if target is None:
            return
        soft.start_from(target.float())
        if not options.projection and leads:
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


def _balance(run: Run, taught: Taught, asked: Distillation) -> tuple[float, ...]:
    """Each label's mean log-probability over the teacher's answers; none where the teacher stays as it is."""
    if not asked.balance:
        return ()
    total, count = np.zeros(len(run.plan.verbalizer)), 0
    for answer in taught.answers.read(LabelAnswer, CHUNK):
        total, count = total + answer.logprobs, count + 1
    mean = total / count
    return tuple(round(float(value), 6) for value in mean - mean.mean())


def _read_data(run: Run, question: Question, taught: Taught, balance: tuple[float, ...]) -> RunData:
    """The texts as examples, each with what the teacher said; `balance` is subtracted from its labels' scores."""
    options, objective = run.options, run.objective
    assert isinstance(objective, (DistilClassify, DistilGenerate, DistilText))
    encode: Any = objective.encode_answered
    kind: Any = LabelAnswer if run.plan.task == "classify" else TextAnswer
    first: list[dict[str, str]] = []
    silent: list[str] = []

    def encoded() -> Iterator[Any]:
        answers: Iterator[Any] = taught.answers.read(kind, CHUNK)
        if balance:
            answers = (one.without(balance) for one in answers)
        for number, (record, answer) in enumerate(zip(read_records(question.texts), answers, strict=True), 1):
            where = f"row {number} of {source_name(question.texts)!r}"
            if number <= GOLDEN_CANDIDATES:
                first.append(dict(objective.fields(record, where)))
            if isinstance(answer, TextAnswer) and not answer.text.strip():
                silent.append(where)
            yield encode(record, where, answer)

    examples = Examples(encoded())
    if len(silent) == len(examples):
        raise DataError("the teacher answers no text with a word; give another instruction, or another teacher")
    if silent:
        _LOG.warning(
            "note: the teacher answered %d of %d texts without a word, the first %s; the student learns that too",
            len(silent), len(examples), silent[0],
        )  # fmt: skip
    if options.eval_data is not None:
        indices, held = np.arange(question.count), np.arange(question.count, question.total)
    else:
        indices, held = split(examples.groups, options.eval_share(len(examples)), options.seed)
    held = sample(held, options.eval_limit, options.seed)
    size = texts_at_once(objective, options.batch_size * _EVAL_BATCHES)
    batches = list(sorted_batches(held, examples.lengths, size))
    return RunData(question.texts, examples, indices, examples, batches, first)


def _generation(question: Question, taught: Taught, asked: Distillation) -> Mapping[str, Any]:
    if question.prompt is not None:
        return dict(question.prompt.generation)
    return {"max_new_tokens": asked.max_new_tokens} if question.facts.task == "generate" else {}
