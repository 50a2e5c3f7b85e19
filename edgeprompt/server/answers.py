"""From the runtime's results to OpenAI's objects."""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeprompt.decoding.detokenizer import Detokenizer
from edgeprompt.request import Answer, Classification, Embedding, Generation, Span, Tagging
from edgeprompt.server.failures import Failure
from edgeprompt.server.questions import Question

REASONS = {"eos": "stop", "stop": "stop", "length": "length"}
Top = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Usage:
    """Tokens of a request; the text's count once, however many choices it has."""

    input_tokens: int
    output_tokens: int

    def as_json(self) -> dict[str, int]:
        """OpenAI's object."""
        total = self.input_tokens + self.output_tokens
        return {"prompt_tokens": self.input_tokens, "completion_tokens": self.output_tokens, "total_tokens": total}


def usage_of(results: Sequence[Generation | Classification], choices: int = 1) -> Usage:
    """What results took, `choices` of each text side by side."""
    read = sum(result.timings.input_tokens for result in results[::choices] if result.timings)
    return Usage(read, sum(len(result.token_ids) for result in results if isinstance(result, Generation)))


class TokenTexts:
    """Tokens of one choice as text, in order, with their log-probabilities in the form of an endpoint.

    A token that ends within a character has an empty text; the character stands at the token that completes it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], *, chat: bool, top: int) -> None:
        """`top`: how many of the most likely tokens are shown at each place."""
        self._text, self._chat, self._top = Detokenizer(decode), chat, top
        self._offset = 0

    def add(self, ids: Sequence[int], logprobs: Sequence[float], tops: Sequence[Top]) -> dict[str, Any]:
        """The `logprobs` object of more tokens."""
        rows = []
        for index, (token, logprob) in enumerate(zip(ids, logprobs, strict=True)):
            top = tops[index] if tops else ()
            others = [(self._text.would_add(other), _finite(chance)) for other, chance in top[: self._top]]
            rows.append((self._text.add(token), _finite(logprob), others))
        return self._of_chat(rows) if self._chat else self._of_completion(rows)

    def _of_chat(self, rows: Sequence[tuple[str, float, Sequence[tuple[str, float]]]]) -> dict[str, Any]:
        content = [{**_token(*row[:2]), "top_logprobs": [_token(*other) for other in row[2]]} for row in rows]
        return {"content": content, "refusal": None}

    def _of_completion(self, rows: Sequence[tuple[str, float, Sequence[tuple[str, float]]]]) -> dict[str, Any]:
        offsets = []
        for text, _, _ in rows:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": [text for text, _, _ in rows],
            "token_logprobs": [logprob for _, logprob, _ in rows],
            "top_logprobs": [dict(reversed(others)) for _, _, others in rows] if self._top else None,
            "text_offset": offsets,
        }


def generation_choice(
    index: int, result: Generation, decode: Callable[[Sequence[int]], str], top: int | None, *, chat: bool
) -> dict[str, Any]:
    """One of `choices`."""
    logprobs = None
    if top is not None:
        logprobs = TokenTexts(decode, chat=chat, top=top).add(result.token_ids, result.logprobs, result.top_logprobs)
    said: dict[str, Any] = {"text": result.text}
    if chat:
        said = {"message": {"role": "assistant", "content": result.text, "refusal": None}}
    return {"index": index, **said, "logprobs": logprobs, "finish_reason": REASONS[result.finish_reason]}


def envelope(kind: str, identity: str, model: str, **fields: Any) -> dict[str, Any]:
    """What every answer has around it."""
    return {"id": identity, "object": kind, "created": int(time.time()), "model": model, **fields}


def classifications(question: Question, results: Sequence[Classification], identity: str) -> dict[str, Any]:
    """The answer of /v1/classify."""
    data = [
        {
            "index": index,
            "label": result.label,
            "labels": [*result.labels],
            "scores": {label: _finite(score) for label, score in result.scores.items()},
            "logits": {label: _finite(score) for label, score in result.logits.items()},
        }
        for index, result in enumerate(results)
    ]
    return envelope("list", identity, question.model, data=data, usage=usage_of(results).as_json())


def taggings(question: Question, results: Sequence[Tagging], tokens: int, identity: str) -> dict[str, Any]:
    """The answer of /v1/tag."""
    data = [
        {"index": index, "spans": [_span(one) for one in result.spans], "words": [_span(one) for one in result.words]}
        for index, result in enumerate(results)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return envelope("list", identity, question.model, data=data, usage=usage)


def found_answers(question: Question, results: Sequence[Answer], tokens: int, identity: str) -> dict[str, Any]:
    """The answer of /v1/answer."""
    data = [
        {"index": index, "answer": one.text, "start": one.start, "end": one.end, "score": _finite(one.score)}
        for index, one in enumerate(results)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return envelope("list", identity, question.model, data=data, usage=usage)


def _span(span: Span) -> dict[str, Any]:
    return {
        "label": span.label,
        "start": span.start,
        "end": span.end,
        "text": span.text,
        "score": _finite(span.score),
    }


def embeddings(question: Question, results: Sequence[Embedding], tokens: int, identity: str) -> dict[str, Any]:
    """The answer of /v1/embeddings.

    Raises:
        Failure: 400, where another size is asked for than the model has.
    """
    size = results[0].shape[-1]
    if question.dimensions not in (None, size):
        message = f"dimensions is {question.dimensions}; this model has {size}, and does not shorten"
        raise Failure(400, message, code="unsupported", param="dimensions")
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(result, question.base64)}
        for index, result in enumerate(results)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return envelope("list", identity, question.model, data=data, usage=usage)


def _vector(vector: Embedding, encoded: bool) -> str | list[float]:
    if encoded:
        return base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode()
    return [float(value) for value in vector]


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _finite(value: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for a token that cannot come."""
    return math.copysign(9999.0, value) if math.isinf(value) else float(value)
