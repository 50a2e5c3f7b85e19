"""Serves encoder-decoder packages: the encoder once per text, then the decoder step by step for all rows together.

Prompt embeddings stand in the encoder's text, prefixes in the decoder's self-attention. A batch is mixed as it comes:
prompts, tasks, beams and lengths differ from row to row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprompt import names
from edgeprompt.arrays import require_finite
from edgeprompt.decoding.beam_search import BeamSearch
from edgeprompt.decoding.processors import Processors, generation_fields
from edgeprompt.decoding.sampling import Sampling, resolve
from edgeprompt.decoding.strategies import Generate, ReadLogits, ScoreWords, Strategy
from edgeprompt.engines.base import ENCODER_PAST, Engine, check_template, compile_words, given_ids
from edgeprompt.engines.scheduler import Job, Scheduler
from edgeprompt.engines.seq2seq.graphs import Seq2SeqGraphs, Source, SourceRow
from edgeprompt.engines.seq2seq.lane import Seq2SeqJob, Seq2SeqLane
from edgeprompt.errors import InputError, PackageError, PromptFileError, UnsupportedError
from edgeprompt.heads.answers import tag, token_logits
from edgeprompt.heads.layers import check_head
from edgeprompt.options import EngineOptions
from edgeprompt.ort.free_memory import SHORT, check_attention
from edgeprompt.ort.kv_cache import KVShape, PrefixCache
from edgeprompt.ort.memory_budget import MemoryBudget
from edgeprompt.ort.session import Sessions
from edgeprompt.package.folder import Package
from edgeprompt.prompts.encoder_text import encode_text, fields_of, located_slot
from edgeprompt.prompts.registry import LoadedPrompt
from edgeprompt.prompts.template import Slot, Template, as_fields
from edgeprompt.prompts.verbalizer import ids_alone
from edgeprompt.request import Clock, Request, Tagging

KV_BUDGET = 1 << 30
TENSOR_BUDGET = 64 << 20
_TEXT_ALONE = Template((Slot(),))


class Seq2SeqEngine(Engine):
    """Serves an encoder-decoder package."""

    group = 512

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
        self.derived = PrefixCache(TENSOR_BUDGET if options.prefix_budget is None else options.prefix_budget)
        size = manifest.geometry
        shape = KVShape(size.num_layers, size.num_key_value_heads, size.head_size, manifest.kv_dtype)
        self._reuse_texts = options.reuse_texts
        self._budget = MemoryBudget(options.kv_budget or KV_BUDGET)
        # Dynamic quantisation takes one scale per tensor: rows of one batch would change each other's results.
        rows = 1 if manifest.precision == "int8" else options.max_batch
        self._lanes = [
            Seq2SeqLane(
                self._graphs, self._budget, self.derived, max_rows=rows, position_bytes=shape.bytes_per_position
            )
            for _ in range(options.workers or 1)
        ]
        # Texts of similar length stand side by side, and so in one batch.
        self.scheduler = Scheduler(
            self._lanes, max_queue=options.max_queue, order=lambda job: getattr(job, "positions", 0)
        )

    def accept(self, prompt: LoadedPrompt) -> None:
        """Check a prompt."""
        file, whole = prompt.file, prompt.tensors()
        whole.check_geometry(self._manifest)
        if file.head_spec is not None and file.task == "tag":
            check_head(prompt.name, file, self._manifest)
        elif file.head_spec is not None or file.task in ("tag", "qa"):
            raise UnsupportedError(
                f"prompt {prompt.name!r} is for task {file.task!r}"
                f"{' with a head' if file.head_spec is not None else ''}; an encoder-decoder answers by text, or "
                "labels words by a head on its encoder: tune it for classify (with a verbalizer) or generate"
            )
        if prompt.has_encoder_prefix and not self._graphs.has_encoder_prefix:
            raise UnsupportedError(
                f"prompt {prompt.name!r} has encoder deep prompts, and this package's encoder "
                f"({self._manifest.model_type}) takes none; T5 exported by the torch route does"
            )
        if file.verbalizer:
            prompt.verbalizer = compile_words(prompt, self._tokenizer)
        self._feed(prompt)
        check_template(prompt)
        self._text_ids(prompt, dict.fromkeys(file.template.slots, "a"), None)

    def prepare(self, request: Request, prompt: LoadedPrompt | None, on_text: Callable[[str], None] | None) -> Job:
        """Check and encode a request."""
        task = request.task or (prompt.file.task if prompt else "generate")
        match task:
            case "generate":
                job = self._generate(request, prompt, on_text)
            case "classify":
                job = self._classify(request, prompt)
            case "tag":
                job = self._tag(request, prompt)
            case "embed":
                job = self._embed(request, prompt)
            case "logits":
                job = self._decoding(request, prompt, ReadLogits(), new_tokens=1)
            case _:
                raise UnsupportedError(
                    f"task {task!r} is not for encoder-decoders ({self._manifest.model_type}); "
                    "there are classify, generate, tag and embed"
                )
        self._lanes[0].narrow(job)
        self._budget.check(self._lanes[0].bytes([job]))
        if job.source.ids.size > SHORT:
            check_attention(job.source.ids.size, self._geometry.num_attention_heads)
        return job

    def _embed(self, request: Request, prompt: LoadedPrompt | None) -> Seq2SeqJob:
        """The encoder's states over the text's tokens, virtual ones left out: float32 [hidden_size]."""
        found: list[npt.NDArray[np.float32]] = []
        job = Seq2SeqJob(self._source(request, prompt), request.timeout, lambda: found[0])
        text = job.source.ids < self._geometry.vocab_size
        how = request.pooling or self._manifest.pooling
        job.read = lambda source, row: found.append(_pooled(source, row, text, how))
        return job

    def _tag(self, request: Request, prompt: LoadedPrompt | None) -> Seq2SeqJob:
        """Spans of a text, by the prompt's head on the encoder's states."""
        if prompt is None or prompt.file.task != "tag":
            raise InputError("task 'tag' needs a prompt that was trained for it")
        fields, slot = fields_of(request), located_slot(prompt.file.template)
        encoded = encode_text(
            prompt.file.template,
            self._tokenizer,
            fields,
            num_virtual_tokens=prompt.rows,
            first_virtual_id=self._geometry.vocab_size,
            max_length=self._geometry.max_positions or None,
            truncate=request.truncate,
            add_special_tokens=prompt.file.add_special_tokens,
            locate=slot,
        )
        found: list[npt.NDArray[np.float32]] = []
        source = SourceRow(np.asarray(encoded.ids, np.int64), *self._encoder_tensors(prompt))

        def answer() -> Tagging:
            return tag(prompt.file, token_logits(prompt.file, found[0], prompt.rows), encoded.offsets, fields[slot])

        job = Seq2SeqJob(source, request.timeout, answer)
        job.read = lambda source, row: found.append(source.states[row, : len(encoded.ids)].astype(np.float32))
        return job

    def _classify(self, request: Request, prompt: LoadedPrompt | None) -> Seq2SeqJob:
        if prompt is None or prompt.verbalizer is None:
            raise InputError(
                f"prompt {prompt.name!r} has no verbalizer, which classify needs; tune it with label words"
                if prompt is not None
                else "classify needs a prompt with a verbalizer; add one and name it with prompt="
            )
        clock, words = Clock(), prompt.verbalizer.words
        longest = max(len(word) for word in words)
        strategy = ScoreWords(prompt.verbalizer, clock)
        job = self._decoding(request, prompt, strategy, new_tokens=longest)
        job.clock, clock.input_tokens = clock, job.source.ids.size
        return job

    def _generate(
        self, request: Request, prompt: LoadedPrompt | None, on_text: Callable[[str], None] | None
    ) -> Seq2SeqJob:
        clock = Clock()
        defaults = prompt.file.generation if prompt else {}
        fields = {} if request.options.choices else self._fields(defaults)
        sampling = resolve(request.options, {**defaults, **fields})
        if request.options.drafts:
            raise UnsupportedError("drafts are for decoder-only packages; leave them out")
        beams = request.options.num_beams if request.options.num_beams != 1 else defaults.get("num_beams", 1)
        if type(beams) is not int or not 1 <= beams <= 64:
            raise InputError(f"num_beams is {beams!r}; it must be an integer between 1 and 64")
        feed = self._feed(prompt)
        tokens = self._manifest.tokens
        length = self._new_tokens(sampling, prompt, len(feed))
        asked = request.options.repetition_penalty
        processors = Processors(
            fields if asked is None else {**fields, "repetition_penalty": asked}, feed, tokens.eos, length
        )
        strategy: Strategy
        if beams > 1:
            _check_beams(sampling, beams)
            penalty, early = _beam_settings({**self._manifest.generation, **defaults})
            strategy = BeamSearch(
                beams,
                length,
                tokens.eos,
                decode=self._tokenizer.decode,
                clock=clock,
                length_penalty=penalty,
                early_stopping=early,
                processors=processors,
            )
        else:
            strategy = Generate(
                replace(sampling, max_new_tokens=length),
                eos=tokens.eos,
                decode=self._tokenizer.decode,
                encode=lambda choice: ids_alone(self._bare, choice),
                history=feed,
                clock=clock,
                on_text=on_text,
                processors=processors,
            )
        job = self._decoding(request, prompt, strategy, new_tokens=length)
        job.clock, clock.input_tokens = clock, job.source.ids.size
        if on_text is not None and beams > 1:  # the whole text, once it is decided
            job.add_done_callback(lambda job: None if job.exception() else on_text(job.result().text))
        return job

    def _fields(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """What the base's and the prompt's generation settings do to the logits."""
        tokens = self._manifest.tokens
        forced = {
            "forced_bos_token_id": tokens.forced_bos,
            "forced_eos_token_id": None if tokens.forced_eos is None else [tokens.forced_eos],
        }
        return generation_fields(forced, self._manifest.generation, defaults)

    def _new_tokens(self, sampling: Sampling, prompt: LoadedPrompt | None, fed: int) -> int:
        """`max_new_tokens`, or what the decoder's positions leave of it where nobody asked for a length."""
        limit = self._geometry.max_positions
        taken = fed - 1 + (prompt.past_length if prompt else 0)
        room = limit - taken if limit else sampling.max_new_tokens
        if sampling.asked_length and sampling.max_new_tokens > room:
            raise InputError(
                f"max_new_tokens is {sampling.max_new_tokens}, and the decoder has {limit} positions, of which the "
                f"prompt leaves {room}; ask for at most that"
            )
        if room < 1:
            raise InputError(f"the prompt takes all of the decoder's {limit} positions; use a shorter one")
        return min(room, sampling.max_new_tokens)

    def _feed(self, prompt: LoadedPrompt | None) -> list[int]:
        """What the decoder is given first: its start, and what the prompt lets it have said already."""
        value = prompt.file.generation.get("decoder_prefix", ()) if prompt else ()
        ids = self._bare(value) if isinstance(value, str) else value
        known = self._geometry.vocab_size
        if not isinstance(ids, list | tuple) or not all(type(one) is int and 0 <= one < known for one in ids):
            name = prompt.name if prompt else ""
            raise PromptFileError(
                f"prompt {name!r}: decoder_prefix is {value!r}; it must be text, or token ids below {known}"
            )
        return [self._start, *ids]

    def _decoding(
        self, request: Request, prompt: LoadedPrompt | None, strategy: Strategy, *, new_tokens: int
    ) -> Seq2SeqJob:
        """A job that decodes sequences of at most `new_tokens`."""
        job = Seq2SeqJob(self._source(request, prompt), request.timeout, strategy.result)
        job.strategy, job.feed = strategy, self._feed(prompt)
        job.owner = prompt if prompt is not None and (prompt.rows or prompt.has_encoder_prefix) else None
        if prompt is not None and prompt.past_length:
            job.prefix = self._tensor(prompt, names.PAST_KEY_VALUES)
        job.positions += job.prefix_length + len(job.feed) + new_tokens
        return job

    def _source(self, request: Request, prompt: LoadedPrompt | None) -> SourceRow:
        vocab, rows = self._geometry.vocab_size, prompt.rows if prompt else 0
        limit = self._geometry.max_positions or None
        if request.chat or request.messages:
            raise UnsupportedError("chat templates are for decoder-only packages; leave out chat")
        if request.input_ids is not None:
            ids = [*range(vocab, vocab + rows), *given_ids(request, prompt, vocab)]
        else:
            ids = self._text_ids(prompt, as_fields(request.text), limit if request.truncate else None)
        if limit is not None and len(ids) > limit:
            raise InputError(
                f"the request needs {len(ids)} prompt and text tokens; the base holds {limit}; shorten the text, or "
                "set truncate"
            )
        if len(ids) == rows:
            raise InputError("the text has no token, so there is nothing to run; give at least one character")
        array = np.asarray(ids, np.int64)
        encoded_by = prompt.sha256 if prompt is not None and (prompt.rows or prompt.has_encoder_prefix) else ""
        name = b""
        if self._reuse_texts:
            name = hashlib.blake2b(encoded_by.encode() + array.tobytes(), digest_size=20).digest()
        return SourceRow(array, *self._encoder_tensors(prompt), name)

    def _text_ids(self, prompt: LoadedPrompt | None, fields: Mapping[str, str], limit: int | None) -> list[int]:
        """Ids of a text for the encoder, the prompt's virtual tokens among them; cut to `limit` where given."""
        rows = prompt.rows if prompt else 0
        template = prompt.file.template if prompt else _TEXT_ALONE
        return (template if rows else template.without_prompt()).encode(
            self._tokenizer,
            fields,
            num_virtual_tokens=rows,
            first_virtual_id=self._geometry.vocab_size,
            max_length=limit,
            add_special_tokens=prompt.file.add_special_tokens if prompt else True,
        )

    def _encoder_tensors(self, prompt: LoadedPrompt | None) -> tuple[Any, Any]:
        """A prompt's rows, and its deep prompts in the encoder."""
        if prompt is None:
            return None, None
        table = self._tensor(prompt, names.PROMPT_EMBEDDINGS) if prompt.rows else None
        return table, self._tensor(prompt, ENCODER_PAST) if prompt.has_encoder_prefix else None

    def _tensor(self, prompt: LoadedPrompt, name: str) -> npt.NDArray[Any]:
        dtype = np.float32 if name == names.PROMPT_EMBEDDINGS else np.dtype(self._manifest.kv_dtype)
        return self.derived.derive(prompt, name, lambda: np.ascontiguousarray(prompt.tensors().tensors()[name], dtype))

    def _bare(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _check_beams(sampling: Sampling, beams: int) -> None:
    if sampling.temperature != 0 or sampling.choices or sampling.stop or sampling.logprobs:
        raise InputError(
            f"num_beams is {beams}, and beam search goes without temperature, choices, stop and "
            "logprobs; leave them out, or use num_beams=1"
        )


def _beam_settings(defaults: Mapping[str, Any]) -> tuple[float, Any]:
    penalty, early = defaults.get("length_penalty", 1.0), defaults.get("early_stopping", False)
    if isinstance(penalty, bool) or not isinstance(penalty, (int, float)) or early not in (True, False, "never"):
        raise InputError(
            f"length_penalty is {penalty!r} and early_stopping {early!r}; allowed: a number, and true, false or 'never'"
        )
    return float(penalty), early


def _pooled(source: Source, row: int, is_text: npt.NDArray[np.bool_], pooling: str) -> npt.NDArray[np.float32]:
    states: npt.NDArray[np.float32] = source.states[row, : is_text.size][is_text].astype(np.float32)
    return require_finite(states.mean(axis=0) if pooling == "mean" else states[0 if pooling == "cls" else -1])
