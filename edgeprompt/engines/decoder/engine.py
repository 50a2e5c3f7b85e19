"""Decoder-only models: prompts as KV prefixes, requests through the scheduler."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgeprompt import names
from edgeprompt.decoding.detokenizer import TextStream
from edgeprompt.decoding.sampling import DEFAULT_NEW_TOKENS, Sampling, resolve
from edgeprompt.decoding.strategies import Clock, GenerateWork, LogitsWork, PrefixWork, ScoreWork
from edgeprompt.engines.decoder.graph import DecoderGraph, open_graph
from edgeprompt.engines.decoder.head import ClassWork, StateWork, WordWork, check_head_of, check_states, encode_words
from edgeprompt.engines.decoder.prompts import Loaded, PromptStart, Rows
from edgeprompt.engines.scheduler import Job, Scheduler, Work
from edgeprompt.errors import InputError, PromptNotFoundError, TemplateError, UnsupportedError
from edgeprompt.options import EngineOptions
from edgeprompt.ort.kv_cache import KV, KVShape, PrefixCache
from edgeprompt.ort.prefix_store import PrefixStore
from edgeprompt.ort.session import Sessions, graph_inputs, import_onnxruntime
from edgeprompt.package.folder import Package
from edgeprompt.prompts.file import PromptFile
from edgeprompt.prompts.source import PromptSource
from edgeprompt.prompts.template import Literal, Slot, Template, VirtualTokens, as_fields
from edgeprompt.prompts.verbalizer import Verbalizer, ids_behind, text_before_words
from edgeprompt.request import Request

PREFIX_BUDGET = 64 << 20
KV_BUDGET = 1 << 30
TEXT_END = 32
"""Characters of a text's end that decide how a tokenizer splits what follows."""
_CHAT_TEXT = "edgepromptusertext"
_TEXT_ALONE = Template((Slot(),))


