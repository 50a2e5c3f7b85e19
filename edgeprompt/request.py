"""What goes into a runtime and what comes out."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from edgeprompt.errors import InputError

Text: TypeAlias = str | Mapping[str, str]
"""A string fills the template's `{text}`; a mapping fills slots by name."""
Ids: TypeAlias = Sequence[int]
"""Token ids of one text."""
Message: TypeAlias = Mapping[str, str]
"""A turn of a conversation: its `role` ("system", "user" or "assistant") and its `content`."""
POOLINGS = ("mean", "cls", "last")


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate. None takes the prompt file's default, then the library's (greedy, 64 new tokens)."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    """0 is greedy."""
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    num_beams: int = 1
    """Encoder-decoder only."""
    top_logprobs: int = 0
    """At each place, also the log-probabilities of so many of the most likely tokens; implies `logprobs`."""
    choices: tuple[str, ...] | None = None
    """Answer with one of these texts and nothing else; None: anything."""
    drafts: bool | None = None
    """Decoders: check tokens that the answer may copy from the text several at a time; None takes
    `EngineOptions.drafts`."""

    def __post_init__(self) -> None:
        """Check what is used as it is; ranges are checked with the request.

        Raises:
            InputError: a value is of a wrong type.
        """
        check_flag("logprobs", self.logprobs)
        check_flag("drafts", self.drafts)
        if not isinstance(self.num_beams, int | np.integer):
            raise InputError(f"num_beams is {self.num_beams!r}; it must be an integer between 1 and 64")
        for name in ("stop", "choices"):
            if not isinstance(getattr(self, name), str | list | tuple | None):
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be a list of texts")


@dataclass(frozen=True)
class Request:
    """One sequence of a batch. Give `text`, or `input_ids` (all token ids but the prompt's virtual tokens)."""

    text: Text = ""
    prompt: str | None = None
    input_ids: Sequence[int] | None = None
    task: str | None = None
    """"classify", "generate", "tag", "qa", "embed" or "logits"; None takes the prompt's task, or the base's default:
    "generate", on an encoder "embed"."""
    options: GenerationOptions = field(default_factory=GenerationOptions)
    chat: bool = False
    """Wrap the text in the package's chat template."""
    timeout: float | None = None
    """Seconds after which the request fails with RequestTimeoutError."""
    truncate: bool = False
    """If the request exceeds the context: True cuts the text, False rejects the request."""
    messages: Sequence[Message] = ()
    """A conversation instead of `text`, for the package's chat template. Its last turn, the user's, fills the prompt's
    template."""
    pooling: str | None = None
    """For "embed": "mean", "cls" or "last"; None takes the package's default."""

    def __post_init__(self) -> None:
        """Check what every engine relies on.

        Raises:
            InputError: `prompt` or `task` is no name, `input_ids` no integers or beside a text, `options` no
                GenerationOptions, `chat` or `truncate` neither True nor False, `timeout` no number of seconds from 0
                on, `pooling` no known one, or `messages` no conversation.
        """
        if not isinstance(self.prompt, str | None):
            raise InputError(f"prompt is {self.prompt!r}; give the name of a prompt, or None")
        if not isinstance(self.task, str | None):
            raise InputError(f"task is {self.task!r}; give its name, or None")
        check_flag("chat", self.chat)
        check_flag("truncate", self.truncate)
        if self.input_ids is not None:
            given = items_of(self.input_ids, "input_ids must be integers, in a list")
            try:
                ids = tuple(operator.index(token) for token in given)
            except TypeError as error:
                raise InputError(f"input_ids must be integers ({error})") from error
            if any(isinstance(token, bool) for token in given):
                raise InputError("input_ids must be integers, found True or False (a mask, perhaps); give token ids")
            object.__setattr__(self, "input_ids", ids)
            if not self._is_without_text or self.chat:
                left = "chat" if self._is_without_text else "the text"
                raise InputError(f"input_ids stand instead of a text; leave out {left}")
        if not isinstance(self.options, GenerationOptions):
            raise InputError(f"options is {type(self.options).__name__}; give GenerationOptions(...)")
        timeout = self.timeout
        if timeout is not None and (not isinstance(timeout, _NUMBERS) or not timeout >= 0):
            raise InputError(f"timeout is {timeout!r}; it must be a number of seconds, or None")
        if not isinstance(self.pooling, str | None) or self.pooling not in (None, *POOLINGS):
            raise InputError(f"pooling is {self.pooling!r}, allowed: {', '.join(POOLINGS)}")
        if not isinstance(self.messages, list | tuple | None) or self.messages:
            object.__setattr__(self, "messages", _conversation(self.messages))
            if not self._is_without_text or self.input_ids is not None:
                raise InputError("give messages, a text, or input_ids; not several")

    @property
    def _is_without_text(self) -> bool:
        return isinstance(self.text, str | Mapping) and not self.text


class RequestKeywords(TypedDict, total=False):
    """Keywords of `classify`, `tag`, `answer` and `logits`: fields of `Request`."""

    prompt: str | None
    input_ids: Ids | None
    truncate: bool
    timeout: float | None


class ChatKeywords(RequestKeywords, total=False):
    """Keywords of `chat`: fields of `Request` and of `GenerationOptions`."""

    options: GenerationOptions | None
    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str]
    logprobs: bool
    num_beams: int
    top_logprobs: int
    choices: Sequence[str]
    drafts: bool | None


