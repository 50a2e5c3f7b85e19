"""Encoder-only models: every row of a batch with its own prompt, its own prefix and its own head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from edgeprompt import names
from edgeprompt.arrays import largest, log_softmax
from edgeprompt.engines.base import Engine, given_ids
from edgeprompt.engines.encoder.batch import Row, make_row
from edgeprompt.engines.encoder.checks import NO_GENERATION, check_placement, compile_cloze
from edgeprompt.engines.encoder.lane import EncoderGraph, EncoderJob, EncoderLane, Outputs
from edgeprompt.engines.scheduler import Scheduler
from edgeprompt.errors import InputError, UnsupportedError
from edgeprompt.heads.answers import answer, classify_head, pool, tag, token_logits
from edgeprompt.heads.layers import Floats, check_head
from edgeprompt.options import EngineOptions
from edgeprompt.ort.free_memory import SHORT, check_attention
from edgeprompt.ort.kv_cache import KV, PrefixCache
from edgeprompt.ort.session import Sessions
from edgeprompt.package.folder import Package
from edgeprompt.prompts.encoder_text import EncodedText, encode_text, located_slot
from edgeprompt.prompts.registry import LoadedPrompt
from edgeprompt.prompts.template import Slot, Template, as_fields
from edgeprompt.request import Classification, Clock, Request, Result

TENSOR_BUDGET = 128 << 20
_TEXT_ALONE = Template((Slot(),))


class EncoderEngine(Engine):
    """Serves an encoder-only package."""

    group = 512

    def __init__(self, package: Package, options: EngineOptions, sessions: Sessions) -> None:
        session = sessions["model"]
        self._manifest, self._tokenizer = package.manifest, package.tokenizer
        self.provider = session.provider
        self._graph = EncoderGraph.open(session, package.manifest)
        self.derived = PrefixCache(TENSOR_BUDGET if options.prefix_budget is None else options.prefix_budget)
        lanes = [EncoderLane(self._graph) for _ in range(options.workers or 1)]
        self.scheduler = Scheduler(lanes, max_queue=options.max_queue)

    def accept(self, prompt: LoadedPrompt) -> None:
        """Check a prompt."""
        file, outputs = prompt.file, self._graph.outputs
        check_placement(prompt, self._graph.inputs)
        self._encode(prompt, dict.fromkeys(file.template.slots, "a"), False, file.task)
        if file.head_spec is not None:
            check_head(prompt.name, file, self._manifest, has_pooler=names.POOLER_OUTPUT in outputs)
        elif file.task == "classify":
            prompt.verbalizer = compile_cloze(prompt, self._manifest.base.name, outputs, self._tokenizer)
        elif file.task in ("tag", "qa"):
            raise InputError(f"prompt {prompt.name!r} is for {file.task!r} and has no head; tune it with one")

    def prepare(
        self, request: Request, prompt: LoadedPrompt | None, on_text: Callable[[str], None] | None
    ) -> EncoderJob:
        """Check and encode a request."""
        clock = Clock()
        task = self._task(request, prompt)
        if request.input_ids is not None:
            encoded = self._given(request, prompt, task)
        else:
            encoded = self._encode(prompt, as_fields(request.text), request.truncate, task)
        if not encoded.ids:
            raise InputError("the text has no token, so there is nothing to run; give at least one character")
        clock.input_tokens = len(encoded.ids)
        deep = prompt.past_length if prompt else 0
        if len(encoded.ids) > SHORT:
            check_attention(len(encoded.ids) + deep, self._manifest.geometry.num_attention_heads)
        output = self._output(prompt, task)
        mask = self._mask_position(encoded) if output == names.LOGITS else 0
        job = EncoderJob(
            len(encoded.ids),
            deep,
            lambda: self._row(prompt, encoded, mask),
            [output],
            request.timeout,
        )
        job.read = lambda row, outputs: self._answer(request, task, prompt, encoded, clock, row, outputs)
        return job

    def _task(self, request: Request, prompt: LoadedPrompt | None) -> str:
        task = request.task or (prompt.file.task if prompt else "embed")
        if task == "generate" or request.chat or request.messages:
            raise UnsupportedError(NO_GENERATION)
        if task not in ("embed", "logits") and (prompt is None or prompt.file.task != task):
            raise InputError(
                f"prompt {request.prompt!r} is for {prompt.file.task!r}, not for {task!r}"
                if prompt
                else f"{task} needs a prompt for that task; add one and name it with prompt="
            )
        if task == "logits" and names.LOGITS not in self._graph.outputs:
            raise UnsupportedError(f"{self._manifest.base.name} is no masked language model, so it has no logits")
        return task

    def _output(self, prompt: LoadedPrompt | None, task: str) -> str:
        """The graph's output that is needed."""
        if task == "logits" or (task == "classify" and prompt and prompt.verbalizer):
            return names.LOGITS
        head = prompt.file.head_spec if prompt else None
        pooled = task == "classify" and head is not None and head.input == "pooler"
        return names.POOLER_OUTPUT if pooled else names.LAST_HIDDEN_STATE

    def _room(self, prompt: LoadedPrompt | None) -> int | None:
        limit = self._manifest.geometry.max_positions
        return limit - (prompt.past_length if prompt else 0) if limit else None

    def _encode(self, prompt: LoadedPrompt | None, fields: Mapping[str, str], truncate: bool, task: str) -> EncodedText:
        template = prompt.file.template if prompt else _TEXT_ALONE
        return encode_text(
            template,
            self._tokenizer,
            fields,
            num_virtual_tokens=prompt.rows if prompt else 0,
            first_virtual_id=self._manifest.geometry.vocab_size,
            max_length=self._room(prompt),
            truncate=truncate,
            add_special_tokens=prompt.file.add_special_tokens if prompt else True,
            locate=located_slot(template) if task in ("tag", "qa") else None,
        )

    def _given(self, request: Request, prompt: LoadedPrompt | None, task: str) -> EncodedText:
        vocab, room = self._manifest.geometry.vocab_size, self._room(prompt)
        if task in ("tag", "qa"):
            raise InputError(f"{task} needs the text, to say where its words stand; give text instead of input_ids")
        ids = [*range(vocab, vocab + (prompt.rows if prompt else 0)), *given_ids(request, prompt, vocab)]
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

    def _row(self, prompt: LoadedPrompt | None, encoded: EncodedText, mask_position: int) -> Row:
        rows = self._tensor(prompt, names.PROMPT_EMBEDDINGS) if prompt and prompt.rows else None
        past = self._tensor(prompt, names.PAST_KEY_VALUES) if prompt and prompt.past_length else None
        return make_row(
            encoded.ids,
            self._manifest.geometry.vocab_size,
            type_ids=encoded.type_ids,
            embeddings=rows,
            prefix=past,
            mask_position=mask_position,
        )

    def _tensor(self, prompt: LoadedPrompt, name: str) -> KV:
        return self.derived.derive(prompt, name, lambda: prompt.tensors().tensors()[name])

    def _answer(
        self,
        request: Request,
        task: str,
        prompt: LoadedPrompt | None,
        encoded: EncodedText,
        clock: Clock,
        row: Row,
        outputs: Outputs,
    ) -> Result:
        if task == "logits":
            logits = np.asarray(outputs[names.LOGITS], np.float32)
            largest(logits)
            return logits
        if task == "classify":
            assert prompt is not None
            return dataclasses.replace(_classify(prompt, row, outputs), timings=clock.timings(0))
        states = _states(row, outputs)
        if task == "embed":
            return pool(states, row.text, request.pooling or self._manifest.pooling)
        assert prompt is not None
        logits = token_logits(prompt.file, states, prompt.rows)
        text = as_fields(request.text)[located_slot(prompt.file.template)]
        if task == "tag":
            return tag(prompt.file, logits, encoded.offsets, text)
        no_answer = int(row.text[0]) if prompt.file.generation.get("allow_no_answer") else None
        return answer(logits, encoded.offsets, text, no_answer)


def _states(row: Row, outputs: Outputs) -> Floats:
    found: Floats = outputs[names.LAST_HIDDEN_STATE][: row.length].astype(np.float32, copy=False)
    return found


def _classify(prompt: LoadedPrompt, row: Row, outputs: Outputs) -> Classification:
    if prompt.verbalizer is not None:
        logprobs = log_softmax(np.asarray(outputs[names.LOGITS], np.float64))
        return prompt.verbalizer.classification([logprobs[word[0]] for word in prompt.verbalizer.words])
    head = prompt.file.head_spec
    assert head is not None
    if head.input == "pooler":
        return classify_head(prompt.file, outputs[names.POOLER_OUTPUT].astype(np.float32, copy=False))
    return classify_head(prompt.file, pool(_states(row, outputs), row.text, head.input))
