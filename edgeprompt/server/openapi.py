"""The document at `/openapi.json`: what requests are checked by, and what answers look like."""

from __future__ import annotations

from typing import Any

from edgeprompt.package.manifest import Manifest
from edgeprompt.server import bodies
from edgeprompt.server.options import ServerOptions

_TEXT, _INTEGER, _NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
_SCORES = {"type": "object", "additionalProperties": _NUMBER}


def _object(optional: dict[str, Any] | None = None, /, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {**properties, **(optional or {})}, "required": [*properties]}


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


_NULLABLE_TEXT = {"type": ["string", "null"]}
_ERROR = _object(error=_object(message=_TEXT, type=_TEXT, param=_NULLABLE_TEXT, code=_NULLABLE_TEXT))
_USAGE = _object({"completion_tokens": _INTEGER}, prompt_tokens=_INTEGER, total_tokens=_INTEGER)
_MODEL = _object(
    {
        "architecture": _TEXT,
        "parent": _TEXT,
        "task": _TEXT,
        "method": _TEXT,
        "labels": _list(_TEXT),
        "slots": _list(_TEXT),
    },
    id=_TEXT,
    object={"const": "model"},
    created=_INTEGER,
    owned_by=_TEXT,
)
_REASON = {"enum": ["stop", "length"]}
_TOKEN = {"token": _TEXT, "logprob": _NUMBER, "bytes": _list(_INTEGER)}
_CHAT_LOGPROBS = _object(content=_list(_object(**_TOKEN, top_logprobs=_list(_object(**_TOKEN)))))
_COMPLETION_LOGPROBS = _object(
    tokens=_list(_TEXT),
    token_logprobs=_list(_NUMBER),
    top_logprobs=_null(_list(_SCORES)),
    text_offset=_list(_INTEGER),
)


def _answer(kind: str, **fields: Any) -> dict[str, Any]:
    return _object(id=_TEXT, object={"const": kind}, created=_INTEGER, model=_TEXT, **fields, usage=_USAGE)


_COMPLETION = _answer(
    "text_completion",
    choices=_list(_object(index=_INTEGER, text=_TEXT, logprobs=_null(_COMPLETION_LOGPROBS), finish_reason=_REASON)),
)
_CHAT = _answer(
    "chat.completion",
    choices=_list(
        _object(
            index=_INTEGER,
            message=_object(role={"const": "assistant"}, content=_TEXT),
            logprobs=_null(_CHAT_LOGPROBS),
            finish_reason=_REASON,
        )
    ),
)
_EMBEDDINGS = _answer(
    "list",
    data=_list(
        _object(
            object={"const": "embedding"},
            index=_INTEGER,
            embedding={"anyOf": [_list(_NUMBER), _TEXT]},
        )
    ),
)
_CLASSES = _answer(
    "list",
    data=_list(_object(index=_INTEGER, label=_TEXT, labels=_list(_TEXT), scores=_SCORES, logits=_SCORES)),
)
_PLACE = {"start": _INTEGER, "end": _INTEGER, "score": _NUMBER}
_SPAN = _object(label=_TEXT, text=_TEXT, **_PLACE)
_TAGS = _answer("list", data=_list(_object(index=_INTEGER, spans=_list(_SPAN), words=_list(_SPAN))))
_FOUND = _answer("list", data=_list(_object(index=_INTEGER, answer=_TEXT, **_PLACE)))
_EVENT = _object(data={**_TEXT, "description": "A chunk of the answer as JSON, an error, or [DONE]."})
_SAID = {
    400: "The request cannot be answered; the error names the field.",
    401: "No key, or a wrong one.",
    403: "The Host header names another address than this server's.",
    404: "There is no such model, or its file cannot be served.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is not sent as application/json.",
    429: "The server is full; Retry-After says when to try again.",
    500: "The server failed.",
    503: "The server is stopping, or the prompt was replaced again and again; Retry-After says when to try again.",
    504: "The request took too long.",
}


def document(manifest: Manifest, options: ServerOptions) -> dict[str, Any]:
    """The document of a server."""
    paths = {
        "/v1/completions": _post("Continue texts.", bodies.completions(options), _COMPLETION, streams=True),
        "/v1/chat/completions": _post("Answer a conversation.", bodies.chat(options), _CHAT, streams=True),
        "/v1/embeddings": _post("Embed texts.", bodies.embeddings(options), _EMBEDDINGS),
        "/v1/classify": _post("Label texts, with a score for each label.", bodies.classify(options), _CLASSES),
        "/v1/tag": _post("Label the words of texts.", bodies.tag(options), _TAGS),
        "/v1/answer": _post("Find answers to questions in contexts.", bodies.answer(options), _FOUND),
        "/v1/models": _get(
            "The base, and every prompt.", _object(object={"const": "list"}, data=_list(_MODEL)), 401, 403, 503
        ),
        "/v1/models/{model}": {
            "get": {
                **_get("One of them.", _MODEL, 401, 403, 404, 503)["get"],
                "parameters": [{"name": "model", "in": "path", "required": True, "schema": {**_TEXT, "minLength": 1}}],
            }
        },
        "/health": _get("Whether the server takes requests.", _object(status=_TEXT), 403, keyed=False, stopping=True),
        "/openapi.json": _get("This document.", {"type": "object"}, 403, 503, keyed=False),
        "/metrics": {
            "get": {
                "summary": "For Prometheus.",
                "responses": {
                    "200": {"description": "Its text format.", "content": {"text/plain": {"schema": _TEXT}}},
                    **_errors(401, 403, 503),
                },
            }
        },
    }
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "edgeprompt",
            "version": "1",
            "description": f"{manifest.base.name} ({manifest.architecture}, {manifest.precision}) and its prompts.",
        },
        "paths": paths,
    }
    if options.api_keys:
        document["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        document["security"] = [{"key": []}]
    return document


def _post(summary: str, body: dict[str, Any], answer: dict[str, Any], *, streams: bool = False) -> dict[str, Any]:
    kinds: dict[str, Any] = {"application/json": {"schema": answer}}
    if streams:
        kinds["text/event-stream"] = {"schema": _EVENT}
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
            "responses": {"200": {"description": "The answer.", "content": kinds}, **_errors(*_SAID)},
        }
    }


def _get(
    summary: str, answer: dict[str, Any], *errors: int, keyed: bool = True, stopping: bool = False
) -> dict[str, Any]:
    found = {
        "200": {"description": "The answer.", "content": {"application/json": {"schema": answer}}},
        **_errors(*errors),
    }
    if stopping:
        found["503"] = {"description": _SAID[503], "content": {"application/json": {"schema": answer}}}
    return {"get": {"summary": summary, "responses": found, **({} if keyed else {"security": []})}}


def _errors(*statuses: int) -> dict[str, Any]:
    return {
        str(status): {"description": _SAID[status], "content": {"application/json": {"schema": _ERROR}}}
        for status in statuses
    }
