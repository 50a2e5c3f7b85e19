"""Decoder-only models: prompts as KV prefixes, requests through the scheduler."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from edgeprompt import names
from edgeprompt.decoding.drafts import USUAL, USUAL_INT8, PromptLookup, StepCosts
from edgeprompt.decoding.processors import Processors, generation_fields
from edgeprompt.decoding.sampling import DEFAULT_NEW_TOKENS, resolve
from edgeprompt.decoding.strategies import Generate, PrefixOnly, ReadLogits, ScoreWords, Strategy
from edgeprompt.engines.base import Engine, check_template, compile_words, given_ids
from edgeprompt.engines.decoder.graph import BLOCK, DecoderGraph, open_graph
from edgeprompt.engines.decoder.head import ClassifyState, LabelWords, ReadState, check_head_of, check_states
from edgeprompt.engines.decoder.lane import DecoderJob, DecoderLane
from edgeprompt.engines.decoder.prefixes import Prefixes
from edgeprompt.engines.scheduler import Scheduler
from edgeprompt.errors import CapacityError, InputError, UnsupportedError
from edgeprompt.options import EngineOptions
from edgeprompt.ort.kv_cache import KV, KVShape, PrefixCache
from edgeprompt.ort.prefix_store import PrefixStore, facts_of
from edgeprompt.ort.session import Sessions, graph_inputs, import_onnxruntime
from edgeprompt.ort.session_file import SavedSession, read_session, write_session
from edgeprompt.package.folder import Package
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.encoder_text import encode_text, fields_of, located_slot
from edgeprompt.prompts.registry import LoadedPrompt
from edgeprompt.prompts.template import Literal, Slot, Template, VirtualTokens, as_fields
from edgeprompt.prompts.verbalizer import ids_behind, text_before_words
from edgeprompt.request import Clock, Message, Request

PREFIX_BUDGET = 64 << 20
KV_BUDGET = 1 << 30
TEXT_END = 32
"""Characters of a text's end that decide how a tokenizer splits what follows."""
_CHAT_TEXT = "edgepromptusertext"
_TEXT_ALONE = Template((Slot(),))


