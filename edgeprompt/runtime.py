"""The runtime: one package, many prompts, from any thread."""

from __future__ import annotations

import os
import queue
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeAlias, Unpack, cast, overload

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
    Tagging,
    Text,
    make_request,
)

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
        """What the package is."""
        return self._package.manifest

    @property
    def provider(self) -> str:
        """The execution provider that runs it, as "cpu" or "cuda"; what `auto` chose."""
        return self._engine.provider

    @property
    def prompts(self) -> tuple[str, ...]:
        """Names of the prompts that requests can name: those added, in the package, and in folders."""
        return self._prompts.names

    def prompt(self, name: str) -> PromptFile:
        """A prompt by name, with its tensors.

        Raises:
            PromptNotFoundError: no prompt of that name.
        """
        return self._prompts.find(name).tensors()

    def add_prompt(
        self,
        prompt: str | os.PathLike[str] | PromptFile,
        *,
        name: str | None = None,
        allow_base_mismatch: bool = False,
        allow_other_weights: bool | None = None,
    ) -> str:
        """Make a prompt ready, replacing one of the same name; requests that run keep the old one.

        A path is read again when tensors are needed, so thousands of prompts take little memory; it must not change.

        Args:
            prompt: path of a prompt file, or a `PromptFile`.
            name: under which requests find it; None takes the file's.
            allow_base_mismatch: serve a prompt of another base whose sizes fit.
            allow_other_weights: serve a prompt tuned for other weights that are far from the package's; None: as
                `EngineOptions.allow_other_weights` says.

        Returns:
            The name.

        Raises:
            PromptFileError: broken file.
            BaseMismatchError: made for another base, tokenizer or geometry.
            OtherWeightsError: tuned for other weights, and they or the package's are far from the base.
        """
        self._open()
        return self._prompts.add(
            prompt, name=name, allow_base_mismatch=allow_base_mismatch, allow_other_weights=allow_other_weights
        )

    def add_folder(self, folder: str | os.PathLike[str]) -> None:
        """Let requests name every prompt of a folder, by its file's name; each is read when first asked for.

        A file that is replaced or added later is seen by the next request that names it.

        Raises:
            InputError: there is no such folder.
        """
        self._prompts.add_folder(folder)

    def remove_prompt(self, name: str) -> None:
        """Forget a prompt; requests that run keep it.

        Raises:
            PromptNotFoundError: no prompt of that name was added.
        """
        self._prompts.remove(name)

    @overload
    def run(self, requests: Sequence[Request], *, return_errors: Literal[False] = False) -> list[Result]: ...
    @overload
    def run(self, requests: Sequence[Request], *, return_errors: bool) -> list[Result | Exception]: ...
    def run(self, requests: Sequence[Request], *, return_errors: bool = False) -> Sequence[Result | Exception]:
        """Answer a batch of mixed tasks, in order; what does not fit into the queue waits.

        With `return_errors`, a request that fails is its exception in the list, and the others are answered. Without,
        the first failure is raised, and the others are cancelled.
        """
        jobs: list[Job | Exception] = []
        try:
            prompts = self._resolve(requests, return_errors)
            for start in range(0, len(requests), self._group):
                made = [self._prepare(one, prompts, return_errors) for one in requests[start : start + self._group]]
                jobs += made
                self._engine.queue([job for job in made if isinstance(job, Job)], wait=True)
            return [_outcome(job, return_errors) for job in jobs]
        except BaseException:
            for job in jobs:
                if isinstance(job, Job):
                    job.cancel()
            raise

    def run_tasks(self, text: Text, prompts: Sequence[str], *, truncate: bool = False) -> dict[str, Result]:
        """One text, many tasks, as one batch: prompt name -> result."""
        requests = [Request(text, name, truncate=truncate) for name in prompts]
        return dict(zip(prompts, self.run(requests), strict=True))

    def submit(self, request: Request) -> Job:
        """Queue a request and return at once.

        The job is a `concurrent.futures.Future`: `result()` waits, `cancel()` takes effect before the next step.

        Raises:
            CapacityError: the queue is full, or the request is larger than the memory budget.
        """
        return self._engine.submit(request, self._find(request))

    @overload
    def classify(self, text: Text = ..., **keywords: Unpack[RequestKeywords]) -> Classification: ...
    @overload
    def classify(self, text: Texts, **keywords: Unpack[RequestKeywords]) -> list[Classification]: ...
    def classify(self, text: Text | Texts = "", **keywords: Unpack[RequestKeywords]) -> Any:
        """Label a text, or a list of texts.

        Args:
            text: a string, fields of the template by name, or a list of either.
            keywords: `prompt`: name of one with a verbalizer or a head. `input_ids`: of one text, instead of `text`,
                without the prompt's virtual tokens. `truncate`: cut the text where the request exceeds the context,
                instead of refusing it. `timeout`: seconds after which the request fails with RequestTimeoutError.
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
        """The piece of a context that answers a question, or of many contexts for as many questions.

        Args:
            question: what is asked.
            context: where the answer stands.
            keywords: as `classify`; `prompt` names one for question answering.
        """
        name = keywords.get("prompt")
        if name is None:
            raise InputError("answer needs a prompt for question answering; add one and name it with prompt=")
        self._open()
        first, second = pair_of(self._prompts.find(name).file.template)
        if isinstance(question, str) and isinstance(context, str):
            return self._each({first: question, second: context}, "qa", keywords)
        if isinstance(question, str) or isinstance(context, str) or len(question) != len(context):
            raise InputError("give one question and one context, or lists of as many questions as contexts")
        texts: list[Text] = [{first: one, second: other} for one, other in zip(question, context, strict=True)]
        return self._each(texts, "qa", keywords)

    @overload
    def generate(self, text: Text = ..., **keywords: Unpack[GenerationKeywords]) -> Generation: ...
    @overload
    def generate(self, text: Texts, **keywords: Unpack[GenerationKeywords]) -> list[Generation]: ...
    def generate(self, text: Text | Texts = "", **keywords: Unpack[GenerationKeywords]) -> Any:
        """Generate from a text, or from a list of texts; without `prompt`, exactly the base model.

        Args:
            text: a string, fields of the template by name, or a list of either.
            keywords: those of `classify`; `chat`: wrap the text in the chat template; `messages`: a conversation
                instead of a text; `options`, or the fields of `GenerationOptions` (`max_new_tokens`, `temperature`,
                `stop` ...).
        """
        return self._each(text, "generate", keywords)

    def chat(self, messages: Sequence[Message], **keywords: Unpack[ChatKeywords]) -> Generation:
        """The answer to a conversation, through the package's chat template.

        Args:
            messages: turns with `role` ("system", "user", "assistant") and `content`; the last is the user's, and fills
                the prompt's template.
            keywords: as `generate`.
        """
        if not messages:
            raise InputError("chat needs at least one message: {'role': 'user', 'content': ...}")
        return cast(Generation, self._each("", "generate", {**keywords, "messages": messages}))

    def stream(self, text: Text | Request = "", **keywords: Unpack[GenerationKeywords]) -> TextStream:
        """`generate`, piece by piece; closing the iterator cancels the request. Takes a `Request` as well."""
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
        """`stream` of a `Request`: an older name, which goes with the next version."""
        return self.stream(request)

    def logits(self, text: Text = "", **keywords: Unpack[RequestKeywords]) -> Embedding:
        """float32 [vocab_size]: scores of the next token.

        Encoders: of the token at the template's `{mask}`. Encoder-decoders: of the answer's first token, behind the
        prompt's decoder prefix. Keywords as `classify`.
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
        """float32 [len(texts), hidden_size].

        Args:
            texts: what to embed.
            prompt: name of a prompt, or None.
            pooling: "mean", "cls" or "last"; None takes the package's default. Virtual tokens are left out.
            input_ids: ids of every text, instead of `texts`.
        """
        if isinstance(texts, str | Mapping):
            raise InputError("embed takes a list of texts; put the one text into a list")
        if not isinstance(texts if input_ids is None else input_ids, Iterable):
            raise InputError("embed takes a list of texts, or input_ids: a list of the ids of each")
        if input_ids is not None:
            requests = [Request("", prompt, ids, "embed", pooling=pooling) for ids in input_ids]
        else:
            requests = [Request(text, prompt, None, "embed", pooling=pooling) for text in texts]
        found = self.run(requests)
        if not found:
            return np.empty((0, self.manifest.geometry.hidden_size), np.float32)
        return np.stack(cast(list[Embedding], found))

    def check(self, prompt: str) -> GoldenCheck:
        """Ask a prompt its golden example, and compare with what it answered where it was made.

        Raises:
            InputError: the prompt file holds no golden example.
        """
        self._open()
        file = replace(self._prompts.find(prompt).file, name=prompt)
        return compare(file, self.run(questions(file)))

    def calibration(self, prompt: str, texts: Sequence[Text] = CONTENT_FREE) -> tuple[float, ...]:
        """Values for `PromptFile.calibration`: what the verbalizer says about texts without content."""
        results = self.classify([*texts], prompt=prompt)
        return contextual_calibration([list(result.logits.values()) for result in results])

    async def arun(self, requests: Sequence[Request]) -> list[Result]:
        """`run` for asyncio; cancelling the task, or the failure of a request, cancels the others.

        Raises:
            CapacityError: more requests at once than the queue takes; ask in smaller batches.
        """
        from edgeprompt.asynchronous import gather  # here: asyncio is a quarter of the package's import time

        return await gather(self.submit, requests)

    async def aclassify(self, text: Text = "", **keywords: Unpack[RequestKeywords]) -> Classification:
        """`classify` of one text for asyncio."""
        return cast(Classification, (await self.arun([make_request(text, "classify", keywords)]))[0])

    async def agenerate(self, text: Text = "", **keywords: Unpack[GenerationKeywords]) -> Generation:
        """`generate` of one text for asyncio."""
        return cast(Generation, (await self.arun([make_request(text, "generate", keywords)]))[0])

    def astream(self, text: Text | Request = "", **keywords: Unpack[GenerationKeywords]) -> AsyncIterator[str]:
        """`stream` for asyncio, with its arguments; leaving the loop, or cancelling the task, cancels the request."""
        from edgeprompt.asynchronous import iterate

        return iterate(partial(self.stream, text, **keywords))

    def close(self) -> None:
        """Fail requests in flight with RequestCancelledError and free the model. Closing twice is fine."""
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
        if not isinstance(request, Request):
            raise InputError(f"a request is {type(request).__name__}; give Request(...)")
        return None if request.prompt is None else self._prompts.find(request.prompt)

    def _resolve(self, requests: Sequence[Request], return_errors: bool) -> dict[str | None, LoadedPrompt | Exception]:
        """The prompts that requests name, each looked up once, or why there is none."""
        self._open()
        found: dict[str | None, LoadedPrompt | Exception] = {}
        for request in requests:
            if not isinstance(request, Request) or request.prompt not in found:
                try:
                    prompt = self._find(request)
                except Exception as error:
                    if not return_errors:
                        raise
                    found[getattr(request, "prompt", None)] = error
                else:
                    if prompt is not None:
                        found[request.prompt] = prompt
        return found

    def _prepare(
        self, request: Request, prompts: Mapping[str | None, LoadedPrompt | Exception], return_errors: bool
    ) -> Job | Exception:
        prompt = prompts.get(request.prompt)
        if isinstance(prompt, Exception):
            return prompt
        try:
            return self._engine.prepare(request, prompt, None)
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
