"""Encoder-only models: every row of a batch with its own prompt, its own prefix and its own head."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprompt import names
from edgeprompt.arrays import log_softmax
from edgeprompt.decoding.strategies import Clock
from edgeprompt.engines.base import side_by_side
from edgeprompt.engines.encoder.batch import Row, make_feeds, make_row, split_batches
from edgeprompt.engines.encoder.checks import (
    NO_GENERATION,
    GraphFacts,
    check_head,
    check_placement,
    compile_cloze,
)
from edgeprompt.errors import (
    InputError,
    PromptNotFoundError,
    RequestCancelledError,
    RequestTimeoutError,
    UnsupportedError,
)
from edgeprompt.heads.answers import answer, classify_head, pool, tag, token_logits
from edgeprompt.heads.layers import Floats
from edgeprompt.options import EngineOptions
from edgeprompt.ort.kv_cache import PrefixCache
from edgeprompt.ort.session import Sessions, graph_inputs, import_onnxruntime
from edgeprompt.package.folder import Package
from edgeprompt.prompts.encoder_text import EncodedText, encode_text, located_slot
from edgeprompt.prompts.file import Array, PromptFile
from edgeprompt.prompts.source import PromptSource
from edgeprompt.prompts.template import Slot, Template, as_fields
from edgeprompt.prompts.verbalizer import Verbalizer
from edgeprompt.request import Classification, Request, Result

TENSOR_BUDGET = 128 << 20
PIECE = 1024
"""Requests that are encoded and sorted by length together."""
CONCURRENT_RUNS = 4
"""Forward passes at a time; more would share the same cores and take more memory."""
_TEXT_ALONE = Template((Slot(),))


@dataclass(eq=False)
class Loaded:
    """A prompt as the engine keeps it; its tensors come from `source` when needed."""

    source: PromptSource
    verbalizer: Verbalizer | None = None

    @property
    def prompt(self) -> PromptFile:
        """Everything but the prompt's own tensors; the head is there."""
        return self.source.prompt


@dataclass
class Work:
    """One request, encoded."""

    request: Request
    task: str
    loaded: Loaded | None
    encoded: EncodedText
    mask_position: int = 0
    clock: Clock = field(default_factory=Clock)

    @property
    def prefix_length(self) -> int:
        """Positions of its deep prompt."""
        return self.loaded.source.num_virtual_tokens if self.loaded and self.loaded.source.has_past else 0

    @property
    def num_virtual_tokens(self) -> int:
        """Virtual ids in its sequence."""
        return self.loaded.source.num_virtual_tokens if self.loaded and not self.loaded.source.has_past else 0

    @property
    def field_text(self) -> str:
        """The text that tagging labels, or that holds a question's answer."""
        fields = as_fields(self.request.text)
        return fields[located_slot(self.loaded.prompt.template if self.loaded else _TEXT_ALONE)]

    @property
    def outputs(self) -> set[str]:
        """The graph's outputs that it needs."""
        if self.task == "logits" or (self.task == "classify" and self.loaded and self.loaded.verbalizer):
            return {names.LOGITS}
        head = self.loaded.prompt.head_spec if self.loaded else None
        return {
            names.POOLER_OUTPUT
            if self.task == "classify" and head and head.input == "pooler"
            else names.LAST_HIDDEN_STATE
        }


