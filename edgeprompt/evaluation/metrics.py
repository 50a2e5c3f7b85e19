"""How well predictions match references, each figure with its standard error."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprompt.errors import DataError, InputError, MissingDependencyError
from edgeprompt.evaluation.words import bleu_tokenizer, plain, squad_words, tokenization, words_of

METRICS = ("accuracy", "f1", "exact-match", "rouge", "bleu", "mae")
_RESAMPLES = 200
_BLEU_RUN = 4
_NORMAL_95 = 1.96
"""Half the width of a 95 % interval in standard errors."""


@dataclass(frozen=True)
class LabelScore:
    """One label's precision, recall and F1 (0 to 1), and how many references carry it."""

    precision: float
    recall: float
    f1: float
    n: int


@dataclass(frozen=True)
class Score:
    """A metric over `n` examples. `value` and `standard_error` are fractions of 1, of "mae" in the labels' unit."""

    metric: str
    value: float
    standard_error: float
    n: int
    per_label: Mapping[str, LabelScore] = field(default_factory=dict)
    tokenizer: str = ""
    """How texts were cut for "rouge", "f1" of texts, and "bleu" (the name of sacrebleu's tokenizer); else empty."""


def score(
    metric: str, predictions: Sequence[Any], references: Sequence[Any], *, labels: bool = False, spans: bool = False
) -> Score:
    """Compare predictions with references.

    Args:
        metric: "accuracy" (equal labels), "f1" (macro average over labels; for texts the overlap of words, as SQuAD
            has it, mean over examples), "exact-match" (equal after trimming, in Unicode form NFC), "rouge" (ROUGE-L
            F-measure, mean over examples), "bleu" (of the corpus) or "mae" (mean absolute error of numbers).
        predictions: what was answered: texts, or frozensets of labels where an example may have several ("accuracy").
        references: what is right, in the same order: a text, or a tuple of texts that are all right. Of several the
            best counts, as in SQuAD's evaluation; BLEU takes them all as references.
        labels: whether both are labels of a classification, not free text.
        spans: whether texts answer questions: "exact-match" then leaves out case, punctuation and articles, as SQuAD's
            evaluation does.

    Raises:
        InputError: unknown metric, or one that does not fit: BLEU of references that all have less than four tokens.
        DataError: nothing to compare, or of different number.
        MissingDependencyError: the metric's library is not installed.

    Words are what stands between spaces; a script without spaces (Chinese, Japanese, Thai ...) is compared letter by
    letter, and `Score.tokenizer` says so. Texts without words are compared as they are. Mean metrics have the standard
    error of a mean; those of the whole set (macro F1, BLEU) that of a bootstrap over 200 resamples with a fixed seed.
    """
    if metric not in METRICS:
        raise InputError(f"metric {metric!r} is not one of {', '.join(METRICS)}")
    if len(predictions) != len(references) or not references:
        raise DataError(f"{len(predictions)} predictions and {len(references)} references cannot be compared")
    if metric == "accuracy" and not labels:
        raise InputError("accuracy is for labels; for texts use exact-match, f1, rouge or bleu")
    tokenizer = ""
    several = [truth if isinstance(truth, tuple) else (truth,) for truth in references]
    texts = [] if labels else [text for truth in several for text in truth]
    if metric == "bleu":
        tokenizer = bleu_tokenizer(texts)
        value, error = _bleu(predictions, several, tokenizer)
    elif metric == "f1" and labels:
        value, error = _macro_f1(predictions, references)
    else:
        each = _per_example(metric, labels, spans)
        tokenizer = tokenization(texts) if metric in ("rouge", "f1") and not labels else ""
        best = min if metric == "mae" else max
        pairs = zip(predictions, several, strict=True)
        value, error = _mean([best(each(guess, text) for text in _answers(truth, spans)) for guess, truth in pairs])
    table = _label_table(predictions, references) if labels else {}
    return Score(metric, value, error, len(references), table, tokenizer)


def default_metric(task: str) -> str:
    """What `eval` reports where nothing is asked for."""
    return {"classify": "accuracy", "tag": "accuracy", "qa": "f1"}.get(task, "rouge")


def _answers(truth: tuple[Any, ...], spans: bool) -> tuple[Any, ...]:
    """The answers that count: of a question those that have words, or one without, as SQuAD's evaluation has it."""
    return (tuple(text for text in truth if squad_words(text)) or ("",)) if spans else truth


def _per_example(metric: str, labels: bool, spans: bool) -> Callable[[Any, Any], float]:
    if labels:
        return lambda guess, truth: float(guess == truth)
    if metric == "mae":
        return _distance
    if metric == "rouge":
        return _rouge()
    if metric == "f1":
        return _word_f1 if spans else _text_f1
    if spans:
        return lambda guess, truth: float(squad_words(guess) == squad_words(truth))
    return lambda guess, truth: float(plain(guess) == plain(truth))


