"""Chat templates: messages to text by the rules of `transformers.PreTrainedTokenizer.apply_chat_template`.

Templates come with models, so they run in jinja's immutable sandbox, with the functions that transformers gives them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from edgeprompt.errors import InputError, MissingDependencyError, PackageError

ROLES = ("system", "user", "assistant", "tool", "developer")


def render_chat(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    specials: Mapping[str, str],
    add_generation_prompt: bool = True,
) -> str:
    """The text of a conversation.

    Args:
        source: The chat template.
        messages: Each with `role` and `content`.
        specials: Special tokens by name, as `bos_token`.
        add_generation_prompt: Whether the assistant's turn is opened at the end.

    Raises:
        InputError: a message has no role or content, or the template rejects the conversation (`raise_exception`).
        PackageError: the template is broken.
        MissingDependencyError: jinja2 is not installed.
    """
    turns = [_message(message) for message in messages]
    template = _compile(source)
    try:
        return str(
            template.render(
                messages=turns,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **specials,
            )
        )
    except _RefusedError as error:
        raise InputError(f"the chat template rejects the conversation: {error}") from error
    except Exception as error:  # what a template calls may raise anything: a macro that calls itself, for one
        raise PackageError(f"the chat template fails: {type(error).__name__}: {error}") from error


class _RefusedError(Exception):
    """What a template says with `raise_exception`."""


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, Mapping) else message
        raise InputError(f"a message has role {role!r}; allowed: {', '.join(ROLES)}")
    if not isinstance(message.get("content"), str):
        raise InputError(f"the content of a {message['role']} message is no string; give its text")
    return dict(message)


@lru_cache(maxsize=8)
def _compile(source: str) -> Any:
    try:
        import jinja2
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from jinja2.utils import Namespace
    except ImportError as error:
        raise MissingDependencyError("chat templates need jinja2: pip install 'edgeprompt[chat]'") from error

    class Generation(Extension):
        """`{% generation %}` marks what training learns from; here it is the text inside."""

        tags = {"generation"}  # noqa: RUF012  (jinja's own way)

        def parse(self, parser: Any) -> Any:
            """Keep the statements inside."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A call block, as in transformers: what is set inside does not leave it.
            return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

        def _inside(self, caller: Any) -> str:
            return str(caller())

    class Names(Namespace):
        """A namespace without underscore names, which could lead out of the sandbox."""

        def __init__(*args: Any, **values: Any) -> None:
            self, *rest = args
            found = dict(*rest, **values)
            for name in found:
                _check_name(name)
            Namespace.__init__(self, found)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespaces hold no underscore name, found {name!r}")

    def refuse(message: object) -> None:
        raise _RefusedError(str(message))

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": Names,
    }
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise PackageError(f"the chat template is broken: {error}") from error
