"""Serves encoder-decoder packages: the encoder once per text, then the decoder step by step for all rows together.

Prompt embeddings stand in the encoder's text, prefixes in the decoder's self-attention. A batch is mixed as it comes:
prompts, tasks, beams and lengths differ from row to row.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprompt import names
from edgeprompt.decoding.beam_search import BeamSearch
from edgeprompt.decoding.sampling import Sampling, resolve
from edgeprompt.decoding.strategies import Clock, GenerateWork, LogitsWork
from edgeprompt.engines.base import side_by_side
from edgeprompt.engines.seq2seq.graphs import Seq2SeqGraphs, Source, SourceRow
from edgeprompt.engines.seq2seq.jobs import Beams, Cancellation, Decision, Ending, Job, OneRow, WordScores, run_jobs
from edgeprompt.engines.seq2seq.prompts import ENCODER_PAST, Prompt, PromptShelf
from edgeprompt.errors import InputError, PackageError, RequestCancelledError, UnsupportedError
from edgeprompt.heads.answers import tag, token_logits
from edgeprompt.options import EngineOptions
from edgeprompt.ort.kv_cache import KVShape
from edgeprompt.ort.memory_budget import MemoryBudget
from edgeprompt.ort.session import Sessions
from edgeprompt.package.folder import Package
from edgeprompt.prompts.encoder_text import fields_of, located_slot
from edgeprompt.prompts.file import PromptFile
from edgeprompt.prompts.source import PromptSource
from edgeprompt.prompts.template import as_fields
from edgeprompt.request import Request, Tagging

KV_BUDGET = 1 << 30
POOLINGS = ("mean", "cls", "last")


@dataclass
class _Item:
    """A request on its way through a batch."""

    source: SourceRow
    prefix: npt.NDArray[Any] | None
    prefix_length: int
    job: Job
    width: int
    positions: int
    """Most positions of self-attention and cross-attention that one of its rows takes."""


class Seq2SeqEngine:
    """The engine of encoder-decoder packages (`edgeprompt.engines.base.Engine`)."""

    def __init__(self, package: Package, options: EngineOptions, sessions: Sessions) -> None:
        """Take both graphs.

        Raises:
            PackageError: a graph does not load, or the manifest names no token that the decoder starts with.
            ProviderError: the provider is not there.
        """
        manifest = package.manifest
        start = manifest.tokens.decoder_start
        start = manifest.tokens.bos if start is None else start
        if start is None:
            raise PackageError("the manifest names no decoder_start token; export the base again")
        self._start: int = start
        self._manifest, self._geometry = manifest, manifest.geometry
        self._graphs = Seq2SeqGraphs(package, sessions)
        self._tokenizer = package.tokenizer
        self.provider = self._graphs.provider
        # Dynamic quantisation takes one scale per tensor: rows of one batch would change each other's results.
        self._max_rows = 1 if manifest.precision == "int8" else options.max_batch
        size = manifest.geometry
        shape = KVShape(size.num_layers, size.num_key_value_heads, size.head_size, manifest.kv_dtype)
        self._position_bytes = shape.bytes_per_position
        self._budget = MemoryBudget(options.kv_budget or KV_BUDGET)
        self._prompts = PromptShelf(package, options.prefix_budget, has_encoder_prefix=self._graphs.has_encoder_prefix)
        self._cancellation, self._lanes = Cancellation(), options.lanes

    def add_prompt(self, name: str, prompt: PromptFile | PromptSource) -> None:
        """Make a checked prompt ready under `name`, replacing one of that name.

        Raises:
            BaseMismatchError: its tensors do not fit the package.
            UnsupportedError: it needs what encoder-decoders do not have.
            PromptFileError: its decoder prefix is no text and no list of token ids.
            TemplateError: its template has no place for its virtual tokens.
        """
        self._prompts.add(name, prompt if isinstance(prompt, PromptSource) else PromptSource(prompt))

    def remove_prompt(self, name: str) -> None:
        """Forget a prompt; requests that already run keep it.

        Raises:
            PromptNotFoundError: there is none of that name.
        """
        self._prompts.remove(name)

    def run(self, requests: Sequence[Request], *, return_errors: bool = False) -> list[Any]:
        """Answer a batch of mixed tasks, in order; with `return_errors`, a failed row is its exception."""
        results: list[Any] = [None] * len(requests)
        items: dict[int, _Item] = {}
        for place, request in enumerate(requests):
            try:
                task = self._task(request)
                if task == "embed":
                    results[place] = self.embed([request], None)[0]
                elif task == "tag":
                    results[place] = self._tag(request)
                else:
                    items[place] = self._item(request)
            except Exception as error:
                if not return_errors:
                    raise
                results[place] = error

        def answer(batch: Sequence[int]) -> None:
            self._run_batch([items[place] for place in batch])
            for place in batch:
                job = items[place].job
                if job.error is not None and not return_errors:
                    raise job.error
                results[place] = job.error or job.decision.result()

        side_by_side(self._lanes, answer, list(self._batches(items)))
        return results

    def stream(self, request: Request) -> Iterator[str]:
        """Generate piece by piece; with beams, the whole text comes at the end."""
        pieces: list[str] = []
        task = self._task(request)
        if task != "generate":
            raise UnsupportedError(f"task {task!r} has no text to stream; use run")
        item = self._item(request, pieces)
        for _ in self._steps([item]):
            if pieces:
                yield "".join(pieces)
                pieces.clear()
        if item.job.error is not None:
            raise item.job.error
        if isinstance(item.job.decision, Beams):
            yield item.job.decision.result().text

    def logits(self, request: Request) -> npt.NDArray[np.float32]:
        """float32 [vocab_size]: scores of the answer's first token, behind the prompt's decoder prefix."""
        prompt = self._prompt(request)
        work = LogitsWork()
        item = self._assemble(request, prompt, OneRow(work, Ending(1)), rows=1, new_tokens=1)
        self._run_batch([item])
        if item.job.error is not None:
            raise item.job.error
        return work.result()

    def embed(self, requests: Sequence[Request], pooling: str | None) -> npt.NDArray[np.float32]:
        """float32 [len(requests), hidden_size]: the encoder's states over the text's tokens, virtual ones left out."""
        pooling = pooling or self._manifest.pooling
        if pooling not in POOLINGS:
            raise InputError(f"pooling is {pooling!r}, allowed: {', '.join(POOLINGS)}")
        self._check_open()
        rows = [self._source(request, self._prompt(request)) for request in requests]
        found = np.zeros((len(rows), self._geometry.hidden_size), np.float32)
        order = sorted(range(len(rows)), key=lambda place: rows[place].ids.size)
        for first in range(0, len(order), self._max_rows):
            batch = order[first : first + self._max_rows]
            source = self._graphs.encode([rows[place] for place in batch])
            for row, place in enumerate(batch):
                found[place] = _pooled(source, row, rows[place].ids < self._geometry.vocab_size, pooling)
        return found

    def _tag(self, request: Request) -> Tagging:
        """Spans of a text, by the prompt's head on the encoder's states."""
        prompt = self._prompt(request)
        if prompt is None or prompt.file.task != "tag":
            raise InputError("task 'tag' needs a prompt that was trained for it")
        fields = fields_of(request)
        self._check_open()
        encoded = self._prompts.words(prompt, fields, self._geometry.max_positions or None, truncate=request.truncate)
        table = self._prompts.tensor(prompt, names.PROMPT_EMBEDDINGS) if prompt.rows else None
        prefix = self._prompts.tensor(prompt, ENCODER_PAST) if prompt.source.has_encoder_prefix else None
        source = self._graphs.encode([SourceRow(np.asarray(encoded.ids, np.int64), table, prefix)])
        logits = token_logits(prompt.file, source.states[0].astype(np.float32, copy=False), prompt.rows)
        return tag(prompt.file, logits, encoded.offsets, fields[located_slot(prompt.file.template)])

    def close(self) -> None:
        """Fail what runs, after its step; later calls fail at once."""
        self._cancellation.closed = True

    def _prompt(self, request: Request) -> Prompt | None:
        return None if request.prompt is None else self._prompts.find(request.prompt)

    def _task(self, request: Request) -> str:
        prompt = self._prompt(request)
        task = request.task or (prompt.file.task if prompt else "generate")
        if task not in ("classify", "generate", "embed", "tag"):
            raise UnsupportedError(
                f"task {task!r} is not for encoder-decoders ({self._manifest.model_type}); "
                "there are classify, generate, tag and embed"
            )
        return task

    def _item(self, request: Request, pieces: list[str] | None = None) -> _Item:
        prompt = self._prompt(request)
        if self._task(request) == "classify":
            if prompt is None or prompt.verbalizer is None:
                name = "no prompt" if prompt is None else f"prompt {prompt.file.name!r}"
                raise InputError(f"classify needs a prompt with a verbalizer, and {name} has one; use generate")
            clock = Clock()
            decision: Decision = WordScores(prompt.verbalizer, clock)
            longest = max(len(word) for word in prompt.verbalizer.words)
            item = self._assemble(request, prompt, decision, rows=len(prompt.verbalizer.words), new_tokens=longest)
            clock.input_tokens = item.source.ids.size
            return item
        return self._generating(request, prompt, pieces)

    def _generating(self, request: Request, prompt: Prompt | None, pieces: list[str] | None) -> _Item:
        clock = Clock()
        defaults = prompt.file.generation if prompt else {}
        sampling = resolve(request.options, defaults)
        beams = request.options.num_beams if request.options.num_beams != 1 else defaults.get("num_beams", 1)
        if type(beams) is not int or not 1 <= beams <= 64:
            raise InputError(f"num_beams is {beams!r}; it must be an integer between 1 and 64")
        feed = self._feed(prompt)
        tokens = self._manifest.tokens
        length = self._new_tokens(sampling, prompt, len(feed))
        first = tokens.forced_bos if len(feed) == 1 else None
        ending = Ending(length, first, tokens.forced_eos)
        if beams > 1:
            search = _search(sampling, beams, length, tokens.eos, defaults)
            decision: Decision = Beams(search, ending, tokens.eos, self._tokenizer, clock)
        else:
            work = GenerateWork(
                replace(sampling, max_new_tokens=length),
                eos=tokens.eos,
                decode=self._tokenizer.decode,
                encode=self._prompts.encode,
                history=feed,
                clock=clock,
                on_text=None if pieces is None else pieces.append,
            )
            decision = OneRow(work, Ending(length) if sampling.choices else ending)
        item = self._assemble(request, prompt, decision, rows=beams, new_tokens=length)
        clock.input_tokens = item.source.ids.size
        return item

    def _new_tokens(self, sampling: Sampling, prompt: Prompt | None, fed: int) -> int:
        """`max_new_tokens`, or what the decoder's positions leave of it where nobody asked for a length."""
        limit = self._geometry.max_positions
        taken = fed - 1 + (prompt.prefix_length if prompt else 0)
        room = limit - taken if limit else sampling.max_new_tokens
        if sampling.asked_length and sampling.max_new_tokens > room:
            raise InputError(
                f"max_new_tokens is {sampling.max_new_tokens}, and the decoder has {limit} positions, of which the "
                f"prompt leaves {room}; ask for at most that"
            )
        if room < 1:
            raise InputError(f"the prompt takes all of the decoder's {limit} positions; use a shorter one")
        return min(room, sampling.max_new_tokens)

    def _feed(self, prompt: Prompt | None) -> list[int]:
        return [self._start, *(prompt.decoder_prefix if prompt else ())]

    def _assemble(
        self, request: Request, prompt: Prompt | None, decision: Decision, *, rows: int, new_tokens: int
    ) -> _Item:
        self._check_open()
        deadline = None if request.timeout is None else time.monotonic() + request.timeout
        source = self._source(request, prompt)
        feed = self._feed(prompt)
        length = prompt.prefix_length if prompt else 0
        prefix = self._prompts.tensor(prompt, names.PAST_KEY_VALUES) if length else None
        positions = length + len(feed) + new_tokens + source.ids.size
        return _Item(source, prefix, length, Job(feed, decision, deadline), rows, positions)

    def _check_open(self) -> None:
        if self._cancellation.closed:
            raise RequestCancelledError("the runtime is closed")

    def _source(self, request: Request, prompt: Prompt | None) -> SourceRow:
        size = self._geometry
        rows = prompt.rows if prompt else 0
        limit = size.max_positions or None
        if request.chat:
            raise UnsupportedError("chat templates are for decoder-only packages; leave out chat")
        if request.input_ids is not None:
            text = [int(one) for one in request.input_ids]
            bad = next((one for one in text if not 0 <= one < size.vocab_size), None)
            if bad is not None:
                raise InputError(f"input_ids holds {bad}; ids of this base are 0 to {size.vocab_size - 1}")
            if prompt is not None and rows and not prompt.file.template.prompt_is_prefix:
                raise InputError(
                    f"prompt {request.prompt!r} has virtual tokens inside its template, so it needs text, not ids"
                )
            ids = [*range(size.vocab_size, size.vocab_size + rows), *text]
        else:
            ids = self._prompts.text_ids(prompt, as_fields(request.text), limit if request.truncate else None)
        if limit is not None and len(ids) > limit:
            raise InputError(
                f"the request needs {len(ids)} prompt and text tokens; the base holds {limit}; shorten the text, or "
                "set truncate"
            )
        if len(ids) == rows:
            raise InputError("the text has no token, so there is nothing to run; give at least one character")
        table = self._prompts.tensor(prompt, names.PROMPT_EMBEDDINGS) if rows else None
        deep = self._prompts.tensor(prompt, ENCODER_PAST) if prompt and prompt.source.has_encoder_prefix else None
        return SourceRow(np.asarray(ids, np.int64), table, deep)

    def _batches(self, items: dict[int, _Item]) -> Iterator[list[int]]:
        """Places of requests that run together: of similar length, within the row limit and the memory budget."""
        batch: list[int] = []
        rows, longest, alike = 0, 0, 0

        def key(place: int) -> int:
            # A decoder without a mask cannot tell padding: then only pasts of one length go together.
            return 0 if self._graphs.masks_past else items[place].prefix_length

        for place in sorted(items, key=lambda place: (key(place), items[place].positions, place)):
            item = items[place]
            wider, further = rows + item.width, max(longest, item.positions)
            full = wider > self._max_rows or self._bytes(wider, further) > self._budget.total
            if batch and (full or key(place) != alike):
                yield batch
                batch, rows, longest = [], 0, 0
            batch.append(place)
            rows, longest, alike = rows + item.width, max(longest, item.positions), key(place)
        if batch:
            yield batch

    def _bytes(self, rows: int, positions: int) -> int:
        # A step holds its input caches and its output caches.
        return 2 * rows * positions * self._position_bytes

    def _run_batch(self, items: list[_Item]) -> None:
        """Run to the end; an error that is nobody's own is everybody's."""
        try:
            for _ in self._steps(items):
                pass
        except Exception as error:
            for item in items:
                item.job.error = item.job.error or error

    def _steps(self, items: list[_Item]) -> Iterator[None]:
        need = self._bytes(sum(item.width for item in items), max(item.positions for item in items))
        with self._budget.taken(need):
            source = self._graphs.encode([item.source for item in items])
            state = self._graphs.begin(source, [item.prefix for item in items])
            yield from run_jobs(self._graphs, state, [item.job for item in items], self._cancellation)


