"""Prompts of an encoder-decoder package: checked and compiled when they are added, their tensors read on demand."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprompt import names
from edgeprompt.engines.encoder.checks import GraphFacts, check_head
from edgeprompt.errors import PromptFileError, PromptNotFoundError, TemplateError, UnsupportedError
from edgeprompt.ort.kv_cache import PrefixCache
from edgeprompt.package.folder import Package
from edgeprompt.prompts.encoder_text import EncodedText, encode_text, located_slot
from edgeprompt.prompts.file import PromptFile
from edgeprompt.prompts.source import PromptSource
from edgeprompt.prompts.template import Template, VirtualTokens
from edgeprompt.prompts.verbalizer import Verbalizer

TENSOR_BUDGET = 64 << 20
ENCODER_PAST = f"encoder_{names.PAST_KEY_VALUES}"
_TENSORS = (names.PROMPT_EMBEDDINGS, names.PAST_KEY_VALUES, ENCODER_PAST)
_PLAIN = Template.parse("{text}")


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as the engine keeps it: what requests need at hand; its tensors come from `source` when needed."""

    source: PromptSource
    verbalizer: Verbalizer | None
    decoder_prefix: tuple[int, ...]
    rows: int
    """Virtual tokens in the encoder's text."""
    prefix_length: int
    """Positions in the decoder's self-attention."""

    @property
    def file(self) -> PromptFile:
        """Everything but the tensors."""
        return self.source.prompt


class PromptShelf:
    """All prompts by name. Safe from any thread; who holds a `Prompt` keeps it, whatever is added or removed."""

    def __init__(self, package: Package, budget: int | None, *, has_encoder_prefix: bool) -> None:
        """`budget`: most bytes of tensors kept in memory; None for the default."""
        self._manifest, self._tokenizer = package.manifest, package.tokenizer
        self._has_encoder_prefix = has_encoder_prefix
        self._resident = PrefixCache(TENSOR_BUDGET if budget is None else budget)
        self._prompts: dict[str, Prompt] = {}
        self._lock = threading.Lock()

    def add(self, name: str, source: PromptSource) -> None:
        """Check a prompt and keep it.

        Raises:
            BaseMismatchError: its tensors do not fit the package.
            UnsupportedError: it needs what encoder-decoders do not have.
            PromptFileError: its decoder prefix is no text and no list of token ids.
            TemplateError: its template has no place for its virtual tokens.
        """
        ready = self._ready(source)
        with self._lock:
            old = self._prompts.get(name)
            self._prompts[name] = ready
        self._forget(old)

    def remove(self, name: str) -> None:
        """Forget a prompt.

        Raises:
            PromptNotFoundError: there is none of that name.
        """
        with self._lock:
            old = self.find(name)
            del self._prompts[name]
        self._forget(old)

    def find(self, name: str) -> Prompt:
        """A prompt by name.

        Raises:
            PromptNotFoundError: there is none of that name.
        """
        found = self._prompts.get(name)
        if found is None:
            there = ", ".join(sorted(self._prompts)[:20]) or "none"
            raise PromptNotFoundError(f"no prompt {name!r} is loaded (loaded: {there}); add it with add_prompt")
        return found

    def tensor(self, prompt: Prompt | None, name: str) -> npt.NDArray[Any] | None:
        """One of a prompt's tensors, from the cache or its file."""
        if prompt is None:
            return None
        found = self._resident.get((prompt, name))
        if found is None:
            tensor = prompt.source.tensors().tensors().get(name)
            if tensor is None:
                return None
            dtype = np.float32 if name == names.PROMPT_EMBEDDINGS else self._manifest.kv_dtype
            found = np.ascontiguousarray(tensor, dtype)
            self._resident.put((prompt, name), found)
        return found

    def text_ids(self, prompt: Prompt | None, fields: Mapping[str, str], limit: int | None) -> list[int]:
        """Ids of a request for the encoder, the prompt's virtual tokens among them; cut to `limit` where given."""
        rows = prompt.rows if prompt else 0
        template = prompt.file.template if prompt else _PLAIN
        return (template if rows else template.without_prompt()).encode(
            self._tokenizer,
            fields,
            num_virtual_tokens=rows,
            first_virtual_id=self._manifest.geometry.vocab_size,
            max_length=limit,
            add_special_tokens=prompt.file.add_special_tokens if prompt else True,
        )

    def words(self, prompt: Prompt, fields: Mapping[str, str], limit: int | None, *, truncate: bool) -> EncodedText:
        """A text whose words are labelled: ids, the prompt's virtual tokens in front, and where each token stands."""
        return encode_text(
            prompt.file.template,
            self._tokenizer,
            fields,
            num_virtual_tokens=prompt.rows,
            first_virtual_id=self._manifest.geometry.vocab_size,
            max_length=limit,
            truncate=truncate,
            add_special_tokens=prompt.file.add_special_tokens,
            locate=located_slot(prompt.file.template),
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text alone, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _ready(self, source: PromptSource) -> Prompt:
        prompt = source.tensors()
        prompt.check_geometry(self._manifest)
        if prompt.head_spec is not None and prompt.task == "tag":
            check_head(prompt.name, prompt, GraphFacts(self._manifest, (), ()))
        elif prompt.head_spec is not None or prompt.task in ("tag", "qa"):
            raise UnsupportedError(
                f"prompt {prompt.name!r} is for task {prompt.task!r}"
                f"{' with a head' if prompt.head_spec is not None else ''}; an encoder-decoder answers by text, or "
                "labels words by a head on its encoder: tune it for classify (with a verbalizer) or generate"
            )
        if source.has_encoder_prefix and not self._has_encoder_prefix:
            raise UnsupportedError(
                f"prompt {prompt.name!r} has encoder deep prompts, and this package's encoder "
                f"({self._manifest.model_type}) takes none; T5 exported by the torch route does"
            )
        verbalizer = None
        if prompt.verbalizer:
            verbalizer = Verbalizer.compile(
                prompt.verbalizer, self.encode, prompt.calibration, prompt.verbalizer_aggregation
            )
        rows = 0 if prompt.prompt_embeddings is None else len(prompt.prompt_embeddings)
        ready = Prompt(
            source=source,
            verbalizer=verbalizer,
            decoder_prefix=self._decoder_prefix(prompt),
            rows=rows,
            prefix_length=0 if prompt.past_key_values is None else prompt.past_key_values.shape[3],
        )
        if rows and not any(isinstance(part, VirtualTokens) for part in prompt.template.parts):
            raise TemplateError(
                f"prompt {prompt.name!r} has {rows} virtual tokens, and its template {str(prompt.template)!r} "
                "no {prompt}"
            )
        self.text_ids(ready, dict.fromkeys(prompt.template.slots, "a"), None)
        return ready

    def _decoder_prefix(self, prompt: PromptFile) -> tuple[int, ...]:
        value = prompt.generation.get("decoder_prefix", ())
        ids = self.encode(value) if isinstance(value, str) else value
        known = self._manifest.geometry.vocab_size
        if not isinstance(ids, (list, tuple)) or not all(type(one) is int and 0 <= one < known for one in ids):
            raise PromptFileError(
                f"prompt {prompt.name!r}: decoder_prefix is {value!r}; it must be text, or token ids below {known}"
            )
        return tuple(ids)

    def _forget(self, prompt: Prompt | None) -> None:
        for name in _TENSORS:
            self._resident.remove((prompt, name))