def _distance(guess: str, truth: str) -> float:
    try:
        return abs(float(guess) - float(truth))
    except ValueError as error:
        raise DataError(f"mae is for numbers; {guess!r} was answered where {truth!r} is right") from error


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (0 for a single value, whose spread is unknown)."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, math.sqrt(variance / n)


def _macro_f1(predictions: Sequence[str], references: Sequence[str]) -> tuple[float, float]:
    """Macro-averaged F1 and its standard error over resampled confusion matrices."""
    labels = {label: index for index, label in enumerate(sorted({*predictions, *references}))}
    counts = np.zeros((len(labels), len(labels)))
    for guess, truth in zip(predictions, references, strict=True):
        counts[labels[truth], labels[guess]] += 1
    draws = np.random.default_rng(0).multinomial(len(references), (counts / counts.sum()).ravel(), size=_RESAMPLES)
    spread = [_mean_f1(draw.reshape(counts.shape)) for draw in draws]
    return _mean_f1(counts), float(np.std(spread, ddof=1))


def _mean_f1(counts: npt.NDArray[Any]) -> float:
    """Mean F1 of the labels that occur in a confusion matrix [truth, guess]."""
    total = counts.sum(0) + counts.sum(1)
    seen = total > 0
    return float(np.mean(2 * np.diag(counts)[seen] / total[seen]))


def _bleu(predictions: Sequence[str], references: Sequence[tuple[str, ...]], tokenizer: str) -> tuple[float, float]:
    metric = _library("sacrebleu", "sacrebleu").BLEU(tokenize=tokenizer)
    guesses = [plain(text) for text in predictions]
    truths = [tuple(plain(text) for text in texts) for texts in references]
    if not any(len(metric.tokenizer(text).split()) >= _BLEU_RUN for texts in truths for text in texts):
        raise InputError(
            f"bleu counts runs of {_BLEU_RUN} tokens, and no reference has as many, so it is 0 whatever was answered; "
            "use rouge, f1 or exact-match"
        )
    # sacrebleu takes streams of references; None where an example has fewer
    streams = [list(stream) for stream in zip_longest(*truths)]
    found = metric.corpus_score(guesses, streams, n_bootstrap=_RESAMPLES)
    written = json.loads(found.format(width=6, signature=metric.get_signature().format(), is_json=True))
    half_width = written.get("confidence_var", 0.0)  # sacrebleu leaves it out where every resample scores 0
    return found.score / 100, half_width / 100 / _NORMAL_95


def _rouge() -> Callable[[str, str], float]:
    class Words:
        def tokenize(self, text: str) -> list[str]:
            return words_of(text)

    scorer = _library("rouge_score.rouge_scorer", "rouge-score").RougeScorer(["rougeL"], tokenizer=Words())

    def compare(guess: str, truth: str) -> float:
        if not words_of(guess) and not words_of(truth):  # punctuation alone
            return float(plain(guess) == plain(truth))
        return float(scorer.score(truth, guess)["rougeL"].fmeasure)

    return compare


def _word_f1(guess: str, truth: str) -> float:
    """Overlap of words (SQuAD's evaluation)."""
    guessed, true = squad_words(guess), squad_words(truth)
    if not guessed or not true:
        return float(guessed == true)
    common = sum((Counter(guessed) & Counter(true)).values())
    return 2 * common / (len(guessed) + len(true))


def _text_f1(guess: str, truth: str) -> float:
    """As `_word_f1`; texts without any word (punctuation, an article) are compared as they are."""
    if not squad_words(guess) and not squad_words(truth):
        return float(plain(guess) == plain(truth))
    return _word_f1(guess, truth)


def _label_table(predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, LabelScore]:
    right: Counter[str] = Counter()
    guessed: Counter[str] = Counter()
    true: Counter[str] = Counter()
    for guess, truth in zip(predictions, references, strict=True):
        several = (guess, truth) if isinstance(truth, frozenset) else ({guess}, {truth})
        guessed.update(several[0])
        true.update(several[1])
        right.update(several[0] & several[1])
    table = {}
    for label in sorted(set(guessed) | set(true)):
        hits, found, wanted = right[label], guessed[label], true[label]
        table[label] = LabelScore(
            precision=hits / found if found else 0.0,
            recall=hits / wanted if wanted else 0.0,
            f1=2 * hits / (found + wanted),
            n=wanted,
        )
    return table


def _library(module: str, package: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise MissingDependencyError(f"this metric needs {package}: pip install 'edgeprompt[eval]'") from error
