"""The package's tokenizer: `tokenizer.json`, run by the tokenizers library."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from edgeprompt import names
from edgeprompt.errors import InputError, PackageError, UnsupportedError
from edgeprompt.package.files import fingerprint_tokenizer, read_regular

MAX_BYTES = 256 << 20
"""Of each of a tokenizer's files; the largest of a public base has 34 MB."""


class UnreadableTextError(InputError):
    """A text that has no ids here."""

    def __init__(self, reason: str, what: str = "the text") -> None:
        super().__init__(f"{what} {reason}")
        self.reason = reason


@contextmanager
def naming(what: str) -> Iterator[None]:
    """While inside, a text that has no ids is called `what` in the message, not "the text"."""
    try:
        yield
    except UnreadableTextError as error:
        raise UnreadableTextError(error.reason, what) from error


class Tokenizer:
    """Text to ids and back. Safe to use from several threads."""

    def __init__(self, folder: str | os.PathLike[str], vocab_size: int | None = None) -> None:
        """Read `tokenizer.json` and `tokenizer_config.json` of a package.

        Args:
            folder: Where they lie.
            vocab_size: Rows of the base's embedding. Ids from there on are virtual tokens, so a text that has one would
                read a prompt's rows, perhaps another task's: it is refused. None: the vocabulary is taken as it is.

        Raises:
            PackageError: a file is missing or broken.
        """
        self._folder, self._vocab_size = Path(folder), vocab_size
        try:
            data = read_regular(self._folder / names.TOKENIZER, MAX_BYTES)
            self.sha256 = hashlib.sha256(data).hexdigest()
            """Of `tokenizer.json`, as it lies there."""
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
            config = self._folder / names.TOKENIZER_CONFIG
            self._config: dict[str, Any] = json.loads(read_regular(config, MAX_BYTES)) if config.exists() else {}
        except (OSError, ValueError, TypeError, Exception) as error:  # tokenizers raises bare Exception
            reason = getattr(error, "strerror", None) or error
            raise PackageError(f"cannot read the tokenizer in {str(folder)!r}: {reason}") from error
        self._letters: dict[int, str] = {}
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    @cached_property
    def fingerprint(self) -> str:
        """What prompts name: of vocabulary and rules, however they are written down (slow: it parses them)."""
        return fingerprint_tokenizer(read_regular(self._folder / names.TOKENIZER, MAX_BYTES))

    @property
    def mask_token(self) -> str | None:
        """The mask token's text, None where there is none."""
        return self._special("mask_token")

    def _special(self, name: str) -> str | None:
        value = self._config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        return content if isinstance(content, str) else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`.

        Raises:
            InputError: the text is no Unicode text, or has a token that the base has no embedding for.
        """
        return self._checked(self._encoding(text, add_special_tokens=add_special_tokens))

    def _checked(self, encoding: tokenizers.Encoding) -> list[int]:
        """The ids, all of them the base's own; every encoding of text comes through here."""
        ids = list(encoding.ids)
        if self._vocab_size is not None and ids and max(ids) >= self._vocab_size:
            place = ids.index(max(ids))
            raise UnreadableTextError(
                f"has the token {encoding.tokens[place]!r}, which has id {ids[place]} in this tokenizer, and "
                f"the base has embeddings for {self._vocab_size} tokens; remove it there, or resize the base's "
                "embeddings to its tokenizer and export it again"
            )
        return ids

    def _encoding(self, text: str, pair: str | None = None, *, add_special_tokens: bool) -> tokenizers.Encoding:
        try:
            return self._tokenizer.encode(text, pair, add_special_tokens=add_special_tokens)
        except TypeError as error:  # what tokenizers says of a string that UTF-8 cannot hold
            raise UnreadableTextError(
                "is no Unicode text: it holds half of a surrogate pair (U+D800 to U+DFFF); read it as UTF-8"
            ) from error

    def encode_with_offsets(
        self, text: str, *, add_special_tokens: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of `text`, and for each the characters it covers ((0, 0) for special tokens)."""
        encoding = self._encoding(text, add_special_tokens=add_special_tokens)
        return self._checked(encoding), [(int(start), int(end)) for start, end in encoding.offsets]

    def encode_pair(
        self, first: str, second: str, *, add_special_tokens: bool = True
    ) -> tuple[list[int], list[tuple[int, int]], list[int], list[int | None]]:
        """Two texts joined the tokenizer's way: ids, characters covered, segments, and which text (None: special)."""
        found = self._encoding(first, second, add_special_tokens=add_special_tokens)
        offsets = [(int(start), int(end)) for start, end in found.offsets]
        return self._checked(found), offsets, list(found.type_ids), list(found.sequence_ids)

    def truncate(self, text: str, count: int) -> str:
        """The longest prefix of `text` whose tokens number at most `count`, cut at a token's border."""
        offsets = self._encoding(text, add_special_tokens=False).offsets
        return text if len(offsets) <= count else text[: offsets[count - 1][1]] if count else ""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def letters(self, ids: Sequence[int]) -> list[str]:
        """Of each token, its letters and digits in lower case: what stays of a text when it is written otherwise."""
        for token in {*ids} - self._letters.keys():
            self._letters[token] = "".join(filter(str.isalnum, self.decode([token]).casefold()))
        return [self._letters[token] for token in ids]

    def token_to_id(self, token: str) -> int | None:
        """Id of one token, None if it is not in the vocabulary."""
        found = self._tokenizer.token_to_id(token)
        return None if found is None else int(found)

    def chat(self, messages: str | Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model reads, as `apply_chat_template(tokenize=False)` gives it.

        Args:
            messages: Each with `role` and `content`; a string is the one message of a user.
            add_generation_prompt: Whether the assistant's turn is opened at the end.

        Raises:
            UnsupportedError: the package has no chat template.
            InputError: a message is broken, or the template rejects the conversation.
            PackageError: the template is broken.
            MissingDependencyError: jinja2 is not installed.
        """
        from edgeprompt.package.chat import render_chat

        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return render_chat(
            self._chat_template, turns, specials=self._specials, add_generation_prompt=add_generation_prompt
        )

    @cached_property
    def _chat_template(self) -> str:
        file = self._folder / names.CHAT_TEMPLATE
        try:
            source = read_regular(file, MAX_BYTES).decode() if file.exists() else self._config.get("chat_template")
        except (OSError, UnicodeDecodeError) as error:
            raise PackageError(f"cannot read the chat template {str(file)!r}: {error}") from error
        if isinstance(source, list):  # older configs: several by name
            by_name = {str(one.get("name")): one.get("template") for one in source if isinstance(one, Mapping)}
            if by_name and "default" not in by_name:
                raise UnsupportedError(
                    f"the package has chat templates named {', '.join(sorted(by_name))}, and none named default, which "
                    "chat uses; leave out chat"
                )
            source = by_name.get("default")
        if not isinstance(source, str):
            raise UnsupportedError("the package has no chat template; leave out chat")
        return source

    @cached_property
    def _specials(self) -> dict[str, str]:
        """Special tokens by name; one that the tokenizer does not have is not defined in a template."""
        named = [name for name in self._config if name.endswith("_token")]
        return {name: text for name in named if (text := self._special(name)) is not None}