class DecoderEngine:
    """Serves a decoder-only package."""

    def __init__(self, package: Package, options: EngineOptions, sessions: Sessions) -> None:
        self._package, self._manifest = package, package.manifest
        size = self._manifest.geometry
        self._vocab, self._limit = size.vocab_size, size.max_positions
        session = sessions["model"]
        self._tokenizer = package.tokenizer
        self.provider = session.provider
        self._shape = KVShape(size.num_layers, size.num_key_value_heads, size.head_size, self._manifest.kv_dtype)
        self._shape.check(graph_inputs(session.ort))
        budget = options.kv_budget or max(KV_BUDGET, min(self._limit, 4096) * self._shape.bytes_per_position)
        lanes = options.lanes or 1
        self._prefixes = PrefixCache(PREFIX_BUDGET if options.prefix_budget is None else options.prefix_budget)
        self._store = None
        if options.cache_folder is not None:
            self._store = PrefixStore(
                options.cache_folder,
                weights_hash=self._manifest.weights_hash,
                provider=self.provider,
                dtype=self._shape.dtype,
                ort_version=import_onnxruntime().__version__,
            )
        self._prompts: dict[str, Loaded] = {}
        self._lanes = []
        """Schedulers that run side by side, each with a cache of its own."""
        for _ in range(lanes):
            graph = open_graph(
                session,
                package.graph("model"),
                self._shape,
                hidden_size=size.hidden_size,
                max_rows=options.max_batch,
                budget=budget // lanes,
                batch_invariant=options.batch_invariant,
            )
            self._lanes.append(Scheduler(graph, max_rows=options.max_batch, max_queue=-(-options.max_queue // lanes)))

    def add_prompt(self, name: str, prompt: PromptFile | PromptSource) -> None:
        """Make a checked prompt ready under `name`, replacing one of that name.

        Its prefix is computed now where the budget has room for it, else when it is first asked for.
        """
        source = prompt if isinstance(prompt, PromptSource) else PromptSource(prompt)
        prompt = source.prompt
        if source.has_encoder_prefix:
            raise UnsupportedError(f"prompt {name!r} has encoder_past_key_values, and this base has no encoder")
        if prompt.head_spec is not None:
            check_head_of(name, prompt, self._manifest, self._lanes[0].graph)
        self._try_template(name, source)
        verbalizer = None
        if prompt.verbalizer:
            verbalizer = Verbalizer.compile(
                prompt.verbalizer,
                lambda text: self._tokenizer.encode(text, add_special_tokens=False),
                prompt.calibration,
                prompt.verbalizer_aggregation,
                text_before_words(self._chat(prompt.template) if prompt.generation.get("chat") else prompt.template),
            )
        # Question answering as PEFT trains it reads the states of virtual tokens too, so these are run with the text.
        unshifted = prompt.head_spec is not None and prompt.head_spec.input == "tokens_unshifted"
        as_prefix = source.has_past or (prompt.template.prompt_is_prefix and not unshifted)
        loaded = Loaded(source, prompt.template, verbalizer, source.num_virtual_tokens, as_prefix)
        old = self._prompts.get(name)
        self._prompts[name] = loaded
        if old is not None:
            self._prefixes.remove(old)
        size = loaded.count * self._shape.bytes_per_position
        if loaded.count and as_prefix and self._prefixes.has_room(size):
            self._warm(loaded)

    def remove_prompt(self, name: str) -> None:
        """Forget a prompt; requests that already run keep it."""
        old = self._prompts.pop(name, None)
        if old is None:
            raise PromptNotFoundError(f"no prompt {name!r}; loaded: {', '.join(self._prompts) or 'none'}")
        self._prefixes.remove(old)

    def run(self, requests: Sequence[Request], *, return_errors: bool = False) -> list[Any]:
        """Answer a batch of mixed tasks, in order."""
        jobs: list[Job | Exception] = []
        try:
            for request in requests:
                try:
                    jobs.append(self.submit(request, wait=True))
                except Exception as error:
                    if not return_errors:
                        raise
                    jobs.append(error)
            return [_outcome(job, return_errors) for job in jobs]
        except BaseException:
            for job in jobs:
                if isinstance(job, Job):
                    job.cancel()
            raise

    def submit(self, request: Request, *, wait: bool = False) -> Job:
        """Queue one request; the Future gives its result, and can be cancelled at any time."""
        return self._submit(request, None, wait=wait)

    def stream(self, request: Request) -> Iterator[str]:
        """Generate piece by piece; closing the iterator cancels the request."""
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        job = self._submit(replace(request, task="generate"), pieces, wait=True)
        return TextStream(pieces, job)

    def logits(self, request: Request) -> Rows:
        """float32 [vocab_size]: scores of the next token."""
        loaded, template = self._find(request)
        ids = self._encode(request, loaded, template, Sampling(max_new_tokens=0))
        start = self._start(loaded, ids, 0)
        found: Rows = self._lane().submit(Job(start, LogitsWork(), request.timeout), wait=True).result()
        return found

    def embed(self, requests: Sequence[Request], pooling: str | None) -> Rows:
        """float32 [len(requests), hidden_size]: the last token's final hidden state."""
        if pooling not in (None, "last"):
            raise InputError(f"pooling {pooling!r} needs an encoder package; a decoder-only one gives 'last'")
        return np.stack(self.run([replace(request, task="embed") for request in requests]))

    def close(self) -> None:
        """Fail what is waiting and stop the scheduler."""
        for lane in self._lanes:
            lane.close()

    def prefix(self, loaded: Loaded, graph: DecoderGraph, slot: int, total: int) -> KV:
        """A prompt's keys and values, computed on this graph (scheduler's thread only)."""
        found = self._prefixes.get(loaded)
        if found is None:
            found = self._stored(loaded)
            if found is None:
                found = self._compute(loaded, graph, slot, total)
                if self._store is not None:
                    self._store.write(loaded.source.sha256, found)
            self._prefixes.put(loaded, found)
        return found

    def _stored(self, loaded: Loaded) -> KV | None:
        if self._store is None:
            return None
        size = self._shape
        return self._store.read(
            loaded.source.sha256, (2 * size.num_layers, size.num_heads, loaded.count, size.head_size)
        )

    def _compute(self, loaded: Loaded, graph: DecoderGraph, slot: int, total: int) -> KV:
        tensors = loaded.source.tensors()
        if tensors.past_key_values is not None:
            return self._shape.prefix(tensors.past_key_values)
        graph.place(slot, None, max(total, loaded.count), slot)
        ids = range(self._vocab, self._vocab + loaded.count)
        rows = np.asarray(tensors.prompt_embeddings, np.float32)
        for done in range(0, loaded.count, graph.chunk):
            graph.prefill(slot, ids[done : done + graph.chunk], done, rows)
        return graph.read(slot, loaded.count)

    def rows(self, loaded: Loaded) -> Rows:
        """A prompt's rows, float32 [num_virtual_tokens, hidden_size]."""
        key = (loaded, names.PROMPT_EMBEDDINGS)
        found = self._prefixes.get(key)
        if found is None:
            found = np.ascontiguousarray(loaded.source.tensors().prompt_embeddings, np.float32)
            self._prefixes.put(key, found)
        return found.astype(np.float32, copy=False)

    def _try_template(self, name: str, source: PromptSource) -> None:
        template, count = source.prompt.template, source.num_virtual_tokens
        if source.has_past or not count:
            count = 0
        elif not any(isinstance(part, VirtualTokens) for part in template.parts):
            raise TemplateError(
                f"prompt {name!r} has {count} virtual tokens, and its template {str(template)!r} no {{prompt}}"
            )
        fields = dict.fromkeys(template.slots, "a")
        template.encode(self._tokenizer, fields, num_virtual_tokens=count, first_virtual_id=self._vocab)

    def _warm(self, loaded: Loaded) -> None:
        start = PromptStart(self, loaded, [], loaded.count)
        self._lane().submit(Job(start, PrefixWork(), None), wait=True).result()

    def _lane(self) -> Scheduler:
        """Where the next request has least to wait for."""
        return min(self._lanes, key=lambda lane: lane.load)

    def _submit(self, request: Request, pieces: queue.SimpleQueue[str | None] | None, *, wait: bool) -> Job:
        clock = Clock()
        loaded, template = self._find(request)
        lane = self._lane()
        task = request.task or (loaded.prompt.task if loaded else "generate")
        states: list[Rows] | None = None
        sampling = Sampling(max_new_tokens=0)
        if task in ("tag", "qa"):
            if loaded is None or loaded.prompt.task != task:
                raise InputError(f"task {task!r} needs a prompt that was trained for it")
            encoded = encode_words(request, loaded, self._tokenizer, first_virtual_id=self._vocab, limit=self._limit)
            ids, states = encoded.ids, []
            work: Work = WordWork(states, loaded, encoded, request)
        elif task == "embed" or (task == "classify" and loaded and loaded.prompt.head_spec):
            check_states(lane.graph)
            ids, states = self._encode(request, loaded, template, sampling), []
            work = StateWork(states) if loaded is None or task == "embed" else ClassWork(states, loaded.prompt, clock)
        elif task == "classify":
            sampling = Sampling(max_new_tokens=self._deepest(request, loaded), asked_length=True)
            ids = self._encode(request, loaded, template, sampling)
            assert loaded is not None
            assert loaded.verbalizer is not None
            work = ScoreWork(loaded.verbalizer, clock)
        elif task == "generate":
            if request.options.num_beams != 1:
                raise UnsupportedError("num_beams is for encoder-decoders; decoders generate greedily or sample")
            sampling = resolve(request.options, loaded.prompt.generation if loaded else {})
            ids = self._encode(request, loaded, template, sampling)
            sampling = self._room(sampling, len(ids) + self._prefix_length(loaded))
            work = GenerateWork(
                sampling,
                eos=self._manifest.tokens.eos,
                decode=self._tokenizer.decode,
                encode=lambda choice: ids_behind(
                    lambda text: self._tokenizer.encode(text, add_special_tokens=False),
                    self._text_end(request, template),
                    choice,
                ),
                history=[token for token in ids if token < self._vocab],
                clock=clock,
                on_text=pieces.put if pieces is not None else None,
            )
        else:
            raise UnsupportedError(f"task {task!r} is not known; there are classify, generate, tag, qa and embed")
        clock.input_tokens = len(ids)
        start = replace(self._start(loaded, ids, sampling.max_new_tokens), states=states)
        job = Job(start, work, request.timeout)
        lane.submit(job, wait=wait)
        return job

    def _find(self, request: Request) -> tuple[Loaded | None, Template]:
        if request.prompt is None:
            return None, _TEXT_ALONE
        loaded = self._prompts.get(request.prompt)
        if loaded is None:
            there = ", ".join(list(self._prompts)[:20]) or "none"
            raise PromptNotFoundError(f"no prompt {request.prompt!r}; loaded: {there}")
        return loaded, loaded.template

    def _deepest(self, request: Request, loaded: Loaded | None) -> int:
        if loaded is None or loaded.verbalizer is None:
            raise InputError(
                f"prompt {request.prompt!r} has no verbalizer, which classify needs; tune it with label words"
                if loaded
                else "classify needs a prompt with a verbalizer; add one and name it with prompt="
            )
        return max(len(word) for word in loaded.verbalizer.words)

    def _prefix_length(self, loaded: Loaded | None) -> int:
        return loaded.count if loaded is not None and loaded.as_prefix else 0

    def _encode(self, request: Request, loaded: Loaded | None, template: Template, sampling: Sampling) -> list[int]:
        """Ids behind the prefix, all checked; the text's length is checked before any work starts."""
        new = sampling.max_new_tokens if sampling.asked_length else min(sampling.max_new_tokens, 1)
        prefix = self._prefix_length(loaded)
        if request.input_ids is not None:
            ids = self._given(request, loaded)
        else:
            ids = self._tokenise(
                request, loaded, template, self._limit - new if self._limit and request.truncate else None
            )
        if not ids and not (loaded is not None and prefix and not loaded.source.has_past):
            raise InputError("the text has no token, so there is nothing to run; give at least one character")
        if self._limit and prefix + len(ids) + new > self._limit:
            raise InputError(
                f"the request needs {prefix} prompt, {len(ids)} text and {new} new tokens; the base holds "
                f"{self._limit}; shorten the text, lower max_new_tokens, or set truncate"
            )
        return ids

    def _given(self, request: Request, loaded: Loaded | None) -> list[int]:
        ids = [int(token) for token in request.input_ids or ()]
        bad = next((token for token in ids if not 0 <= token < self._vocab), None)
        if bad is not None:
            raise InputError(f"input_ids holds {bad}; ids of this base are 0 to {self._vocab - 1}")
        if loaded is not None and not loaded.as_prefix:
            raise InputError(
                f"prompt {request.prompt!r} has virtual tokens inside its template, so it needs text, not ids"
            )
        return ids

    def _tokenise(self, request: Request, loaded: Loaded | None, template: Template, limit: int | None) -> list[int]:
        prompt = loaded.prompt if loaded else None
        special = prompt.add_special_tokens if prompt else True
        if request.chat or (prompt and prompt.generation.get("chat")):
            template, special = self._chat(template), False
        inside = loaded is not None and not loaded.source.has_past
        virtual = loaded.count if loaded is not None and inside else 0
        prefix = self._prefix_length(loaded)
        if limit is not None and not inside:
            limit -= prefix
        ids = template.encode(
            self._tokenizer,
            as_fields(request.text),
            num_virtual_tokens=virtual,
            first_virtual_id=self._vocab,
            max_length=limit,
            add_special_tokens=special,
        )
        if inside and prefix:
            ids = ids[virtual:]
        high = self._vocab + (virtual if not prefix else 0)
        if ids and max(ids) >= high:
            raise InputError(f"the tokenizer gave id {max(ids)}, and the base has {self._vocab} tokens")
        return ids

    def _text_end(self, request: Request, template: Template) -> str:
        """The end of the text that an answer stands behind; empty where only ids are known."""
        if request.input_ids is not None:
            return ""
        loaded, _ = self._find(request)
        chat = request.chat or (loaded is not None and loaded.prompt.generation.get("chat"))
        last = (self._chat(template) if chat else template).parts[-1]
        if isinstance(last, Slot):
            return as_fields(request.text)[last.name][-TEXT_END:]
        return last.text if isinstance(last, Literal) else ""

    def _chat(self, template: Template) -> Template:
        """The template's text as the user's turn in the package's chat template, behind leading virtual tokens."""
        before, after = self._tokenizer.chat(_CHAT_TEXT).split(_CHAT_TEXT)
        lead = 1 if template.parts and isinstance(template.parts[0], VirtualTokens) else 0
        return Template((*template.parts[:lead], Literal(before), *template.parts[lead:], Literal(after)))

    def _room(self, sampling: Sampling, used: int) -> Sampling:
        """A default length may shrink to what the context has left."""
        if sampling.asked_length or not self._limit:
            return sampling
        return replace(sampling, max_new_tokens=min(DEFAULT_NEW_TOKENS, self._limit - used))

    def _start(self, loaded: Loaded | None, ids: list[int], new: int) -> PromptStart:
        prefix = self._prefix_length(loaded)
        total = prefix + len(ids) + new
        if ids or loaded is None:
            return PromptStart(self, loaded, ids, total)
        return PromptStart(self, loaded, [self._vocab + prefix - 1], total, whole=False)


def _outcome(job: Job | Exception, return_errors: bool) -> Any:
    if isinstance(job, Exception):
        return job
    if not return_errors:
        return job.result()
    error = job.exception()
    return job.result() if error is None else error