class DecoderEngine(Engine):
    """Serves a decoder-only package."""

    def __init__(self, package: Package, options: EngineOptions, sessions: Sessions) -> None:
        self._manifest, self._tokenizer = package.manifest, package.tokenizer
        size = self._manifest.geometry
        self._vocab, self._limit = size.vocab_size, size.max_positions
        session = sessions["model"]
        self.provider = session.provider
        shape = KVShape(size.num_layers, size.num_key_value_heads, size.head_size, self._manifest.kv_dtype)
        shape.check(graph_inputs(session.ort))
        budget = options.kv_budget or max(KV_BUDGET, min(self._limit, 4096) * shape.bytes_per_position)
        lanes = options.workers or 1
        self.derived = PrefixCache(PREFIX_BUDGET if options.prefix_budget is None else options.prefix_budget)
        facts = facts_of(
            weights_hash=self._manifest.weights_hash,
            provider=self.provider,
            dtype=shape.dtype,
            ort_version=import_onnxruntime().__version__,
        )
        store = None if options.cache_folder is None else PrefixStore(options.cache_folder, facts)
        self._prefixes = Prefixes(self.derived, shape, self._vocab, store, texts=options.reuse_texts)
        self._shape = shape
        self._session_facts: dict[str, Any] = {**facts, "block": BLOCK}
        """What the keys and values of a session depend on beside the prompt and the text."""
        self._lanes = []
        """Each with a cache of its own."""
        for _ in range(lanes):
            graph = open_graph(
                session,
                shape,
                in_place=package.manifest.kv_in_place,
                hidden_size=size.hidden_size,
                max_rows=options.max_batch,
                budget=budget // lanes,
                batch_invariant=options.batch_invariant,
            )
            costs = StepCosts(USUAL_INT8 if self._manifest.precision == "int8" else USUAL)
            self._lanes.append(DecoderLane(graph, self._prefixes, max_rows=options.max_batch, costs=costs))
        self._graph = self._lanes[0].graph
        self._drafts = Drafts(self._manifest, self._graph, self.provider, options)
        self.scheduler = Scheduler(self._lanes, max_queue=options.max_queue)

    def accept(self, prompt: LoadedPrompt) -> None:
        """Check a prompt; its prefix is computed now where the budget has room, else when it is first asked for."""
        file = prompt.file
        if prompt.has_encoder_prefix:
            raise UnsupportedError(f"prompt {prompt.name!r} has encoder_past_key_values, and this base has no encoder")
        if file.head_spec is not None:
            check_head_of(prompt.name, file, self._manifest, self._graph)
        check_template(prompt, infix=True)
        self._ids(prompt, file.template, dict.fromkeys(file.template.slots, "a"))
        if file.verbalizer:
            before = self._chat_end(()) if file.generation.get("chat") else text_before_words(file.template)
            prompt.verbalizer = compile_words(prompt, self._tokenizer, before)
        if prompt.num_virtual_tokens and prompt.is_prefix and self._prefixes.has_room(prompt):
            job = DecoderJob(prompt, [], PrefixOnly())
            self._check_room(job)
            self.scheduler.submit([job], wait=True)
            job.result()

    def prepare(
        self, request: Request, prompt: LoadedPrompt | None, on_text: Callable[[str], None] | None
    ) -> DecoderJob:
        """Check and encode a request."""
        task = request.task or (prompt.file.task if prompt else "generate")
        match task:
            case "generate":
                job = self._generate(request, prompt, on_text)
            case "classify":
                job = self._classify(request, prompt)
            case "tag" | "qa":
                job = self._words(request, prompt, task)
            case "embed":
                if request.pooling not in (None, "last"):
                    raise InputError(
                        f"pooling {request.pooling!r} needs an encoder package; a decoder-only one gives 'last'"
                    )
                check_states(self._graph)
                states: list[npt.NDArray[np.float32]] = []
                ids = self._encode(request, prompt)
                job = self._job(request, prompt, ids, ReadState(states), states=states)
            case "logits":
                job = self._job(request, prompt, self._encode(request, prompt), ReadLogits())
            case _:
                raise UnsupportedError(f"task {task!r} is not known; there are classify, generate, tag, qa and embed")
        self._check_room(job)
        return job

    def save_session(self, path: str | os.PathLike[str], request: Request, prompt: LoadedPrompt | None) -> int:
        """Write what is resident of a request's text."""
        job = self.prepare(request, prompt, None)
        depends = job.prefix or job.table
        blocks = self._prefixes.names(job.prefix, job.table, job.ids)
        found = self.derived.find_blocks(blocks)
        if not found:
            raise InputError(
                f"nothing of this text is in memory: a session needs at least {BLOCK} tokens, reuse_texts, and room in "
                "prefix_budget. Ask this text first (rt.generate), then save it."
            )
        name, sha256 = ("", "") if depends is None else (depends.name, depends.sha256)
        kept = cast("KV", np.concatenate(found, axis=2))
        write_session(path, SavedSession(self._session_facts, name, sha256, tuple(blocks[: len(found)]), kept))
        return len(found) * BLOCK

    def load_session(self, path: str | os.PathLike[str], find: Callable[[str], LoadedPrompt]) -> int:
        """Make what a session holds resident."""
        session = read_session(path, self._session_facts, self._shape, self.derived.room)
        prompt = find(session.prompt) if session.prompt_sha256 else None
        if prompt is not None and prompt.sha256 != session.prompt_sha256:
            raise InputError(f"session {str(path)!r} belongs to another prompt {session.prompt!r} than the one here")
        parts = np.split(session.keys_and_values, len(session.blocks), axis=2)
        self.derived.put_blocks(session.blocks, [np.ascontiguousarray(part) for part in parts], prompt)
        return len(session.blocks) * BLOCK

    def _generate(
        self, request: Request, prompt: LoadedPrompt | None, on_text: Callable[[str], None] | None
    ) -> DecoderJob:
        clock = Clock()
        if request.options.num_beams != 1:
            raise UnsupportedError("num_beams is for encoder-decoders; decoders generate greedily or sample")
        defaults = prompt.file.generation if prompt else {}
        fields = {} if request.options.choices else generation_fields(self._manifest.generation, defaults)
        sampling = resolve(request.options, {**defaults, **fields})
        new = sampling.max_new_tokens if sampling.asked_length else min(sampling.max_new_tokens, 1)
        ids = self._encode(request, prompt, new)
        if not sampling.asked_length and self._limit:  # a default length may shrink to what the context has left
            left = self._limit - len(ids) - _prefix_length(prompt)
            sampling = replace(sampling, max_new_tokens=min(DEFAULT_NEW_TOKENS, left))
        clock.input_tokens = len(ids)
        history = [token for token in ids if token < self._vocab]
        drafts = self._drafts.wanted(request.options.drafts)
        strategy = Generate(
            sampling,
            eos=self._manifest.tokens.eos,
            decode=self._tokenizer.decode,
            encode=lambda choice: ids_behind(self._bare, self._text_end(request, prompt), choice),
            history=history,
            processors=Processors(fields, history, self._manifest.tokens.eos, sampling.max_new_tokens),
            clock=clock,
            on_text=on_text,
            lookup=PromptLookup(history, self._tokenizer.letters) if drafts else None,
        )
        job = self._job(request, prompt, ids, strategy, new_tokens=sampling.max_new_tokens, clock=clock)
        job.drafts = strategy.drafts if drafts else None
        return job

    def _classify(self, request: Request, prompt: LoadedPrompt | None) -> DecoderJob:
        clock = Clock()
        if prompt is not None and prompt.file.head_spec is not None:
            check_states(self._graph)
            ids, states = self._encode(request, prompt), list[npt.NDArray[np.float32]]()
            clock.input_tokens = len(ids)
            strategy = ClassifyState(states, prompt.file, clock)
            return self._job(request, prompt, ids, strategy, states=states, clock=clock)
        if prompt is None or prompt.verbalizer is None:
            raise InputError(
                f"prompt {request.prompt!r} has no verbalizer, which classify needs; tune it with label words"
                if prompt
                else "classify needs a prompt with a verbalizer; add one and name it with prompt="
            )
        deepest = max(len(word) for word in prompt.verbalizer.words)
        ids = self._encode(request, prompt, deepest)
        clock.input_tokens = len(ids)
        return self._job(request, prompt, ids, ScoreWords(prompt.verbalizer, clock), new_tokens=deepest, clock=clock)

    def _words(self, request: Request, prompt: LoadedPrompt | None, task: str) -> DecoderJob:
        if prompt is None or prompt.file.task != task:
            raise InputError(f"task {task!r} needs a prompt that was trained for it")
        template, fields = prompt.file.template, fields_of(request)
        inside = 0 if prompt.is_prefix else prompt.num_virtual_tokens
        encoded = encode_text(
            template,
            self._tokenizer,
            fields,
            num_virtual_tokens=inside,
            first_virtual_id=self._vocab,
            max_length=self._limit - _prefix_length(prompt) if self._limit else None,
            truncate=request.truncate,
            add_special_tokens=prompt.file.add_special_tokens,
            locate=located_slot(template),
        )
        states: list[npt.NDArray[np.float32]] = []
        strategy = LabelWords(states, prompt.file, encoded, fields[located_slot(template)], inside)
        return self._job(request, prompt, encoded.ids, strategy, states=states, every_state=True)

    def _job(
        self,
        request: Request,
        prompt: LoadedPrompt | None,
        ids: Sequence[int],
        strategy: Strategy,
        *,
        new_tokens: int = 0,
        states: list[npt.NDArray[np.float32]] | None = None,
        every_state: bool = False,
        clock: Clock | None = None,
    ) -> DecoderJob:
        return DecoderJob(
            prompt,
            ids,
            strategy,
            new_tokens=new_tokens,
            states=states,
            every_state=every_state,
            clock=clock,
            vocab_size=self._vocab,
            timeout=request.timeout,
        )

    def _check_room(self, job: DecoderJob) -> None:
        if not self._graph.fits(1, job.total):
            raise CapacityError(
                f"a request of {job.total} positions is larger than the KV budget; "
                "raise kv_budget, or lower max_new_tokens or the text's length"
            )

    def _encode(self, request: Request, prompt: LoadedPrompt | None, new: int = 0) -> list[int]:
        """Ids behind the prefix, all checked; the text's length is checked before any work starts."""
        prefix = _prefix_length(prompt)
        if request.input_ids is not None:
            ids = given_ids(request, prompt, self._vocab)
            if prompt is not None and not prompt.is_prefix:
                raise InputError(
                    f"prompt {request.prompt!r} reads its virtual tokens' states, so it needs text, not ids"
                )
        else:
            template, fields, special = self._asked(request, prompt)
            limit = self._limit - new if self._limit and request.truncate else None
            ids = self._ids(prompt, template, fields, limit, special=special)
        if not ids and not (prompt is not None and prefix and prompt.rows):
            raise InputError("the text has no token, so there is nothing to run; give at least one character")
        if self._limit and prefix + len(ids) + new > self._limit:
            raise InputError(
                f"the request needs {prefix} prompt, {len(ids)} text and {new} new tokens; the base holds "
                f"{self._limit}; shorten the text, lower max_new_tokens, or set truncate"
            )
        return ids

    def _asked(self, request: Request, prompt: LoadedPrompt | None) -> tuple[Template, Mapping[str, str], bool]:
        """The template of a request, what fills it, and whether the tokenizer adds its own tokens."""
        template = prompt.file.template if prompt else _TEXT_ALONE
        fields = as_fields(request.messages[-1]["content"] if request.messages else request.text)
        if request.chat or request.messages or (prompt and prompt.file.generation.get("chat")):
            return self._chat(template, request.messages[:-1]), fields, False
        return template, fields, prompt.file.add_special_tokens if prompt else True

    def _text_end(self, request: Request, prompt: LoadedPrompt | None) -> str:
        """The end of the text that an answer stands behind; empty where only ids are known."""
        if request.input_ids is not None:
            return ""
        template, fields, _ = self._asked(request, prompt)
        if template.render is not None:
            return self._chat_end(request.messages[:-1])
        last = template.parts[-1]
        if isinstance(last, Slot):
            return fields[last.name][-TEXT_END:]
        return last.text if isinstance(last, Literal) else ""

    def _ids(
        self,
        prompt: LoadedPrompt | None,
        template: Template,
        fields: Mapping[str, str],
        limit: int | None = None,
        *,
        special: bool = True,
    ) -> list[int]:
        """A text's ids behind the prefix; `limit` counts the prefix in."""
        virtual, prefix = prompt.virtual_ids if prompt else 0, _prefix_length(prompt)
        if limit is not None and not virtual:
            limit -= prefix
        ids = template.encode(
            self._tokenizer,
            fields,
            num_virtual_tokens=virtual,
            first_virtual_id=self._vocab,
            max_length=limit,
            add_special_tokens=special,
        )
        if virtual and prefix:
            ids = ids[virtual:]
        if prompt is not None and prompt.is_infix and ids[-1] >= self._vocab:
            raise InputError(f"no token stands behind the virtual ones of {str(template)!r}, so there is no answer")
        return ids

    def _chat(self, template: Template, before: Sequence[Message]) -> Template:
        """The template's text as the user's last turn in the package's chat template, behind leading virtual tokens."""
        lead = 1 if template.parts and isinstance(template.parts[0], VirtualTokens) else 0
        self._chat_end(before)
        if template.prompt_is_prefix:
            return replace(
                template, render=lambda text: self._tokenizer.chat([*before, {"role": "user", "content": text}])
            )
        around = self._tokenizer.chat([*before, {"role": "user", "content": _CHAT_TEXT}]).split(_CHAT_TEXT)
        if len(around) != 2:
            raise UnsupportedError(
                "the package's chat template repeats the user's text, and the prompt has virtual tokens inside it; "
                "leave out chat, or write {prompt} first"
            )
        first, last = map(Literal, around)
        return Template((*template.parts[:lead], first, *template.parts[lead:], last))

    def _chat_end(self, before: Sequence[Message]) -> str:
        """What the package's chat template writes behind the user's last text."""
        shown = self._tokenizer.chat([*before, {"role": "user", "content": _CHAT_TEXT}])
        if _CHAT_TEXT not in shown:
            raise UnsupportedError("the package's chat template does not show the user's text; leave out chat")
        return shown.rpartition(_CHAT_TEXT)[2]

    def _bare(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


class Drafts:
    """Whether requests may be answered with drafts.

    Kernels for several positions compute each of them to the same last bit, whatever their number. Those for a single
    one add up in another order, which quantised activations make visible. So a request with drafts runs all of its
    steps on several positions: what was drafted, and how wide a step was, never shows in its answer.
    """

    def __init__(self, manifest: Manifest, graph: DecoderGraph, provider: str, options: EngineOptions) -> None:
        """Find out what the package and the settings allow.

        Raises:
            UnsupportedError: they are asked for and cannot be had.
        """
        self._default, self._why_not = options.drafts, ""
        if options.batch_invariant:
            self._why_not = "batch_invariant is on, and checking a draft takes other kernels than a batch"
        elif provider != "cpu" or not manifest.kv_in_place:
            self._why_not = "they need the CPU, and attention that appends to its cache in place"
        elif not graph.gives_several_logits:
            self._why_not = (
                f"the graph has no output {names.KEPT_LOGITS}; export the base again with this version of edgeprompt"
            )
        self.wanted(options.drafts)

    def wanted(self, asked: bool | None) -> bool:
        """Whether a request gets drafts.

        Raises:
            UnsupportedError: it asks for them, and they cannot be had.
        """
        found = self._default if asked is None else asked
        if found and self._why_not:
            raise UnsupportedError(f"drafts cannot be checked here: {self._why_not}; or leave drafts out")
        return found


def _prefix_length(prompt: LoadedPrompt | None) -> int:
    return prompt.num_virtual_tokens if prompt is not None and prompt.is_prefix else 0
