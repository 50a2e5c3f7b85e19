"""What clients may send, as JSON Schema: the document at `/openapi.json` shows these, and requests are checked by them.

Names and meanings are those of OpenAI's API. What it has and this server has not is refused wherever it would change
the answer; fields that change nothing (`user`, `metadata`) are accepted. Fields under "beyond OpenAI" are our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeprompt.request import POOLINGS
from edgeprompt.server.options import ServerOptions
from edgeprompt.server.schema import Schema

MAX_NEW_TOKENS = 1 << 20
TOP_LOGPROBS = 20
CHOICES = 16
"""Most of `n`."""
_MODEL = {
    "type": "string",
    "minLength": 1,
    "maxLength": 256,
    "description": "The base, or a prompt, as /v1/models lists them.",
}
_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1}}


def _text(limits: ServerOptions) -> dict[str, Any]:
    return {"type": "string", "maxLength": limits.max_text}


def _fields(limits: ServerOptions) -> dict[str, Any]:
    return {
        "type": "object",
        "minProperties": 1,
        "maxProperties": 16,
        "additionalProperties": _text(limits),
        "description": "Beyond OpenAI: the template's slots by name.",
    }


def _inputs(limits: ServerOptions) -> dict[str, Any]:
    """One text or several, as text, as token ids, or as fields of the template."""
    many = {"type": "array", "minItems": 1, "maxItems": limits.max_inputs}
    ids = {**_IDS, "maxItems": limits.max_text}
    kinds = (_text(limits), ids, _fields(limits))
    return {
        "anyOf": [_text(limits), *({**many, "items": kind} for kind in kinds), ids, _fields(limits)],
        "description": "a text, token ids, the template's slots by name, or a list of one of these",
    }


def _number(low: float | None = None, high: float | None = None, *, above: float | None = None) -> dict[str, Any]:
    found = {"minimum": low, "maximum": high, "exclusiveMinimum": above}
    return {"type": ["number", "null"], **{name: value for name, value in found.items() if value is not None}}


def _integer(low: int, high: int) -> dict[str, Any]:
    return {"type": ["integer", "null"], "minimum": low, "maximum": high}


def _only(*values: Any, why: str) -> dict[str, Any]:
    return {"enum": [*values, None], "description": why}


_BOOLEAN = {"type": ["boolean", "null"]}
_IGNORED = {"type": ["string", "null"], "maxLength": 512, "description": "Accepted, and changes nothing."}
_NOTHING: Schema = {"type": "null"}
_EMPTY = {"type": ["array", "null"], "maxItems": 0}
_NO_PENALTY = "this server has repetition_penalty instead"


def _generation(limits: ServerOptions) -> dict[str, Any]:
    """Fields that completions and chat share."""
    word = {"type": "string", "minLength": 1, "maxLength": 1000}
    return {
        "model": _MODEL,
        "max_tokens": _integer(1, MAX_NEW_TOKENS),
        "temperature": _number(0, 100) | {"description": "Without it the prompt's own, else 0: the likeliest token."},
        "top_p": _number(high=1, above=0),
        "n": _integer(1, CHOICES) | {"description": "Choices; with a seed, choice i has seed + i."},
        "seed": _integer(-(1 << 63), (1 << 63) - 1),
        "stop": {
            "anyOf": [word, {"type": "array", "maxItems": 16, "items": word}, {"type": "null"}],
            "description": "a text, a list of texts, or null",
        },
        "stream": _BOOLEAN,
        "stream_options": {
            "type": ["object", "null"],
            "properties": {"include_usage": _BOOLEAN, "include_obfuscation": _BOOLEAN},
            "additionalProperties": False,
        },
        "presence_penalty": _only(0, why=_NO_PENALTY),
        "frequency_penalty": _only(0, why=_NO_PENALTY),
        "logit_bias": {"type": ["object", "null"], "maxProperties": 0},
        "user": _IGNORED,
        "safety_identifier": _IGNORED,
        "prompt_cache_key": _IGNORED,
        # Beyond OpenAI, as vLLM and llama.cpp call them.
        "top_k": _integer(0, (1 << 31) - 1),
        "min_p": _number(0, 1),
        "repetition_penalty": _number(0.01, 100),
        "choices": {
            "type": ["array", "null"],
            "maxItems": 64,
            "items": word,
            "description": "Beyond OpenAI: answer with one of these texts and nothing else.",
        },
        "truncate": _BOOLEAN | {"description": "Beyond OpenAI: cut a text that exceeds the context."},
    }


def _object(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": [*required], "additionalProperties": False}


def completions(limits: ServerOptions) -> dict[str, Any]:
    """Body of /v1/completions."""
    return _object(
        {
            **_generation(limits),
            "prompt": _inputs(limits),
            "logprobs": _integer(0, TOP_LOGPROBS),
            "best_of": {**_integer(1, CHOICES), "description": "Only as large as n."},
            "echo": _only(False, why="the text is not given back"),
            "suffix": _only("", why="nothing is inserted before a suffix"),
        },
        "model",
        "prompt",
    )


def chat(limits: ServerOptions) -> dict[str, Any]:
    """Body of /v1/chat/completions."""
    part = _object(
        {"type": {"enum": ["text"], "description": "only text is read"}, "text": _text(limits)}, "type", "text"
    )
    content = {
        "anyOf": [_text(limits), {"type": "array", "minItems": 1, "maxItems": 64, "items": part}],
        "description": "a text, or a list of parts of type text",
    }
    roles = ["system", "developer", "user", "assistant"]
    message = _object(
        {
            "role": {"enum": roles, "description": "tools are not supported"},
            "content": content,
            "name": _IGNORED,
            # What else an answer has: clients send it back as it came.
            "refusal": _NOTHING,
            "audio": _NOTHING,
            "function_call": _NOTHING,
            "tool_calls": _EMPTY,
            "annotations": _EMPTY,
        },
        "role",
        "content",
    )
    return _object(
        {
            **_generation(limits),
            "messages": {"type": "array", "minItems": 1, "maxItems": limits.max_inputs, "items": message},
            "max_completion_tokens": _integer(1, MAX_NEW_TOKENS),
            "logprobs": _BOOLEAN,
            "top_logprobs": _integer(0, TOP_LOGPROBS),
            "response_format": {
                "type": ["object", "null"],
                "properties": {"type": {"enum": ["text"], "description": "use choices to constrain the answer"}},
                "required": ["type"],
                "additionalProperties": False,
            },
            "modalities": {"type": ["array", "null"], "items": {"enum": ["text"]}, "maxItems": 1},
            "tools": _EMPTY,
            "tool_choice": _only("none", "auto", why="tools are not supported"),
            "functions": _EMPTY,
            "function_call": _only("none", "auto", why="tools are not supported"),
            "audio": _NOTHING,
            "prediction": _NOTHING,
            "reasoning_effort": _NOTHING,
            "verbosity": _NOTHING,
            "web_search_options": _NOTHING,
            "parallel_tool_calls": _BOOLEAN,
            "store": _only(False, why="nothing is stored"),
            "metadata": {
                "type": ["object", "null"],
                "maxProperties": 16,
                "additionalProperties": {"type": "string", "maxLength": 512},
            },
            "service_tier": _only("auto", "default", why="there is one"),
        },
        "model",
        "messages",
    )


def embeddings(limits: ServerOptions) -> dict[str, Any]:
    """Body of /v1/embeddings."""
    return _object(
        {
            "model": _MODEL,
            "input": _inputs(limits),
            "encoding_format": {"enum": ["float", "base64", None], "description": "base64: little-endian float32"},
            "dimensions": {**_integer(1, 1 << 20), "description": "Only the model's own hidden size."},
            "user": _IGNORED,
            "pooling": {"enum": [*POOLINGS, None], "description": "Beyond OpenAI: how states of tokens become one."},
        },
        "model",
        "input",
    )


def classify(limits: ServerOptions) -> dict[str, Any]:
    """Body of /v1/classify."""
    return _object(
        {
            "model": _MODEL,
            "input": _inputs(limits),
            "truncate": _BOOLEAN | {"description": "Cut a text that exceeds the context, instead of refusing it."},
            "user": _IGNORED,
        },
        "model",
        "input",
    )


def tag(limits: ServerOptions) -> dict[str, Any]:
    """Body of /v1/tag."""
    return classify(limits)


def answer(limits: ServerOptions) -> dict[str, Any]:
    """Body of /v1/answer."""
    several = {"type": "array", "minItems": 1, "maxItems": limits.max_inputs, "items": _text(limits)}
    texts = {"anyOf": [_text(limits), several], "description": "a text, or a list of texts"}
    return _object(
        {
            "model": _MODEL,
            "question": texts,
            "context": texts,
            "truncate": _BOOLEAN | {"description": "Cut a context that is too long, instead of refusing it."},
            "user": _IGNORED,
        },
        "model",
        "question",
        "context",
    )
