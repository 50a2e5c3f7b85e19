"""The runtime: one package, many prompts, from any thread."""

from __future__ import annotations

import os
import queue
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Unpack, cast, overload

import numpy as np
import numpy.typing as npt

from edgeprompt.decoding.detokenizer import TextStream
from edgeprompt.engines.base import Engine, create_engine
from edgeprompt.engines.scheduler import Job
from edgeprompt.errors import InputError, UnsupportedError
from edgeprompt.options import EngineOptions
from edgeprompt.ort.session import Sessions
from edgeprompt.package.folder import Package
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.encoder_text import pair_of
from edgeprompt.prompts.file import PromptFile
from edgeprompt.prompts.golden import GoldenCheck, compare, questions
from edgeprompt.prompts.registry import LoadedPrompt, PromptRegistry
from edgeprompt.prompts.verbalizer import CONTENT_FREE, contextual_calibration
from edgeprompt.request import (
    Answer,
    ChatKeywords,
    Classification,
    Embedding,
    Generation,
    GenerationKeywords,
    Ids,
    Message,
    Request,
    RequestKeywords,
    Result,
    RuntimeStatus,
    Tagging,
    Text,
    items_of,
    make_request,
)

if TYPE_CHECKING:
    from edgeprompt.package.tokenizer import Tokenizer

Texts: TypeAlias = list[Text] | list[str] | tuple[Text, ...]

_LIVE: weakref.WeakSet[Runtime] = weakref.WeakSet()
"""Runtimes of this process, for what has to happen when it forks."""


