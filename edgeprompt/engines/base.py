"""One engine per architecture; the runtime picks by the manifest's `architecture`."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module

from edgeprompt import names
from edgeprompt.engines.scheduler import Job, Scheduler
from edgeprompt.errors import InputError, TemplateError, UnsupportedError
from edgeprompt.options import EngineOptions
from edgeprompt.ort.kv_cache import PrefixCache
from edgeprompt.ort.session import Sessions
from edgeprompt.package.folder import Package
from edgeprompt.package.tokenizer import Tokenizer
from edgeprompt.prompts.registry import LoadedPrompt
from edgeprompt.prompts.template import VirtualTokens
from edgeprompt.prompts.verbalizer import Verbalizer
from edgeprompt.request import Request

ENCODER_PAST = f"encoder_{names.PAST_KEY_VALUES}"
PARTS = (names.PROMPT_EMBEDDINGS, names.PAST_KEY_VALUES, ENCODER_PAST)
"""What engines derive from a prompt, by name."""

_NO_SESSIONS = "sessions hold a text's keys and values, which only decoder-only packages keep"
_ENGINES = {
    names.DECODER_ONLY: ("edgeprompt.engines.decoder.engine", "DecoderEngine"),
    names.ENCODER_ONLY: ("edgeprompt.engines.encoder.engine", "EncoderEngine"),
    names.ENCODER_DECODER: ("edgeprompt.engines.seq2seq.engine", "Seq2SeqEngine"),
}


class Engine(ABC):
    """What the runtime asks of an architecture. Every method may be called from any thread."""

    provider: str
    """What runs it, as "cpu" or "cuda"."""
    derived: PrefixCache
    """What was computed from prompts."""
    scheduler: Scheduler
    group = 1
    """Requests of one call that are queued together, so that they can run sorted by length."""

    @abstractmethod
    def accept(self, prompt: LoadedPrompt) -> None:
        """Check a prompt and make it ready.

        Raises:
            EdgePromptError: it cannot be served here; the message says why.
        """

    @abstractmethod
    def prepare(self, request: Request, prompt: LoadedPrompt | None, on_text: Callable[[str], None] | None) -> Job:
        """Check and encode a request.

        Args:
            request: what is asked.
            prompt: which its name was resolved to.
            on_text: gets text as it is generated, on the scheduler's thread.

        Raises:
            EdgePromptError: it cannot be answered; the message says why.
        """

    def submit(
        self,
        request: Request,
        prompt: LoadedPrompt | None,
        on_text: Callable[[str], None] | None = None,
        *,
        wait: bool = False,
    ) -> Job:
        """Queue one request.

        Raises:
            CapacityError: the queue is full, and `wait` is false.
            EdgePromptError: as `prepare`.
        """
        job = self.prepare(request, prompt, on_text)
        self.scheduler.submit([job], wait=wait)
        return job

    def save_session(self, path: str | os.PathLike[str], request: Request, prompt: LoadedPrompt | None) -> int:
        """Write the keys and values that are resident of a request's text; the number of tokens.

        Raises:
            UnsupportedError: the architecture keeps none.
            InputError: nothing of the text is resident, or `path` holds something else.
        """
        raise UnsupportedError(_NO_SESSIONS)

    def load_session(self, path: str | os.PathLike[str], find: Callable[[str], LoadedPrompt]) -> int:
        """Make the keys and values of a session resident; the number of tokens.

        Args:
            path: what `save_session` wrote.
            find: gives a prompt by name.

        Raises:
            UnsupportedError: the architecture keeps none.
            InputError: no session, a broken one, or one of another graph, prompt, provider or version.
            CapacityError: it does not fit into `prefix_budget`.
        """
        raise UnsupportedError(_NO_SESSIONS)

    def forget(self, prompt: LoadedPrompt) -> None:
        """Drop what was computed from a prompt."""
        self.derived.forget(prompt, PARTS)

    def close(self) -> None:
        """Fail what waits or runs, after the step that is under way."""
        self.scheduler.close()


def check_template(prompt: LoadedPrompt, *, infix: bool = False) -> None:
    """Refuse virtual tokens that have no place.

    Raises:
        TemplateError: the prompt has virtual tokens, and its template no `{prompt}`.
        UnsupportedError: its keys and values stand inside the text, and the engine does not serve that (`infix`).
    """
    template = prompt.file.template
    if prompt.is_infix and not infix:
        raise UnsupportedError(
            f"prompt {prompt.name!r} has keys and values inside its text ({template}), which only decoders serve"
        )
    if prompt.rows and not any(isinstance(part, VirtualTokens) for part in template.parts):
        raise TemplateError(
            f"prompt {prompt.name!r} has {prompt.rows} virtual tokens, and its template {str(template)!r} no {{prompt}}"
        )


def compile_words(prompt: LoadedPrompt, tokenizer: Tokenizer, behind: str | None = None) -> Verbalizer:
    """A prompt's label words as token ids; `behind` is the text that they stand behind (`Verbalizer.compile`).

    Raises:
        TemplateError: fewer than two labels, a word without tokens, or one word for two labels.
    """
    file = prompt.file
    return Verbalizer.compile(
        file.verbalizer,
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        file.calibration,
        file.verbalizer_aggregation,
        behind,
    )


def given_ids(request: Request, prompt: LoadedPrompt | None, vocab_size: int) -> list[int]:
    """The ids that a request brings instead of a text.

    Raises:
        InputError: one is none of the base's, or the prompt's virtual tokens stand inside its text.
    """
    ids = [int(token) for token in request.input_ids or ()]
    bad = next((token for token in ids if not 0 <= token < vocab_size), None)
    if bad is not None:
        raise InputError(f"input_ids holds {bad}; ids of this base are 0 to {vocab_size - 1}")
    if prompt is not None and prompt.virtual_ids and not prompt.file.template.prompt_is_prefix:
        raise InputError(f"prompt {prompt.name!r} has virtual tokens inside its template, so it needs text, not ids")
    return ids


def create_engine(package: Package, options: EngineOptions, sessions: Sessions) -> Engine:
    """The engine for a package, whose sessions may still be opening.

    Raises:
        UnsupportedError: drafts are asked for, and the package is no decoder's.
    """
    if options.drafts and package.manifest.architecture != names.DECODER_ONLY:
        raise UnsupportedError(f"drafts are for decoder-only packages, and this one is {package.manifest.architecture}")
    module, name = _ENGINES[package.manifest.architecture]
    make = getattr(import_module(module), name)
    sessions.give_head_start()
    _ = package.tokenizer  # read here, beside the sessions
    engine: Engine = make(package, options, sessions)
    return engine
