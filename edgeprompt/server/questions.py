"""From the body of a request to what the runtime is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgeprompt.package import strict_json
from edgeprompt.request import GenerationOptions, Request
from edgeprompt.server.failures import INVALID, Failure
from edgeprompt.server.options import ServerOptions
from edgeprompt.server.schema import Schema, SchemaError, check

SEEDS = 1 << 64


@dataclass(frozen=True)
class Question:
    """What a client asked: requests for the runtime, and how it wants the answers."""

    model: str
    requests: list[Request]
    stream: bool = False
    include_usage: bool = False
    top_logprobs: int | None = None
    """None: no log-probabilities."""
    base64: bool = False
    dimensions: int | None = None


def read_body(data: bytes, schema: Schema) -> dict[str, Any]:
    """A body as JSON that fits the schema; fields that are null are left out.

    Raises:
        Failure: 400, and which field is wrong.
    """
    try:
        body = strict_json.loads(data)
        if rb"\u" in data:
            _check_text(body)
        check(schema, body)
    except SchemaError as error:
        raise Failure(400, str(error), code="invalid_value", param=error.where or None) from error
    except (ValueError, RecursionError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise Failure(400, f"the body is no JSON: {reason}", code="invalid_json") from error
    return {name: value for name, value in body.items() if value is not None}


def completion(body: Mapping[str, Any], base: str, limits: ServerOptions) -> Question:
    """A question to /v1/completions.

    Raises:
        Failure: 400.
    """
    if body.get("best_of", 1) > body.get("n", 1):
        raise Failure(400, "best_of is larger than n; all choices are given back", INVALID, "unsupported", "best_of")
    asked = [Request(**one, task="generate", **_shared(body, base, limits)) for one in _texts(body["prompt"])]
    return _question(body, asked, body.get("logprobs"), limits)


def chat(body: Mapping[str, Any], base: str, limits: ServerOptions) -> Question:
    """A question to /v1/chat/completions.

    Raises:
        Failure: 400.
    """
    top = body.get("top_logprobs", 0)
    if top and not body.get("logprobs"):
        raise Failure(400, "top_logprobs needs logprobs: true", INVALID, "invalid_value", "top_logprobs")
    messages = [{"role": one["role"], "content": _content(one["content"])} for one in body["messages"]]
    if sum(len(one["content"]) for one in messages) > limits.max_text:
        message = f"the conversation has more than {limits.max_text} characters"
        raise Failure(400, message, INVALID, "text_too_long", "messages")
    request = Request(messages=messages, task="generate", **_shared(body, base, limits))
    return _question(body, [request], int(top) if body.get("logprobs") else None, limits)


def embedding(body: Mapping[str, Any], base: str, limits: ServerOptions) -> Question:
    """A question to /v1/embeddings."""
    prompt = _prompt(body, base)
    asked = [
        Request(**one, prompt=prompt, task="embed", pooling=body.get("pooling"), timeout=limits.timeout)
        for one in _texts(body["input"])
    ]
    dimensions = body.get("dimensions")
    return Question(
        body["model"],
        asked,
        base64=body.get("encoding_format") == "base64",
        dimensions=None if dimensions is None else int(dimensions),
    )


def labelling(body: Mapping[str, Any], base: str, limits: ServerOptions, task: str) -> Question:
    """A question to /v1/classify or /v1/tag, whose `task` is "classify" or "tag"."""
    return _plain(body, base, limits, task, _texts(body["input"]))


def answering(body: Mapping[str, Any], base: str, limits: ServerOptions, slots: tuple[str, str]) -> Question:
    """A question to /v1/answer.

    Args:
        body: what was sent.
        base: the base's name.
        limits: the server's.
        slots: of the prompt's template, for the question and its context.

    Raises:
        Failure: 400, where there are not as many questions as contexts.
    """
    asked, contexts = ([one] if isinstance(one, str) else one for one in (body["question"], body["context"]))
    if len(asked) != len(contexts) or isinstance(body["question"], str) != isinstance(body["context"], str):
        message = f"{len(asked)} questions and {len(contexts)} contexts; give one of each, or lists of the same length"
        raise Failure(400, message, INVALID, "invalid_value", "context")
    texts = [{"text": dict(zip(slots, pair, strict=True))} for pair in zip(asked, contexts, strict=True)]
    return _plain(body, base, limits, "qa", texts)


def _plain(
    body: Mapping[str, Any], base: str, limits: ServerOptions, task: str, texts: Sequence[Mapping[str, Any]]
) -> Question:
    """Requests without options."""
    prompt, truncate = _prompt(body, base), body.get("truncate", False)
    asked = [Request(**one, prompt=prompt, task=task, truncate=truncate, timeout=limits.timeout) for one in texts]
    return Question(body["model"], asked)


def _shared(body: Mapping[str, Any], base: str, limits: ServerOptions) -> dict[str, Any]:
    """The fields of a `Request` that completions and chat share."""
    length = body.get("max_completion_tokens", body.get("max_tokens"))
    stop = body.get("stop", ())
    logprobs = body.get("logprobs", False)
    options = GenerationOptions(
        max_new_tokens=None if length is None else int(length),
        seed=int(body["seed"]) % SEEDS if "seed" in body else None,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        logprobs=logprobs is not False,
        top_logprobs=int(body.get("top_logprobs", 0) if isinstance(logprobs, bool) else logprobs),
        choices=tuple(body["choices"]) if "choices" in body else None,
        top_k=int(body["top_k"]) if "top_k" in body else None,
        **{name: body[name] for name in ("temperature", "top_p", "min_p", "repetition_penalty") if name in body},
    )
    return {
        "prompt": _prompt(body, base),
        "options": options,
        "truncate": body.get("truncate", False),
        "timeout": limits.timeout,
    }


def _question(body: Mapping[str, Any], asked: Sequence[Request], top: int | None, limits: ServerOptions) -> Question:
    """`n` choices of each, those of one text side by side.

    Raises:
        Failure: 400, where these are too many.
    """
    count = int(body.get("n", 1))
    if count * len(asked) > limits.max_inputs:
        message = f"{len(asked)} texts with {count} choices each; at most {limits.max_inputs} answers at once"
        raise Failure(400, message, INVALID, "too_many", "n")
    return Question(
        body["model"],
        [_choice(request, index) for request in asked for index in range(count)],
        stream=bool(body.get("stream")),
        include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
        top_logprobs=None if top is None else int(top),
    )


def _choice(request: Request, index: int) -> Request:
    """Choice `index` of a request: with a seed, that seed further, so that choices differ and can be had again."""
    seed = request.options.seed
    if seed is None or index == 0:
        return request
    return replace(request, options=replace(request.options, seed=(seed + index) % SEEDS))


def _prompt(body: Mapping[str, Any], base: str) -> str | None:
    return None if body["model"] == base else body["model"]


def _texts(value: Any) -> list[dict[str, Any]]:
    """`text` or `input_ids` of each text."""
    several = isinstance(value, list) and not _is_integer(value[0])
    return [
        {"input_ids": [int(token) for token in one]} if isinstance(one, list) else {"text": one}
        for one in (value if several else [value])
    ]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _content(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _check_text(value: Any) -> None:
    """Refuse half of a surrogate pair, which no UTF-8 can hold, wherever it stands.

    Raises:
        ValueError: there is one.
    """
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, str) and any("\ud800" <= char <= "\udfff" for char in one):
            raise ValueError(r"a text holds half of a surrogate pair (\ud800 to \udfff)")
        if isinstance(one, list):
            todo += one
        elif isinstance(one, dict):
            todo += [*one, *one.values()]