class EncoderEngine:
    """Serves an encoder-only package."""

    def __init__(self, package: Package, options: EngineOptions, sessions: Sessions) -> None:
        session = sessions["model"]
        self._manifest, self._tokenizer = package.manifest, package.tokenizer
        self.provider = session.provider
        self._session = session.ort
        self._inputs = {value.name for value in graph_inputs(self._session)}
        self._outputs = {value.name for value in self._session.get_outputs()}
        self._run_options = import_onnxruntime().RunOptions()
        # Logits over the vocabulary cost as much as a layer; they are computed only where a row asks for them.
        self._run_options.only_execute_path_to_fetches = True
        self._prompts: dict[str, Loaded] = {}
        self._tensors = PrefixCache(TENSOR_BUDGET if options.prefix_budget is None else options.prefix_budget)
        self._slots = threading.BoundedSemaphore(max(CONCURRENT_RUNS, options.lanes or 1))
        self._lanes = options.lanes
        self._closed = False

    def add_prompt(self, name: str, prompt: PromptFile | PromptSource) -> None:
        """Make a checked prompt ready under `name`, replacing one of that name."""
        source = prompt if isinstance(prompt, PromptSource) else PromptSource(prompt)
        loaded = Loaded(source)
        self._check(name, loaded)
        old = self._prompts.get(name)
        self._prompts[name] = loaded
        if old is not None:
            self._tensors.remove(old)

    def remove_prompt(self, name: str) -> None:
        """Forget a prompt; requests that already run keep it."""
        old = self._prompts.pop(name, None)
        if old is None:
            raise PromptNotFoundError(f"no prompt {name!r}; loaded: {', '.join(list(self._prompts)[:20]) or 'none'}")
        self._tensors.remove(old)

    def run(self, requests: Sequence[Request], *, return_errors: bool = False) -> list[Any]:
        """Answer a batch of mixed tasks, in order; rows of similar length run together."""
        results: list[Any] = []
        for start in range(0, len(requests), PIECE):
            works: list[Work | Exception] = []
            for request in requests[start : start + PIECE]:
                try:
                    works.append(self._encode(request))
                except Exception as error:
                    if not return_errors:
                        raise
                    works.append(error)
            results += self._answer_all(works, return_errors)
        return results

    def stream(self, request: Request) -> Iterator[str]:
        """Encoders do not generate."""
        raise UnsupportedError(NO_GENERATION)

    def logits(self, request: Request) -> Floats:
        """float32 [vocab_size]: scores of the token at the template's `{mask}` (masked language models)."""
        work = self._encode(dataclasses.replace(request, task="logits"))
        (result,) = self._answer_all([work], False)
        found: Floats = result
        return found

    def embed(self, requests: Sequence[Request], pooling: str | None) -> Floats:
        """float32 [len(requests), hidden_size]: pooled over the text, virtual tokens left out."""
        how = pooling or self._manifest.pooling
        if how not in ("mean", "cls", "last"):
            raise InputError(f"pooling is {how!r}, allowed: mean, cls, last")
        found = np.empty((len(requests), self._manifest.geometry.hidden_size), np.float32)
        for start in range(0, len(requests), PIECE):
            asked = requests[start : start + PIECE]
            works: list[Work | Exception] = [self._encode(dataclasses.replace(one, task="embed")) for one in asked]
            found[start : start + PIECE] = self._answer_all(works, False, how)
        return found

    def close(self) -> None:
        """Refuse what comes; forward passes that run end first."""
        self._closed = True

    def _check(self, name: str, loaded: Loaded) -> None:
        prompt, graph = loaded.prompt, GraphFacts(self._manifest, self._inputs, self._outputs)
        check_placement(name, loaded.source, graph)
        self._encode_fields(loaded, dict.fromkeys(prompt.template.slots, "a"), False, prompt.task)
        if prompt.head_spec is not None:
            check_head(name, prompt, graph)
        elif prompt.task == "classify":
            loaded.verbalizer = compile_cloze(name, prompt, graph, self._tokenizer)
        elif prompt.task in ("tag", "qa"):
            raise InputError(f"prompt {name!r} is for {prompt.task!r} and has no head; tune it with one")

    def _encode(self, request: Request) -> Work:
        if self._closed:
            raise RequestCancelledError("the runtime was closed")
        loaded = None
        if request.prompt is not None:
            loaded = self._prompts.get(request.prompt)
            if loaded is None:
                there = ", ".join(list(self._prompts)[:20]) or "none"
                raise PromptNotFoundError(f"no prompt {request.prompt!r}; loaded: {there}")
        task = request.task or (loaded.prompt.task if loaded else "embed")
        if task == "generate":
            raise UnsupportedError(NO_GENERATION)
        if task not in ("embed", "logits") and (loaded is None or loaded.prompt.task != task):
            raise InputError(
                f"prompt {request.prompt!r} is for {loaded.prompt.task!r}, not for {task!r}"
                if loaded
                else f"{task} needs a prompt for that task; add one and name it with prompt="
            )
        if task == "logits" and names.LOGITS not in self._outputs:
            raise UnsupportedError(f"{self._manifest.base.name} is no masked language model, so it has no logits")
        if request.input_ids is not None:
            encoded = self._given(request, loaded, task)
        else:
            encoded = self._encode_fields(loaded, as_fields(request.text), request.truncate, task)
        work = Work(request, task, loaded, encoded)
        work.clock.input_tokens = len(encoded.ids)
        if names.LOGITS in work.outputs:
            work.mask_position = self._mask_position(encoded)
        return work

    def _room(self, loaded: Loaded | None) -> int | None:
        limit = self._manifest.geometry.max_positions
        return limit - (loaded.source.num_virtual_tokens if loaded and loaded.source.has_past else 0) if limit else None

    def _encode_fields(self, loaded: Loaded | None, fields: Any, truncate: bool, task: str) -> EncodedText:
        prompt = loaded.prompt if loaded else None
        template = prompt.template if prompt else _TEXT_ALONE
        count = loaded.source.num_virtual_tokens if loaded and not loaded.source.has_past else 0
        return encode_text(
            template,
            self._tokenizer,
            fields,
            num_virtual_tokens=count,
            first_virtual_id=self._manifest.geometry.vocab_size,
            max_length=self._room(loaded),
            truncate=truncate,
            add_special_tokens=prompt.add_special_tokens if prompt else True,
            locate=located_slot(template) if task in ("tag", "qa") else None,
        )

    def _given(self, request: Request, loaded: Loaded | None, task: str) -> EncodedText:
        vocab, room = self._manifest.geometry.vocab_size, self._room(loaded)
        given = [int(token) for token in request.input_ids or ()]
        bad = next((token for token in given if not 0 <= token < vocab), None)
        if bad is not None:
            raise InputError(f"input_ids holds {bad}; ids of this base are 0 to {vocab - 1}")
        if task in ("tag", "qa"):
            raise InputError(f"{task} needs the text, to say where its words stand; give text instead of input_ids")
        count = loaded.source.num_virtual_tokens if loaded and not loaded.source.has_past else 0
        if count and loaded and not loaded.prompt.template.prompt_is_prefix:
            raise InputError(
                f"prompt {request.prompt!r} has virtual tokens inside its template, so it needs text, not ids"
            )
        ids = [*range(vocab, vocab + count), *given]
        if room is not None and len(ids) > room:
            raise InputError(f"the request has {len(ids)} tokens with its prompt, at most {room} fit; shorten it")
        return EncodedText(ids, [0] * len(ids), [None] * len(ids))

    def _mask_position(self, encoded: EncodedText) -> int:
        found = [index for index, token in enumerate(encoded.ids) if token == self._manifest.tokens.mask]
        if len(found) != 1:
            raise InputError(
                f"the request holds {len(found)} mask tokens; exactly one is needed, the template's {{mask}}"
            )
        return found[0]

    def _answer_all(
        self, works: Sequence[Work | Exception], return_errors: bool, pooling: str | None = None
    ) -> list[Any]:
        results: list[Any] = list(works)
        ready = [index for index, work in enumerate(works) if isinstance(work, Work)]
        todo = [work for work in works if isinstance(work, Work)]
        lengths = [len(work.encoded.ids) for work in todo]

        def answer(batch: Sequence[int]) -> None:
            places = [ready[index] for index in batch]
            try:
                rows, outputs = self._forward([todo[index] for index in batch])
            except Exception as error:
                if not return_errors:
                    raise
                for place in places:
                    results[place] = error
                return
            for at, place in enumerate(places):
                work, row = results[place], rows[at]
                try:
                    _in_time(work)
                    own = {name: value[at] for name, value in outputs.items()}
                    results[place] = self._answer(work, row, own, pooling)
                except Exception as error:
                    if not return_errors:
                        raise
                    results[place] = error

        side_by_side(self._lanes, answer, split_batches(lengths, [work.prefix_length for work in todo]))
        return results

    def _forward(self, works: Sequence[Work]) -> tuple[list[Row], dict[str, npt.NDArray[Any]]]:
        if not any(len(work.encoded.ids) for work in works):
            raise InputError("the text has no token, so there is nothing to run; give at least one character")
        rows = [self._row(work) for work in works]
        wanted = sorted(set().union(*(work.outputs for work in works)))
        feeds = make_feeds(rows, self._manifest, self._inputs)
        with self._slots:
            if self._closed:
                raise RequestCancelledError("the runtime was closed before the request ran")
            found = self._session.run(wanted, feeds, self._run_options)
        return rows, dict(zip(wanted, found, strict=True))

    def _row(self, work: Work) -> Row:
        tensor = self._tensor(work.loaded) if work.loaded and work.loaded.source.num_virtual_tokens else None
        deep = work.prefix_length > 0
        return make_row(
            work.encoded.ids,
            self._manifest.geometry.vocab_size,
            type_ids=work.encoded.type_ids,
            embeddings=None if deep else tensor,
            prefix=tensor if deep else None,
            mask_position=work.mask_position,
        )

    def _tensor(self, loaded: Loaded) -> Array:
        found = self._tensors.get(loaded)
        if found is None:
            whole = loaded.source.tensors()
            tensor = whole.past_key_values if loaded.source.has_past else whole.prompt_embeddings
            assert tensor is not None
            found = tensor
            self._tensors.put(loaded, found)
        return found

    def _answer(self, work: Work, row: Row, outputs: dict[str, npt.NDArray[Any]], pooling: str | None) -> Result:
        if work.task == "logits":
            return np.asarray(outputs[names.LOGITS], np.float32)
        loaded = work.loaded
        if work.task == "classify":
            assert loaded is not None
            return dataclasses.replace(self._classify(loaded, row, outputs), timings=work.clock.timings(0))
        states = outputs[names.LAST_HIDDEN_STATE][: row.length].astype(np.float32, copy=False)
        if work.task == "embed":
            return pool(states, row, pooling or self._manifest.pooling)
        assert loaded is not None
        logits = token_logits(loaded.prompt, states, work.num_virtual_tokens)
        if work.task == "tag":
            return tag(loaded.prompt, logits, work.encoded.offsets, work.field_text)
        no_answer = int(row.text[0]) if loaded.prompt.generation.get("allow_no_answer") else None
        return answer(logits, work.encoded.offsets, work.field_text, no_answer)

    def _classify(self, loaded: Loaded, row: Row, outputs: dict[str, npt.NDArray[Any]]) -> Classification:
        if loaded.verbalizer is not None:
            logprobs = log_softmax(np.asarray(outputs[names.LOGITS], np.float64))
            return loaded.verbalizer.classification([logprobs[word[0]] for word in loaded.verbalizer.words])
        head = loaded.prompt.head_spec
        assert head is not None
        if head.input == "pooler":
            return classify_head(loaded.prompt, outputs[names.POOLER_OUTPUT].astype(np.float32, copy=False))
        states = outputs[names.LAST_HIDDEN_STATE][: row.length].astype(np.float32, copy=False)
        return classify_head(loaded.prompt, pool(states, row, head.input))


def _in_time(work: Work) -> None:
    timeout = work.request.timeout
    if timeout is not None and work.clock.timings(0).total > timeout:
        raise RequestTimeoutError(f"the request was not answered within {timeout} s")
