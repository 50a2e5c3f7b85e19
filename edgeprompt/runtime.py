"""The runtime: one package, many prompts, from any thread."""

from __future__ import annotations

import os
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from edgeprompt.engines.base import Engine, create_engine
from edgeprompt.engines.batcher import Batcher
from edgeprompt.errors import EdgePromptError, InputError
from edgeprompt.options import EngineOptions
from edgeprompt.ort.session import Sessions
from edgeprompt.package.folder import Package
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import PromptFile
from edgeprompt.prompts.golden import GoldenCheck, check_golden
from edgeprompt.prompts.registry import PromptRegistry, open_prompt
from edgeprompt.prompts.verbalizer import CONTENT_FREE, contextual_calibration
from edgeprompt.request import Classification, Generation, GenerationOptions, Request, Result, Text

Ids = Sequence[int]
Array = npt.NDArray[np.float32]

_OPTIONS = tuple(GenerationOptions.__dataclass_fields__)


class Runtime:
    """Serves one package. Every method may be called from any thread; make one with `load`."""

    def __init__(self, package: Package, options: EngineOptions, sessions: Sessions | None = None) -> None:
        self._package = package
        self._engine: Engine = create_engine(package, options, sessions or Sessions(package, options))
        self._prompts = PromptRegistry(self._engine, sorted({path.parent for path in package.prompt_paths}))
        run = partial(self._engine.run, return_errors=True)
        self._batcher = Batcher(run, max_batch=options.max_batch, max_queue=options.max_queue)
        self._close = weakref.finalize(self, _close, self._batcher, self._engine)  # also at interpreter exit

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
        self._ensure(name)
        return self._prompts[name].tensors()

    def add_prompt(
        self, prompt: str | os.PathLike[str] | PromptFile, *, name: str | None = None, allow_base_mismatch: bool = False
    ) -> str:
        """Make a prompt ready, replacing one of the same name; requests that run keep the old one.

        A path is read again when tensors are needed, so thousands of prompts take little memory; it must not change.

        Args:
            prompt: path of a prompt file, or a `PromptFile`.
            name: under which requests find it; None takes the file's.
            allow_base_mismatch: serve a prompt of another base whose sizes fit.

        Returns:
            The name.

        Raises:
            PromptFileError: broken file.
            BaseMismatchError: made for another base, tokenizer or geometry.
        """
        name, source = open_prompt(prompt, self.manifest, name=name, allow_base_mismatch=allow_base_mismatch)
        self._prompts.add(name, source)
        return name

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

    def run(self, requests: Sequence[Request], *, return_errors: bool = False) -> list[Any]:
        """Answer a batch of mixed tasks, in order.

        With `return_errors`, a row that fails is its exception in the list, and the others are answered.
        """
        self._open()
        missing: dict[str | None, EdgePromptError] = {}
        for name in {request.prompt for request in requests}:
            try:
                self._ensure(name)
            except EdgePromptError as error:
                if not return_errors:
                    raise
                missing[name] = error
        if not missing:
            return self._engine.run(requests, return_errors=return_errors)
        answers = iter(self._engine.run([r for r in requests if r.prompt not in missing], return_errors=True))
        return [missing[r.prompt] if r.prompt in missing else next(answers) for r in requests]

    def run_tasks(self, text: Text, prompts: Sequence[str], *, truncate: bool = False) -> dict[str, Result]:
        """One text, many tasks, as one batch: prompt name -> result."""
        requests = [Request(text, name, truncate=truncate) for name in prompts]
        return dict(zip(prompts, self.run(requests), strict=True))

    @overload
    def classify(
        self,
        text: Text = ...,
        *,
        prompt: str | None = ...,
        input_ids: Ids | None = ...,
        truncate: bool = ...,
        timeout: float | None = ...,
    ) -> Classification: ...
    @overload
    def classify(
        self,
        text: list[Text] | list[str] | tuple[Text, ...],
        *,
        prompt: str | None = ...,
        input_ids: Ids | None = ...,
        truncate: bool = ...,
        timeout: float | None = ...,
    ) -> list[Classification]: ...
    def classify(
        self,
        text: Text | list[Text] | list[str] | tuple[Text, ...] = "",
        *,
        prompt: str | None = None,
        input_ids: Ids | None = None,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> Classification | list[Classification]:
        """Label a text, or a list of texts.

        Args:
            text: a string, fields of the template by name, or a list of either.
            prompt: name of a prompt with a verbalizer or a head.
            input_ids: ids of one text, instead of `text`, without the prompt's virtual tokens.
            truncate: cut the text where the request exceeds the context; False refuses it.
            timeout: seconds after which the request fails with RequestTimeoutError.
        """
        found: Classification | list[Classification] = self._each(
            text, lambda one: Request(one, prompt, input_ids, "classify", timeout=timeout, truncate=truncate)
        )
        return found

    @overload
    def generate(self, text: Text = ..., **keywords: Any) -> Generation: ...
    @overload
    def generate(self, text: list[Text] | list[str] | tuple[Text, ...], **keywords: Any) -> list[Generation]: ...
    def generate(
        self,
        text: Text | list[Text] | list[str] | tuple[Text, ...] = "",
        *,
        prompt: str | None = None,
        input_ids: Ids | None = None,
        options: GenerationOptions | None = None,
        chat: bool = False,
        truncate: bool = False,
        timeout: float | None = None,
        **settings: Any,
    ) -> Generation | list[Generation]:
        """Generate from a text, or from a list of texts; without `prompt`, exactly the base model.

        `settings` are the fields of `GenerationOptions` (`max_new_tokens=`, `temperature=`, `stop=` ...), instead of
        `options`. The other arguments are those of `classify`; `chat` wraps the text in the chat template.
        """
        chosen = _options(options, settings)
        found: Generation | list[Generation] = self._each(
            text, lambda one: Request(one, prompt, input_ids, "generate", chosen, chat, timeout, truncate)
        )
        return found

    def stream(
        self,
        text: Text = "",
        *,
        prompt: str | None = None,
        input_ids: Ids | None = None,
        options: GenerationOptions | None = None,
        chat: bool = False,
        truncate: bool = False,
        timeout: float | None = None,
        **settings: Any,
    ) -> Iterator[str]:
        """`generate`, piece by piece; closing the iterator cancels the request."""
        chosen = _options(options, settings)
        return self.stream_request(Request(text, prompt, input_ids, "generate", chosen, chat, timeout, truncate))

    def stream_request(self, request: Request) -> Iterator[str]:
        """`stream` of a `Request`."""
        self._open()
        self._ensure(request.prompt)
        return self._engine.stream(request)

    def logits(self, text: Text = "", *, prompt: str | None = None, input_ids: Ids | None = None) -> Array:
        """float32 [vocab_size]: scores of the next token (first decoder step for encoder-decoders)."""
        self._open()
        self._ensure(prompt)
        return self._engine.logits(Request(text, prompt, input_ids))

    def embed(
        self,
        texts: Sequence[Text],
        *,
        prompt: str | None = None,
        pooling: str | None = None,
        input_ids: Sequence[Ids] | None = None,
    ) -> Array:
        """float32 [len(texts), hidden_size]. `pooling` "mean", "cls" or "last"; None takes the package's default."""
        self._open()
        self._ensure(prompt)
        if isinstance(texts, str | Mapping):
            raise InputError("embed takes a list of texts; put the one text into a list")
        if input_ids is not None:
            requests = [Request("", prompt, ids, "embed") for ids in input_ids]
        else:
            requests = [Request(text, prompt, None, "embed") for text in texts]
        return self._engine.embed(requests, pooling)

    def check(self, prompt: str) -> GoldenCheck:
        """Ask a prompt its golden example, and compare with what it answered where it was made.

        Raises:
            InputError: the prompt file holds no golden example.
        """
        return check_golden(self, prompt)

    def calibration(self, prompt: str, texts: Sequence[Text] = CONTENT_FREE) -> tuple[float, ...]:
        """Values for `PromptFile.calibration`: what the verbalizer says about texts without content."""
        results = self.classify(list(texts), prompt=prompt)
        return contextual_calibration([list(result.logits.values()) for result in results])

    def submit(self, request: Request) -> Future[Any]:
        """Queue a request and return at once; `result()` waits, `cancel()` takes effect before the next step.

        Raises:
            CapacityError: the queue is full, or the request is larger than the memory budget.
        """
        self._open()
        self._ensure(request.prompt)
        submit: Callable[[Request], Future[Any]] = getattr(self._engine, "submit", self._batcher.submit)
        return submit(request)

    async def arun(self, requests: Sequence[Request]) -> list[Any]:
        """`run` for asyncio; cancelling the task, or the failure of a request, cancels the others.

        Raises:
            CapacityError: more requests at once than the queue takes; ask in smaller batches.
        """
        from edgeprompt.asynchronous import gather  # here: asyncio is a quarter of the package's import time

        return await gather(self.submit, requests)

    async def aclassify(
        self,
        text: Text = "",
        *,
        prompt: str | None = None,
        input_ids: Ids | None = None,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> Classification:
        """`classify` of one text for asyncio."""
        request = Request(text, prompt, input_ids, "classify", timeout=timeout, truncate=truncate)
        found: Classification = (await self.arun([request]))[0]
        return found

    async def agenerate(
        self,
        text: Text = "",
        *,
        prompt: str | None = None,
        input_ids: Ids | None = None,
        options: GenerationOptions | None = None,
        chat: bool = False,
        truncate: bool = False,
        timeout: float | None = None,
        **settings: Any,
    ) -> Generation:
        """`generate` of one text for asyncio."""
        chosen = _options(options, settings)
        request = Request(text, prompt, input_ids, "generate", chosen, chat, timeout, truncate)
        found: Generation = (await self.arun([request]))[0]
        return found

    def astream(self, text: Text = "", **keywords: Any) -> AsyncIterator[str]:
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
            raise InputError("the runtime is closed; load the package again")

    def _ensure(self, name: str | None) -> None:
        """Add a prompt from a folder when it is first named, and again when its file was replaced."""
        if name is not None:
            self._prompts.ensure(name, lambda path: self.add_prompt(path, name=name))

    def _each(self, text: Text | Sequence[Text], ask: Callable[[Text], Request]) -> Any:
        if isinstance(text, list | tuple):
            return self.run([ask(one) for one in text])
        return self.run([ask(text)])[0]  # type: ignore[arg-type]


def _options(options: GenerationOptions | None, settings: Mapping[str, Any]) -> GenerationOptions:
    unknown = [name for name in settings if name not in _OPTIONS]
    if unknown:
        raise InputError(f"unknown option {unknown[0]!r}; known: {', '.join(_OPTIONS)}")
    if settings and options is not None:
        raise InputError(f"give options= or {next(iter(settings))}=, not both")
    return options or GenerationOptions(**settings)


def _close(batcher: Batcher, engine: Engine) -> None:
    batcher.close()
    engine.close()
    batcher.join()
