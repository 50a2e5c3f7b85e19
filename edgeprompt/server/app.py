"""The endpoints."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from edgeprompt.engines.scheduler import Job
from edgeprompt.errors import PromptChangedError
from edgeprompt.prompts.encoder_text import pair_of
from edgeprompt.runtime import Runtime
from edgeprompt.server import answers, bodies, questions
from edgeprompt.server.failures import INVALID, Failure, busy, failure_of
from edgeprompt.server.gate import Gate, Keys, Record
from edgeprompt.server.log import Log
from edgeprompt.server.metrics import Metrics
from edgeprompt.server.openapi import document
from edgeprompt.server.options import ServerOptions
from edgeprompt.server.questions import Question
from edgeprompt.server.schema import Schema
from edgeprompt.server.stream import EventStream, events

T = TypeVar("T")
THREADS = 8
"""That read prompts and tokenise texts."""
TRIES = 5
"""So often a request begins anew whose prompt's file is replaced while it waits."""
READ_TIMEOUT = 30.0
"""Seconds in which a body has to come."""

DISCARDED = 8
"""A body of up to so many times the limit is read to its end and not kept, so that its sender reads why."""


class Service:
    """One runtime as an ASGI application (`app`)."""

    def __init__(self, runtime: Runtime, options: ServerOptions, *, log: Log, hosts: frozenset[str] | None) -> None:
        """`hosts`: names that a Host header may hold; None: any."""
        self._runtime, self._options, self._log = runtime, options, log
        self._base = runtime.manifest.base.name
        self._started = int(time.time())
        self._metrics = Metrics(runtime.status)
        self._pool = ThreadPoolExecutor(THREADS, "edgeprompt-serve")
        self._jobs: set[Job] = set()
        self._streams = 0
        self._document = document(runtime.manifest, options)
        self._schemas = {
            "completions": bodies.completions(options),
            "chat": bodies.chat(options),
            "embeddings": bodies.embeddings(options),
            "classify": bodies.classify(options),
            "tag": bodies.tag(options),
            "answer": bodies.answer(options),
        }
        routes = {
            "/v1/models": ("GET", self._models),
            "/v1/models/{model:path}": ("GET", self._model),
            "/v1/completions": ("POST", self._completions),
            "/v1/chat/completions": ("POST", self._chat),
            "/v1/embeddings": ("POST", self._embeddings),
            "/v1/classify": ("POST", self._classify),
            "/v1/tag": ("POST", self._tag),
            "/v1/answer": ("POST", self._answer),
            "/health": ("GET", self._health),
            "/metrics": ("GET", self._metrics_text),
            "/openapi.json": ("GET", self._openapi),
        }
        inner = Starlette(
            routes=[Route(path, self._guarded(answer), methods=[method]) for path, (method, answer) in routes.items()],
            exception_handlers={HTTPException: _unknown_path},
        )
        inner.router.redirect_slashes = False
        self.app = Gate(
            inner, keys=Keys(options.api_keys), hosts=hosts, log=log, metrics=self._metrics, endpoints=routes
        )

    def stop(self) -> None:
        """Turn new requests away; those in flight go on."""
        self.app.stopping = True

    def cancel(self) -> None:
        """Cancel what is in flight."""
        for job in tuple(self._jobs):
            job.cancel()

    def close(self) -> None:
        """Cancel, and end the threads."""
        self.cancel()
        self._pool.shutdown(cancel_futures=True)

    def _guarded(self, answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint whose errors become answers."""

        async def guarded(request: Request) -> Response:
            record: Record = request.state.record
            try:
                return await answer(request)
            except ClientDisconnect:
                record.gone = True
                return Response(status_code=400)  # to nobody
            except Exception as error:
                failure = failure_of(error, record.model or "")
                record.error = failure.code
                if not isinstance(error, Failure) and (failure.status >= 500 or failure.code == "model_not_servable"):
                    self._log.failed(record.identity, error)
                if failure.code == "model_not_found":
                    record.model = None
                return json_response(failure.body(), failure.status, failure.headers)

        return guarded

    async def _health(self, _: Request) -> Response:
        stopping = self.app.stopping
        return json_response({"status": "stopping" if stopping else "ok"}, 503 if stopping else 200)

    async def _metrics_text(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _openapi(self, _: Request) -> Response:
        return json_response(self._document)

    async def _models(self, _: Request) -> Response:
        names = await self._in_thread(lambda: self._runtime.prompts)
        found = [self._base, *(name for name in names if name != self._base)]
        return json_response({"object": "list", "data": [self._listed(name) for name in found]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name == self._base:
            return json_response({**self._listed(name), "architecture": self._runtime.manifest.architecture})
        request.state.record.model = name
        prompt = await self._in_thread(lambda: self._runtime.describe(name))
        labels = [*(prompt.labels or prompt.verbalizer)]
        facts = {"parent": self._base, "task": prompt.task, "method": prompt.method, "labels": labels}
        return json_response({**self._listed(name), **facts, "slots": [*prompt.template.slots]})

    def _listed(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "edgeprompt"}

    async def _completions(self, request: Request) -> Response:
        body = await self._body(request, "completions")
        return await self._generate(request, questions.completion(body, self._base, self._options), body, chat=False)

    async def _chat(self, request: Request) -> Response:
        body = await self._body(request, "chat")
        return await self._generate(request, questions.chat(body, self._base, self._options), body, chat=True)

    async def _generate(self, request: Request, question: Question, body: dict[str, Any], *, chat: bool) -> Response:
        record: Record = request.state.record
        identity = f"{'chatcmpl' if chat else 'cmpl'}-{record.identity}"
        kind = "chat.completion" if chat else "text_completion"
        choices = int(body.get("n", 1))
        record.stream = question.stream
        if question.stream:
            return await self._stream(record, question, identity, kind, choices, chat=chat)
        results = await self._ask(request, question)
        usage = answers.usage_of(results, choices)
        self._note(record, usage, [result.text for result in results])
        for result in results:
            self._metrics.first_token.observe(result.timings.ttft)
        decode, top = self._runtime.tokenizer.decode, question.top_logprobs
        made = [answers.generation_choice(i, one, decode, top, chat=chat) for i, one in enumerate(results)]
        return json_response(answers.envelope(kind, identity, question.model, choices=made, usage=usage.as_json()))

    async def _stream(
        self, record: Record, question: Question, identity: str, kind: str, choices: int, *, chat: bool
    ) -> Response:
        if self._streams >= self._options.max_streams:
            raise busy(f"{self._streams} streams are open, the most that this server allows; try again later")
        self._streams += 1
        self._metrics.streams.inc()
        try:
            pieces: asyncio.Queue[tuple[int, str | None]] = asyncio.Queue()
            jobs = await self._submit(record, question, pieces)
        except BaseException:
            self._end_stream()
            raise

        async def made() -> AsyncIterator[bytes]:
            told: list[Any] = []
            tell = events(
                question, identity, kind, pieces, jobs, self._runtime.tokenizer.decode, choices, chat=chat, told=told
            )
            async for event in tell:
                yield event
            results = [one for one in told if not isinstance(one, BaseException)]
            errors = [one for one in told if isinstance(one, BaseException)]
            if errors:
                failure = failure_of(errors[0], question.model)
                record.error = failure.code
                if failure.status == 500:
                    self._log.failed(record.identity, errors[0])
            self._note(record, answers.usage_of(results, choices), [result.text for result in results])
            for result in results:
                self._metrics.first_token.observe(result.timings.ttft)

        def ended(gone: bool) -> None:
            for job in jobs:
                job.cancel()
            record.gone = gone
            self._end_stream()

        return EventStream(made(), ended, send_timeout=self._options.timeout)

    def _end_stream(self) -> None:
        self._streams -= 1
        self._metrics.streams.dec()

    async def _embeddings(self, request: Request) -> Response:
        body = await self._body(request, "embeddings")
        question = questions.embedding(body, self._base, self._options)
        results, tokens = await self._read(request, question)
        self._note(request.state.record, answers.Usage(tokens, 0), None)
        identity = f"embd-{request.state.record.identity}"
        return json_response(answers.embeddings(question, results, tokens, identity))

    async def _classify(self, request: Request) -> Response:
        body = await self._body(request, "classify")
        question = questions.labelling(body, self._base, self._options, "classify")
        results = await self._ask(request, question)
        self._note(request.state.record, answers.usage_of(results), [result.label for result in results])
        return json_response(answers.classifications(question, results, f"cls-{request.state.record.identity}"))

    async def _tag(self, request: Request) -> Response:
        body = await self._body(request, "tag")
        question = questions.labelling(body, self._base, self._options, "tag")
        results, tokens = await self._read(request, question)
        said = [", ".join(f"{span.label}:{span.text}" for span in one.spans) for one in results]
        self._note(request.state.record, answers.Usage(tokens, 0), said)
        return json_response(answers.taggings(question, results, tokens, f"tag-{request.state.record.identity}"))

    async def _answer(self, request: Request) -> Response:
        body = await self._body(request, "answer")
        name = body["model"]
        if name == self._base:
            message = f"the base {name!r} finds no answers; give the name of a prompt for question answering"
            raise Failure(400, message, INVALID, "unsupported", "model")
        template = (await self._in_thread(lambda: self._runtime.describe(name))).template
        question = questions.answering(body, self._base, self._options, pair_of(template))
        results, tokens = await self._read(request, question)
        self._note(request.state.record, answers.Usage(tokens, 0), [result.text for result in results])
        return json_response(answers.found_answers(question, results, tokens, f"ans-{request.state.record.identity}"))

    async def _read(self, request: Request, question: Question) -> tuple[list[Any], int]:
        """The answers to a question, and the tokens of its texts."""
        results = await self._ask(request, question)
        return results, await self._in_thread(lambda: sum(map(self._count, question.requests)))

    def _count(self, request: Any) -> int:
        """Tokens of a request's own text."""
        if request.input_ids is not None:
            return len(request.input_ids)
        texts = [request.text] if isinstance(request.text, str) else request.text.values()
        return sum(len(self._runtime.tokenizer.encode(text)) for text in texts)

    def _note(self, record: Record, usage: answers.Usage, said: Sequence[str] | None) -> None:
        record.input_tokens, record.output_tokens = usage.input_tokens, usage.output_tokens
        if self._log.texts:
            record.text = {**(record.text or {}), "answered": said}

    async def _body(self, request: Request, name: str) -> dict[str, Any]:
        """The body, within the limits."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page of another site can send other kinds without being asked
            raise Failure(415, "send the body with 'Content-Type: application/json'", code="wrong_content_type")
        too_large = Failure(413, f"the body is larger than {self._options.max_body} bytes", code="body_too_large")
        data, size = bytearray(), 0
        try:
            async with asyncio.timeout(READ_TIMEOUT):
                async for piece in request.stream():
                    size += len(piece)
                    if size <= self._options.max_body:
                        data += piece
                    elif size > DISCARDED * self._options.max_body:
                        break
            if size > self._options.max_body:
                raise too_large
        except TimeoutError:
            raise Failure(408, f"the body did not come within {READ_TIMEOUT:g} s", code="timeout") from None
        schema: Schema = self._schemas[name]
        body = questions.read_body(bytes(data), schema)
        if self._log.texts:
            request.state.record.text = {"asked": body}
        return body

    async def _ask(self, request: Request, question: Question) -> list[Any]:
        """The answers; where a prompt's file is replaced meanwhile, those of the new one."""
        for _ in range(TRIES - 1):
            with suppress(PromptChangedError):
                return await self._ask_once(request, question)
        return await self._ask_once(request, question)

    async def _ask_once(self, request: Request, question: Question) -> list[Any]:
        """The answers; a client that goes away cancels its requests."""
        jobs = await self._submit(request.state.record, question)
        found = asyncio.gather(*map(asyncio.wrap_future, jobs))
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((found, gone), return_when=asyncio.FIRST_COMPLETED)
            if not found.done():
                raise ClientDisconnect
            return list(found.result())
        finally:
            gone.cancel()
            for job in jobs:
                job.cancel()
            if not found.done():
                found.cancel()

    async def _submit(
        self, record: Record, question: Question, pieces: asyncio.Queue[tuple[int, str | None]] | None = None
    ) -> list[Job]:
        """Queue the requests of a question, all or none; what is generated goes into `pieces`, None at the end."""
        loop = asyncio.get_running_loop()
        record.model = question.model

        def listener(into: asyncio.Queue[tuple[int, str | None]], index: int) -> Callable[[str], None]:
            return lambda piece: _call(loop, into.put_nowait, (index, piece))

        listeners = [] if pieces is None else [listener(pieces, index) for index in range(len(question.requests))]

        def submit() -> list[Job]:  # in a thread: prompts may have to be read, and texts are tokenised
            return self._runtime.submit_all(question.requests, listeners)

        future = self._pool.submit(submit)
        try:
            jobs = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(_cancel_submitted)
            raise
        for index, job in enumerate(jobs):
            self._jobs.add(job)
            job.add_done_callback(partial(_call, loop, self._jobs.discard, job))
            if pieces is not None:
                job.add_done_callback(partial(_call, loop, pieces.put_nowait, (index, None)))
        return jobs

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer; NaN is an error, not JSON."""
    data = json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    return Response(data, status, headers, "application/json")


async def _unknown_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "there is no such path", 405: "this path takes another method"}.get(error.status_code, error.detail)
    failure = Failure(error.status_code, f"{what}; /openapi.json lists them", INVALID, "unknown_path")
    request.state.record.error = failure.code
    return json_response(failure.body(), failure.status, dict(error.headers or {}))


async def _gone(request: Request) -> None:
    """Wait until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _cancel_submitted(future: Future[list[Job]]) -> None:
    if not future.cancelled() and future.exception() is None:
        for job in future.result():
            job.cancel()


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[T], object], argument: T, _: object = None) -> None:
    """`call_soon_threadsafe`, also where the loop has ended."""
    try:
        loop.call_soon_threadsafe(function, argument)
    except RuntimeError:
        if not loop.is_closed():
            raise