class GenerationKeywords(ChatKeywords, total=False):
    """Keywords of `generate` and `stream`."""

    chat: bool
    messages: Sequence[Message]


def make_request(text: Text, task: str, keywords: Mapping[str, Any]) -> Request:
    """A request from the keywords of a call.

    Raises:
        InputError: a keyword is unknown, or options come twice.
    """
    fields = {name: value for name, value in keywords.items() if name in _FIELDS}
    settings = {name: value for name, value in keywords.items() if name not in _FIELDS and name != "options"}
    known = _OPTIONS if task == "generate" else ()
    unknown = next((name for name in settings if name not in known), None)
    if unknown is not None or (task != "generate" and "options" in keywords):
        raise InputError(f"unknown option {unknown or 'options'!r}; known: {', '.join((*known, *_FIELDS))}")
    options = keywords.get("options")
    if settings and options is not None:
        raise InputError(f"give options= or {next(iter(settings))}=, not both")
    if options is None:
        options = GenerationOptions(**settings)
    return Request(text, task=task, options=options, **fields)


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True, False nor None: the text "false" counts as true.

    Raises:
        InputError: names it.
    """
    if not isinstance(value, bool | np.bool_ | None):
        raise InputError(f"{name} is {value!r}; it must be True or False")


def items_of(value: object, rule: str) -> list[Any]:
    """The items of a list, a tuple, an array or a generator; `rule` is what to say where `value` is none.

    Raises:
        InputError: a text, a mapping, a set (which has no order), or nothing that has items.
    """
    try:
        if not isinstance(value, str | bytes | bytearray | Mapping | Set) and isinstance(value, Iterable):
            return list(value)
    except TypeError:  # an array without dimensions
        pass
    raise InputError(f"{rule}; found {type(value).__name__}")


def _conversation(messages: Sequence[Message]) -> tuple[Message, ...]:
    for message in messages if isinstance(messages, list | tuple) else ({},):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise InputError("messages must be a list of {'role': ..., 'content': ...}, both texts")
    if messages[-1]["role"] != "user":
        raise InputError(f"the last message is the {messages[-1]['role']}'s; it must be the user's, to be answered")
    return tuple(messages)


_NUMBERS = (int, float, np.integer, np.floating)
_OPTIONS = tuple(GenerationOptions.__dataclass_fields__)
_FIELDS = ("prompt", "input_ids", "truncate", "timeout", "chat", "messages")


@dataclass(frozen=True)
class Timings:
    """Seconds. `ttft`: from text to first token id, tokenisation and sampling included. `total`: to the last id."""

    ttft: float
    total: float
    input_tokens: int
    new_tokens: int
    reused_tokens: int = 0
    """Input tokens whose keys and values were resident (encoder-decoders: whose encoding was)."""
    computed_tokens: int = 0
    """The other input tokens."""
    drafted_tokens: int = 0
    """Tokens that were read out of the text as a draft of the answer, and checked."""
    accepted_tokens: int = 0
    """Those of them that are part of the answer: so many steps were saved."""

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None for a single token."""
        return (self.total - self.ttft) / (self.new_tokens - 1) if self.new_tokens > 1 else None


class Clock:
    """Times of one request, from the moment it was made."""

    def __init__(self, input_tokens: int = 0) -> None:
        self.start = time.perf_counter()
        self.first = 0.0
        self.input_tokens = input_tokens
        self.reused_tokens = self.drafted_tokens = self.accepted_tokens = 0

    def tick(self) -> None:
        """A token is there."""
        self.first = self.first or time.perf_counter()

    def timings(self, new_tokens: int) -> Timings:
        """What has passed until now."""
        now = time.perf_counter()
        return Timings(
            (self.first or now) - self.start,
            now - self.start,
            self.input_tokens,
            new_tokens,
            reused_tokens=self.reused_tokens,
            computed_tokens=self.input_tokens - self.reused_tokens,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
        )


@dataclass(frozen=True)
class Classification:
    """The label, and the probability (`scores`) and raw score (`logits`) of every label."""

    label: str
    scores: Mapping[str, float]
    logits: Mapping[str, float]
    timings: Timings | None = None
    labels: tuple[str, ...] = ()
    """Multi-label: all labels above one half. Regression: empty, and `logits` holds the values."""


@dataclass(frozen=True)
class Generation:
    """Generated text. `finish_reason`: "eos", "stop" or "length"."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    timings: Timings
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    """For each token, the most likely ones there with their log-probabilities, the most likely first."""


@dataclass(frozen=True)
class Span:
    """A tagged or answered piece of text: `text[start:end]`, in characters."""

    label: str
    start: int
    end: int
    text: str
    score: float


@dataclass(frozen=True)
class Tagging:
    """Spans of one text, and the label of every word."""

    spans: tuple[Span, ...]
    words: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The span of the context that answers a question; an empty text means that there is no answer."""

    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class RuntimeStatus:
    """What a runtime is doing, as a monitor sees it."""

    waiting: int
    """Requests in the queue."""
    running: int
    """Requests that are being computed."""
    resident_prefixes: int
    """What is kept of prompts (decoders: prefix KV), in entries and bytes."""
    resident_bytes: int


Embedding: TypeAlias = npt.NDArray[np.float32]
Result: TypeAlias = Classification | Generation | Tagging | Answer | Embedding


def as_json(result: Result) -> Any:
    """A result as plain data for `json.dumps`."""
    import dataclasses

    return dataclasses.asdict(result) if dataclasses.is_dataclass(result) else np.asarray(result).tolist()
