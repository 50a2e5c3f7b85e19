"""Classification by label words: what a text's continuation says about its label.

The formula, the same here and in tuning. With the label words ``w`` of a label, each of tokens ``w_1 ... w_k``::

    log p(w)     = sum_t log p(w_t | prompt, text, w_1 ... w_(t-1))      over the whole vocabulary
    score(label) = aggregation over the label's words of log p(w)
    P(label)     = softmax over the labels of (score - calibration)

The aggregation is "sum": logsumexp, so that the words' probabilities add up; "mean": the mean of the
log-probabilities, as OpenPrompt's verbalizers take it; or "max": the best word alone.

`Classification.logits` holds `score`, `Classification.scores` holds `P`. `calibration` is the content-free prior of
Zhao et al. 2021, "Calibrate Before Use": log of the mean P over texts without content.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgeprompt.arrays import softmax
from edgeprompt.errors import TemplateError
from edgeprompt.package.tokenizer import UnreadableTextError, naming
from edgeprompt.prompts.template import Literal, Mask, Template
from edgeprompt.request import Classification

AGGREGATIONS = ("sum", "mean", "max")
CONTENT_FREE = ("", "N/A", "[MASK]")

ANCHORS = (".", "a", "\n")
"""What a word is encoded behind where the text's own end is not known, or the tokenizer joins it with the word."""

Floats = npt.NDArray[np.float64]
Encode = Callable[[str], Sequence[int]]


def ids_behind(encode: Encode, text: str, word: str) -> list[int]:
    """Ids of a word as it stands behind a text.

    The rule: encode text and word together; what follows the text's own ids is the word. Some tokenizers put a space
    in front of whatever they encode (Llama 2), so that a word encoded alone has tokens that no text contains. Where the
    tokenizer joins the text's end with the word, or the end is not known or has no tokens alone (a line break that is
    cut off), the first of `ANCHORS` that it does not join stands in front of the text, or for it; where it joins all of
    them, the word is encoded alone.

    Args:
        encode: text to ids, without special tokens.
        text: the end of the text; empty where it is not known.
        word: the word, a leading space included.
    """
    for before in (text, *(anchor + text for anchor in ANCHORS), *ANCHORS) if text else ANCHORS:
        start, whole = list(encode(before)), list(encode(before + word))
        if start and len(whole) > len(start) and whole[: len(start)] == start:
            return whole[len(start) :]
    return list(encode(word))


def ids_alone(encode: Encode, word: str) -> list[int]:
    """Ids of a word that is a text of its own, as an encoder-decoder's answer.

    Where the tokenizer puts a space in front of every text, the word's own leading space is that one, not a second: the
    rest of the word has the tokens then that the word has inside a text.
    """
    bare = list(encode(word[1:])) if word[:1] == " " else []
    return bare if bare and bare == ids_behind(encode, "", word) else list(encode(word))


def text_before_words(template: Template) -> str:
    """The literal that label words stand behind (at the mask, or at the template's end); empty where it is a slot."""
    parts = template.parts
    end = next((place for place, part in enumerate(parts) if isinstance(part, Mask)), len(parts))
    last = parts[end - 1] if end else None
    return last.text if isinstance(last, Literal) else ""


@dataclass
class Node:
    """A node of the tree of words: the words that begin with the tokens on the way here."""

    children: dict[int, Node] = field(default_factory=dict)
    words: list[int] = field(default_factory=list)
    """Words that end here, by index."""


def word_tree(words: Sequence[Sequence[int]]) -> Node:
    """The tree over token ids; every inner node needs one row of logits, so shared beginnings cost once."""
    root = Node()
    for index, ids in enumerate(words):
        node = root
        for token in ids:
            node = node.children.setdefault(token, Node())
        node.words.append(index)
    return root


@dataclass(frozen=True)
class Verbalizer:
    """Labels and the token ids of their words."""

    labels: tuple[str, ...]
    words: tuple[tuple[int, ...], ...]
    """Token ids of every word."""
    owner: tuple[int, ...]
    """Index of each word's label."""
    calibration: tuple[float, ...] = ()
    aggregation: str = "sum"
    """What makes a label's score of its words' (`AGGREGATIONS`)."""

    @staticmethod
    def compile(
        verbalizer: Mapping[str, Sequence[str]],
        encode: Encode,
        calibration: Sequence[float] = (),
        aggregation: str = "sum",
        behind: str | None = None,
    ) -> Verbalizer:
        """Tokenise the label words, exactly as written (a leading space counts), without special tokens.

        `behind` is the text that they stand behind (`ids_behind`); None where they begin a text of their own, as an
        encoder-decoder's answer does.

        Raises:
            TemplateError: fewer than two labels, a word without tokens, or one word for two labels.
        """
        if len(verbalizer) < 2:
            raise TemplateError(f"a verbalizer needs at least two labels, found {list(verbalizer)}")
        try:
            encode(behind or "")
        except UnreadableTextError as error:
            raise TemplateError(f"{behind!r} of the template {error.reason}") from error
        words: dict[tuple[int, ...], int] = {}
        for owner, (label, texts) in enumerate(verbalizer.items()):
            for text in texts:
                with naming(f"label word {text!r} of label {label!r}"):
                    encode(text)
                ids = tuple(ids_alone(encode, text) if behind is None or not text else ids_behind(encode, behind, text))
                if not ids:
                    raise TemplateError(f"label word {text!r} of label {label!r} has no tokens")
                if words.setdefault(ids, owner) != owner:
                    other = list(verbalizer)[words[ids]]
                    raise TemplateError(f"labels {other!r} and {label!r} share the label word {text!r}; change one")
        return Verbalizer(tuple(verbalizer), tuple(words), tuple(words.values()), tuple(calibration), aggregation)

    def scores(self, word_logprobs: npt.ArrayLike) -> Floats:
        """float64 [num_labels]: `score(label)` from the log-probability of every word."""
        values, owner = np.asarray(word_logprobs, np.float64), np.asarray(self.owner)
        if self.aggregation == "mean":
            total = np.bincount(owner, values, len(self.labels)).astype(np.float64)
            mean: Floats = total / np.bincount(owner, minlength=len(self.labels))
            return mean
        found = np.full(len(self.labels), -np.inf)
        join = np.maximum if self.aggregation == "max" else np.logaddexp
        join.at(found, owner, values)
        return found

    def classification(self, word_logprobs: npt.ArrayLike) -> Classification:
        """The decision, with probabilities and raw scores."""
        raw = self.scores(word_logprobs)
        chance = softmax(raw - np.asarray(self.calibration) if self.calibration else raw)
        return Classification(
            label=self.labels[int(chance.argmax())],
            scores=dict(zip(self.labels, chance.tolist(), strict=True)),
            logits=dict(zip(self.labels, raw.tolist(), strict=True)),
        )


def contextual_calibration(raw_scores: npt.ArrayLike) -> tuple[float, ...]:
    """Calibration values from the raw scores [texts, num_labels] of content-free texts: log of the mean P(label)."""
    mean = softmax(np.asarray(raw_scores, np.float64)).mean(axis=0)
    return tuple(float(value) for value in np.log(np.maximum(mean, 1e-12)))