def _search(sampling: Sampling, beams: int, length: int, eos: Sequence[int], defaults: Any) -> BeamSearch:
    plain = sampling.temperature == 0 and sampling.repetition_penalty == 1
    if not plain or sampling.choices or sampling.stop or sampling.logprobs:
        raise InputError(
            f"num_beams is {beams}, and beam search goes without temperature, repetition_penalty, choices, stop and "
            "logprobs; leave them out, or use num_beams=1"
        )
    penalty, early = defaults.get("length_penalty", 1.0), defaults.get("early_stopping", False)
    if isinstance(penalty, bool) or not isinstance(penalty, (int, float)) or early not in (True, False, "never"):
        raise InputError(
            f"length_penalty is {penalty!r} and early_stopping {early!r}; allowed: a number, and true, false or 'never'"
        )
    return BeamSearch(beams, length, eos, length_penalty=float(penalty), early_stopping=early)


def _pooled(source: Source, row: int, is_text: npt.NDArray[np.bool_], pooling: str) -> npt.NDArray[np.float32]:
    states: npt.NDArray[np.float32] = source.states[row, : is_text.size][is_text].astype(np.float32)
    if pooling == "mean":
        mean: npt.NDArray[np.float32] = states.mean(axis=0)
        return mean
    chosen: npt.NDArray[np.float32] = states[0 if pooling == "cls" else -1]
    return chosen
