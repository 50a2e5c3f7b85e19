"""From an encoder's hidden states to answers: labels, spans, embeddings. Numpy only, one row at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgeprompt.arrays import require_finite, softmax
from edgeprompt.errors import InputError
from edgeprompt.heads.layers import Floats, apply_head, sigmoid
from edgeprompt.prompts.encoder_text import first_tokens, words_of
from edgeprompt.prompts.file import PromptFile
from edgeprompt.request import Answer, Classification, Span, Tagging

MAX_ANSWER_TOKENS = 30
"""Longest answer that question answering looks for."""
OUTSIDE = "O"


def pool(states: Floats, text: npt.NDArray[np.intp], how: str) -> Floats:
    """One vector of a text's states.

    Args:
        states: float32 `[sequence_length, hidden_size]`, the text's own positions, virtual ones included.
        text: Positions that hold no virtual token.
        how: "first", "first_text", "cls" (the same), "mean", "mean_all" or "last".

    Returns:
        float32 `[hidden_size]`.

    Raises:
        InputError: the text has no position.
        EdgePromptError: a value is NaN or infinite.
    """
    if how not in ("first", "mean_all") and not len(text):
        raise InputError("the text has no token, so there is nothing to pool; give at least one character")
    found: Floats
    match how:
        case "first":
            found = states[0]
        case "first_text" | "cls":
            found = states[text[0]]
        case "last":
            found = states[text[-1]]
        case _:
            found = (states if how == "mean_all" else states[text]).mean(0, dtype=np.float32)
    return require_finite(found)


def classify_head(prompt: PromptFile, vector: Floats) -> Classification:
    """Apply the prompt's head to a pooled vector `[hidden_size]`."""
    assert prompt.head_spec is not None
    values = apply_head(prompt.head_spec, prompt.head, vector[None])[0]
    labels = labels_of(prompt, len(values))
    logits = dict(zip(labels, values.tolist(), strict=True))
    match prompt.head_spec.problem_type:
        case "regression":
            return Classification(str(round(float(values[0]), 6)), {}, logits)
        case "multi_label":
            chances = sigmoid(values)
            chosen = tuple(label for label, chance in zip(labels, chances, strict=True) if chance > 0.5)
            best = labels[int(chances.argmax())]
            return Classification(best, dict(zip(labels, chances.tolist(), strict=True)), logits, labels=chosen)
    chances = softmax(values)
    return Classification(labels[int(chances.argmax())], dict(zip(labels, chances.tolist(), strict=True)), logits)


def labels_of(prompt: PromptFile, count: int) -> Sequence[str]:
    """The prompt's labels, or transformers' names for labels that nobody named."""
    return prompt.labels or tuple(f"LABEL_{index}" for index in range(count))


def token_logits(prompt: PromptFile, states: Floats, num_virtual_tokens: int) -> Floats:
    """The head's float32 `[sequence_length, num_labels]`, where row i answers for token i of the sequence."""
    assert prompt.head_spec is not None
    values = apply_head(prompt.head_spec, prompt.head, states)
    if prompt.head_spec.input == "tokens_unshifted":
        return np.concatenate([np.zeros_like(values[:num_virtual_tokens]), values[: len(values) - num_virtual_tokens]])
    return values


def tag(prompt: PromptFile, logits: Floats, offsets: Sequence[tuple[int, int] | None], text: str) -> Tagging:
    """Label every word by its first token, and join words to spans (BIO, IOB or plain labels).

    Args:
        prompt: Whose labels these are.
        logits: float32 `[sequence_length, num_labels]`.
        offsets: Characters of `text` that each token covers, None for others.
        text: The text.
    """
    chances = softmax(logits)
    labels = labels_of(prompt, logits.shape[1])
    words = []
    places = words_of(text)
    for (start, end), token in zip(places, first_tokens(places, offsets), strict=True):
        if token is not None:
            best = int(chances[token].argmax())
            words.append(Span(labels[best], start, end, text[start:end], float(chances[token, best])))
    return Tagging(join_words(words, text), tuple(words))


def join_words(words: Sequence[Span], text: str) -> tuple[Span, ...]:
    """Neighbouring words of one kind as one span; "B-" starts a new one, "O" belongs to none."""
    spans: list[list[Span]] = []
    open_kind = None
    for word in words:
        kind = word.label[2:] if word.label[:2] in ("B-", "I-") else word.label
        if word.label == OUTSIDE:
            open_kind = None
            continue
        if kind != open_kind or word.label.startswith("B-"):
            spans.append([])
        spans[-1].append(word)
        open_kind = kind
    return tuple(_joined(span, text) for span in spans)


def _joined(words: Sequence[Span], text: str) -> Span:
    first, start, end = words[0], words[0].start, words[-1].end
    kind = first.label[2:] if first.label[:2] in ("B-", "I-") else first.label
    return Span(kind, start, end, text[start:end], float(np.mean([word.score for word in words])))


def answer(
    logits: Floats, offsets: Sequence[tuple[int, int] | None], context: str, no_answer_at: int | None = None
) -> Answer:
    """The best span of the context.

    Args:
        logits: float32 `[sequence_length, 2]`: start and end scores of every token.
        offsets: Characters of `context` that each token covers, None for tokens of anything else.
        context: The text that holds the answer.
        no_answer_at: The token whose scores say that there is no answer (SQuAD 2); None: there always is one.

    Returns:
        The span with the largest sum of scores among those of at most `MAX_ANSWER_TOKENS` tokens; its `score` is the
        product of the start's and the end's probability over the context.
    """
    places: npt.NDArray[np.intp] = np.array([index for index, span in enumerate(offsets) if span is not None], np.intp)
    if not len(places):
        return Answer("", 0, 0, 0.0)
    start, end = logits[places, 0], logits[places, 1]
    best, first, last = -np.inf, 0, 0
    for width in range(min(MAX_ANSWER_TOKENS, len(places))):
        sums = start[: len(start) - width] + end[width:]
        at = int(sums.argmax())
        if sums[at] > best:
            best, first, last = float(sums[at]), at, at + width
    score = float(softmax(start)[first] * softmax(end)[last])
    if no_answer_at is not None and float(logits[no_answer_at].sum()) > best:
        return Answer("", 0, 0, 1 - score)
    low, high = offsets[places[first]], offsets[places[last]]
    assert low is not None
    assert high is not None
    found = context[low[0] : high[1]]
    begin = low[0] + len(found) - len(found.lstrip())  # byte-level tokens hold the space in front of their word
    return Answer(found.strip(), begin, begin + len(found.strip()), score)