class Runtime:
    """Serves one package. Every method may be called from any thread; make one with `load`."""

    def __init__(self, package: Package, options: EngineOptions, sessions: Sessions | None = None) -> None:
        self._package = package
        self._sessions = sessions or Sessions(package, options)
        self._engine: Engine = create_engine(package, options, self._sessions)
        self._group = min(self._engine.group, options.max_queue)
        self._prompts = PromptRegistry(
            package.manifest,
            sorted({path.parent for path in package.prompt_paths}),
            accept=self._engine.accept,
            forget=self._engine.forget,
            allow_other_weights=options.allow_other_weights,
            package=str(package.path),
        )
        self._why_closed = "the runtime is closed; load the package again"
        self._close = weakref.finalize(self, self._engine.close)  # also at interpreter exit
        _LIVE.add(self)

    @property
    def manifest(self) -> Manifest:
        """The manifest of the package."""
        return self._package.manifest

    @property
    def provider(self) -> str:
        """The execution provider in use, for example "cpu" or "cuda"."""
        return self._engine.provider

    @property
    def tokenizer(self) -> Tokenizer:
        """The package's tokenizer."""
        return self._package.tokenizer

    def status(self) -> RuntimeStatus:
        """How much waits and runs, and what is kept of prompts."""
        scheduler, derived = self._engine.scheduler, self._engine.derived
        return RuntimeStatus(scheduler.waiting, scheduler.running, len(derived), derived.size)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Names of all prompts that requests can use: added, in the package, and in folders."""
        return self._prompts.names

    def prompt(self, name: str) -> PromptFile:
        """A prompt by name, with its tensors.

        Raises:
            PromptNotFoundError: no prompt of that name.
        """
        self._open()
        return self._prompts.find(name).tensors()

    def describe(self, name: str) -> PromptFile:
        """A prompt by name without its own tensors, which may be large: what it is for, and how it was made.

        Raises:
            PromptNotFoundError: no prompt of that name.
            PromptFileError, BaseMismatchError: the file of that name in a folder cannot be served.
        """
        self._open()
        return self._prompts.find(name).file

    def add_prompt(
        self,
        prompt: str | os.PathLike[str] | PromptFile,
        *,
        name: str | None = None,
        allow_base_mismatch: bool = False,
        allow_other_weights: bool | None = None,
    ) -> str:
        """Add a prompt, or replace the one of the same name. Running requests keep the old one.

        The file of a path is read again when its tensors are needed, so thousands of prompts need little memory. The
        file must not change.

        Args:
            prompt: path of a prompt file, or a `PromptFile`.
            name: the name that requests use; None takes the name in the file.
            allow_base_mismatch: serve a prompt of another base whose sizes fit.
            allow_other_weights: serve a prompt tuned for other weights that are far from the package's; None: as
                `EngineOptions.allow_other_weights` says.

        Returns:
            The name.

        Raises:
            PromptFileError: the file is broken.
            BaseMismatchError: the prompt was made for another base, tokenizer or geometry.
            OtherWeightsError: tuned for other weights, and they or the package's are far from the base.
        """
        self._open()
        return self._prompts.add(
            prompt, name=name, allow_base_mismatch=allow_base_mismatch, allow_other_weights=allow_other_weights
        )

    def add_folder(self, folder: str | os.PathLike[str]) -> None:
        """Make every prompt of a folder available under its file name.

        A file is read at the first request that names it. A file that is added or replaced later is used from the next
        request on.

        Raises:
            InputError: there is no such folder.
        """
        self._open()
        self._prompts.add_folder(folder)

    def remove_prompt(self, name: str) -> None:
        """Remove a prompt. Running requests keep it.

        Raises:
            PromptNotFoundError: no prompt of that name was added.
        """
        self._open()
        self._prompts.remove(name)

    @overload
    def run(self, requests: Sequence[Request], *, return_errors: Literal[False] = False) -> list[Result]: ...
    @overload
    def run(self, requests: Sequence[Request], *, return_errors: bool) -> list[Result | Exception]: ...
    def run(self, requests: Sequence[Request], *, return_errors: bool = False) -> Sequence[Result | Exception]:
        """Answer a batch of requests of any tasks, in order. Requests that do not fit into the queue wait.

        With `return_errors`, a request that fails has its exception in the list, and the others are answered. Without
        it, the first failure is raised, and the others are cancelled.
        """
        if not isinstance(requests, Sequence) or isinstance(requests, str):
            raise InputError(f"run takes a list of requests, found {type(requests).__name__}")
        jobs: list[Job | Exception] = []
        try:
            prompts = self._resolve(requests, return_errors)
            for start in range(0, len(requests), self._group):
                made = [self._prepare(one, prompts, return_errors) for one in requests[start : start + self._group]]
                jobs += made
                self._engine.scheduler.submit([job for job in made if isinstance(job, Job)], wait=True)
            return [_outcome(job, return_errors) for job in jobs]
        except BaseException:
            for job in jobs:
                if isinstance(job, Job):
                    job.cancel()
            raise

    def run_tasks(self, text: Text, prompts: Sequence[str], *, truncate: bool = False) -> dict[str, Result]:
        """Answer one text with several prompts, as one batch: prompt name -> result."""
        names = items_of(prompts, "run_tasks takes a list of prompts' names")
        requests = [Request(text, name, truncate=truncate) for name in names]
        return dict(zip(names, self.run(requests), strict=True))

    def submit(self, request: Request, on_text: Callable[[str], None] | None = None) -> Job:
        """Queue a request and return at once.

        The job is a `concurrent.futures.Future`: `result()` waits, `cancel()` takes effect before the next step.

        Args:
            request: what to ask.
            on_text: gets the pieces of a generated text as `stream` does, on the scheduler's thread: it must be short.

        Raises:
            QueueFullError: the queue is full.
            CapacityError: the request is larger than the memory budget.
        """
        return self._engine.submit(request, self._find(request), on_text)

    def submit_all(self, requests: Sequence[Request], on_text: Sequence[Callable[[str], None]] = ()) -> list[Job]:
        """`submit` of several requests, all or none, so that they can run as a batch.

        Args:
            requests: what to ask.
            on_text: one for each request, or none.
        """
        requests = items_of(requests, "submit_all takes a list of requests")
        listeners = on_text or (None,) * len(requests)
        if len(listeners) != len(requests):
            raise InputError(f"submit_all has {len(requests)} requests and {len(listeners)} on_text; give one for each")
        prompts = self._resolve(requests, False)
        jobs = [
            self._prepare(request, prompts, False, listener)
            for request, listener in zip(requests, listeners, strict=True)
        ]
        found = cast("list[Job]", jobs)
        self._engine.scheduler.submit(found, wait=False)
        return found

    @overload
    def classify(self, text: Text = ..., **keywords: Unpack[RequestKeywords]) -> Classification: ...
    @overload
    def classify(self, text: Texts, **keywords: Unpack[RequestKeywords]) -> list[Classification]: ...
    def classify(self, text: Text | Texts = "", **keywords: Unpack[RequestKeywords]) -> Any:
        """Label a text, or a list of texts.

        Args:
            text: a string, fields of the template by name, or a list of either.
            keywords: `prompt`: name of a prompt with a verbalizer or a head. `input_ids`: token ids instead of `text`,
                without the prompt's virtual tokens. `truncate`: if the request exceeds the context, cut the text
                instead of rejecting the request. `timeout`: seconds after which the request fails with
                RequestTimeoutError.
        """
        return self._each(text, "classify", keywords)

    @overload
    def tag(self, text: Text = ..., **keywords: Unpack[RequestKeywords]) -> Tagging: ...
    @overload
    def tag(self, text: Texts, **keywords: Unpack[RequestKeywords]) -> list[Tagging]: ...
    def tag(self, text: Text | Texts = "", **keywords: Unpack[RequestKeywords]) -> Any:
        """Label the words of a text, or of a list of texts; arguments as `classify`."""
        return self._each(text, "tag", keywords)

    @overload
    def answer(self, question: str, context: str, **keywords: Unpack[RequestKeywords]) -> Answer: ...
    @overload
    def answer(self, question: list[str], context: list[str], **keywords: Unpack[RequestKeywords]) -> list[Answer]: ...
    def answer(self, question: str | list[str], context: str | list[str], **keywords: Unpack[RequestKeywords]) -> Any:
        """Find the answer to a question in a context. Lists of equal length ask several questions.

        Args:
            question: the question, or a list.
            context: the text that contains the answer, or a list.
            keywords: as for `classify`; `prompt` names a prompt for question answering.
        """
        name = keywords.get("prompt")
        if name is None:
            raise InputError("answer needs a prompt for question answering; add one and name it with prompt=")
        self._open()
        first, second = pair_of(self._prompts.find(name).file.template)
        if isinstance(question, str) and isinstance(context, str):
            return self._each({first: question, second: context}, "qa", keywords)
        rule = "give one question and one context, or lists of as many questions as contexts"
        asked, given = items_of(question, rule), items_of(context, rule)
        if len(asked) != len(given):
            raise InputError(f"{rule}; found {len(asked)} and {len(given)}")
        texts: list[Text] = [{first: one, second: other} for one, other in zip(asked, given, strict=True)]
        return self._each(texts, "qa", keywords)

    @overload
    def generate(self, text: Text = ..., **keywords: Unpack[GenerationKeywords]) -> Generation: ...
    @overload
    def generate(self, text: Texts, **keywords: Unpack[GenerationKeywords]) -> list[Generation]: ...
    def generate(self, text: Text | Texts = "", **keywords: Unpack[GenerationKeywords]) -> Any:
        """Continue a text, or each text of a list. Without `prompt`, the base model does it.

        Args:
            text: a string, fields of the template by name, or a list of either.
            keywords: as for `classify`. `chat`: wrap the text in the chat template. `messages`: a conversation
                instead of a text. `options`, or the fields of `GenerationOptions` (`max_new_tokens`, `temperature`,
                `stop` ...).
        """
        return self._each(text, "generate", keywords)

    def chat(self, messages: Sequence[Message], **keywords: Unpack[ChatKeywords]) -> Generation:
        """Answer a conversation, with the package's chat template.

        Args:
            messages: turns with `role` ("system", "user", "assistant") and `content`. The last turn is the user's, and
                fills the prompt's template.
            keywords: as for `generate`.
        """
        if isinstance(messages, list | tuple) and not messages:
            raise InputError("chat needs at least one message: {'role': 'user', 'content': ...}")
        return cast(Generation, self._each("", "generate", {**keywords, "messages": messages}))

    def save_session(
        self, path: str | os.PathLike[str], text: Text = "", **keywords: Unpack[GenerationKeywords]
    ) -> int:
        """Write what is resident of a text or a conversation that was asked, so that another process goes on with it.

        Args:
            path: of the file; an older session there is replaced.
            text: as for `generate`.
            keywords: as for `generate`, with the `prompt` and the `messages` that were asked.

        Returns:
            The number of tokens: whole blocks of 8.

        Raises:
            UnsupportedError: the package is no decoder-only one.
            InputError: nothing of the text is resident, or something else lies at `path`.
            OutputError: it cannot be written there.
        """
        request = make_request(text, "generate", keywords)
        return self._engine.save_session(path, request, self._find(request))

    def load_session(self, path: str | os.PathLike[str]) -> int:
        """Make a saved session resident; requests that begin with its text reuse it. Add its prompt before.

        Returns:
            The number of tokens.

        Raises:
            UnsupportedError: the package is no decoder-only one.
            InputError: no session, a broken one, or one of another package, prompt, provider or version.
            CapacityError: it does not fit into `prefix_budget`.
            PromptNotFoundError: its prompt was not added.
        """
        self._open()
        return self._engine.load_session(path, self._prompts.find)

    def stream(self, text: Text | Request = "", **keywords: Unpack[GenerationKeywords]) -> TextStream:
        """Like `generate`, piece by piece; `text` may be a `Request`. Closing the iterator cancels the request."""
        if isinstance(text, Request):
            if keywords:
                raise InputError(f"give a Request, or a text and {next(iter(keywords))}=, not both")
            request = replace(text, task=text.task or "generate")
        else:
            request = make_request(text, "generate", keywords)
        if request.task != "generate":
            raise UnsupportedError(f"task {request.task!r} has no text to stream; use run")
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        return TextStream(pieces, self._engine.submit(request, self._find(request), pieces.put, wait=True))

    def stream_request(self, request: Request) -> Iterator[str]:
        """Old name of `stream` with a `Request`; removed in the next version."""
        return self.stream(request)

    def logits(self, text: Text = "", **keywords: Unpack[RequestKeywords]) -> Embedding:
        """Logits of the next token, float32 [vocab_size].

        On an encoder, of the token at the template's `{mask}`. On an encoder-decoder, of the answer's first token,
        behind the prompt's decoder prefix. Keywords as for `classify`.
        """
        return cast(Embedding, self._each(text, "logits", keywords))

    def embed(
        self,
        texts: Sequence[Text] = (),
        *,
        prompt: str | None = None,
        pooling: str | None = None,
        input_ids: Sequence[Ids] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Embeddings of texts, float32 [len(texts), hidden_size].

        Args:
            texts: the texts.
            prompt: name of a prompt, or None.
            pooling: "mean", "cls" or "last"; None takes the package's default. Virtual tokens are not pooled.
            input_ids: a list of token ids for each text, instead of `texts`.
        """
        if isinstance(texts, str | Mapping):
            raise InputError("embed takes a list of texts; put the one text into a list")
        rule = "embed takes a list of texts, or input_ids: a list of the ids of each"
        given = items_of(texts, rule)
        if input_ids is not None:
            if any(given):
                raise InputError("embed takes texts or input_ids; give one of them")
            requests = [Request("", prompt, ids, "embed", pooling=pooling) for ids in items_of(input_ids, rule)]
        else:
            requests = [Request(text, prompt, None, "embed", pooling=pooling) for text in given]
        found = self.run(requests)
        if not found:
            return np.empty((0, self.manifest.geometry.hidden_size), np.float32)
        return np.stack(cast(list[Embedding], found))

    def check(self, prompt: str) -> GoldenCheck:
        """Run the golden example of a prompt, and compare the answer with the stored one.

        Raises:
            InputError: the prompt file holds no golden example.
        """
        self._open()
        file = replace(self._prompts.find(prompt).file, name=prompt)
        return compare(file, self.run(questions(file)))

    def calibration(self, prompt: str, texts: Sequence[Text] = CONTENT_FREE) -> tuple[float, ...]:
        """Values for `PromptFile.calibration`: log of the mean probability of each label for texts without content."""
        given = items_of(texts, "calibration takes a list of texts")
        if not given:
            raise InputError("calibration needs at least one text; leave texts out for those of the library")
        results = self.classify(given, prompt=prompt)
        return contextual_calibration([list(result.logits.values()) for result in results])

    async def arun(self, requests: Sequence[Request]) -> list[Result]:
        """`run` for asyncio. If the task is cancelled or a request fails, the other requests are cancelled.

        Raises:
            CapacityError: there are more requests than the queue holds; use smaller batches.
        """
        from edgeprompt.asynchronous import gather  # here: asyncio is a quarter of the package's import time

        return await gather(self.submit, items_of(requests, "arun takes a list of requests"))

    async def aclassify(self, text: Text = "", **keywords: Unpack[RequestKeywords]) -> Classification:
        """`classify` of one text for asyncio."""
        return cast(Classification, (await self.arun([make_request(text, "classify", keywords)]))[0])

    async def agenerate(self, text: Text = "", **keywords: Unpack[GenerationKeywords]) -> Generation:
        """`generate` of one text for asyncio."""
        return cast(Generation, (await self.arun([make_request(text, "generate", keywords)]))[0])

    def astream(self, text: Text | Request = "", **keywords: Unpack[GenerationKeywords]) -> AsyncIterator[str]:
        """`stream` for asyncio. Leaving the loop or cancelling the task cancels the request."""
        from edgeprompt.asynchronous import iterate

        return iterate(partial(self.stream, text, **keywords))

    def close(self) -> None:
        """Fail requests in flight with RequestCancelledError, and free the model. A second call does nothing."""
        self._close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        if not self._close.alive:
            raise InputError(self._why_closed)

    def _find(self, request: Request) -> LoadedPrompt | None:
        """The prompt that a request names."""
        self._open()
        _check_request(request)
        return None if request.prompt is None else self._prompts.find(request.prompt)

    def _resolve(self, requests: Sequence[Request], return_errors: bool) -> dict[str | None, LoadedPrompt | Exception]:
        """The prompts that requests name, each looked up once, or why there is none."""
        self._open()
        found: dict[str | None, LoadedPrompt | Exception] = {}
        for request in requests:
            if isinstance(request, Request) and request.prompt not in found:
                try:
                    prompt = self._find(request)
                except Exception as error:
                    if not return_errors:
                        raise
                    found[request.prompt] = error
                else:
                    if prompt is not None:
                        found[request.prompt] = prompt
        return found

    def _prepare(
        self,
        request: Request,
        prompts: Mapping[str | None, LoadedPrompt | Exception],
        return_errors: bool,
        on_text: Callable[[str], None] | None = None,
    ) -> Job | Exception:
        try:
            _check_request(request)
            prompt = prompts.get(request.prompt)
            if isinstance(prompt, Exception):
                return prompt
            return self._engine.prepare(request, prompt, on_text)
        except Exception as error:
            if not return_errors:
                raise
            return error

    def _each(self, text: Text | Texts, task: str, keywords: Mapping[str, Any]) -> Any:
        if isinstance(text, list | tuple):
            return self.run([make_request(one, task, keywords) for one in text])
        return self.run([make_request(text, task, keywords)])[0]

    def _forked(self) -> None:
        """In a forked child: the threads that compute are gone, and ONNX Runtime would wait for them for ever."""
        why = (
            "this runtime was loaded before the process forked, and only the parent can use it; load the package in "
            "the child (multiprocessing: in the pool's initializer, or with the start method 'spawn')"
        )
        self._close.detach()
        self._why_closed = why
        self._sessions.abandon()
        self._engine.scheduler.abandon(InputError(why))


def _check_request(request: object) -> None:
    if not isinstance(request, Request):
        raise InputError(f"a request is {type(request).__name__}; give Request(...)")


def _outcome(job: Job | Exception, return_errors: bool) -> Any:
    if isinstance(job, Exception):
        return job
    if not return_errors:
        return job.result()
    error = job.exception()
    return job.result() if error is None else error


def _after_fork() -> None:
    for runtime in list(_LIVE):
        runtime._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
