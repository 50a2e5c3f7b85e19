"""The prompt file: a `.safetensors` file with a soft prompt and everything needed to use it (docs/prompt-file.md)."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import struct
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from edgeprompt import names
from edgeprompt.errors import BaseMismatchError, PromptFileError, TemplateError
from edgeprompt.package import strict_json
from edgeprompt.package.files import open_regular, read_regular, write_atomic
from edgeprompt.package.manifest import Base, Geometry, Manifest
from edgeprompt.package.outputs import PROMPT
from edgeprompt.package.strict_json import check_keys, check_type
from edgeprompt.prompts.template import Literal, Template
from edgeprompt.prompts.verbalizer import AGGREGATIONS

_LOG = logging.getLogger("edgeprompt")
Array = npt.NDArray[np.float32] | npt.NDArray[np.float16]

FORMAT = "edgeprompt-prompt"
VERSION = 2
"""Of files whose keys and values stand inside the text (infix-tuning). All others are of version 1, and say so."""
METADATA_KEY = names.PROMPT_METADATA
MAX_HEADER_BYTES = 1 << 20
MAX_FILE_BYTES = 1 << 30
MAX_VIRTUAL_TOKENS = 65_536
HEAD_INPUTS = ("first", "first_text", "pooler", "mean", "mean_all", "last", "tokens", "tokens_unshifted")
HEAD_OPERATIONS = ("linear", "tanh", "gelu", "relu", "silu", "layer_norm")


@dataclass(frozen=True)
class HeadStep:
    """One step of a task head. `linear` and `layer_norm` read `head.{name}.weight` and, if present, `.bias`."""

    operation: str
    name: str = ""


@dataclass(frozen=True)
class Head:
    """A task head, which the runtime applies to the hidden states of a sequence.

    `input` names the hidden states that the head reads:

    - "first": the first position of the sequence, virtual tokens included (PEFT's BERT).
    - "first_text": the first position behind the virtual tokens.
    - "pooler": the base's pooled vector.
    - "mean", "last": the mean, or the last position, of the text.
    - "mean_all": the mean of virtual tokens and text (PEFT's ModernBERT).
    - "tokens": every position of the text (tagging, question answering).
    - "tokens_unshifted": as many positions as the text has, from the sequence's first on. Position i answers for text
      token i although virtual tokens stand in front, as PEFT's question answering is trained.
    """

    input: str
    steps: tuple[HeadStep, ...]
    problem_type: str = "single_label"


@dataclass(frozen=True)
class TunedFor:
    """The weights that the prompt was trained against; `weights_hash` None: the base in full precision."""

    precision: str
    weights_hash: str | None = None


@dataclass(frozen=True)
class Golden:
    """One input and the answer to it, so that a device can check that the prompt works there."""

    fields: Mapping[str, str]
    label: str | None = None
    token_ids: tuple[int, ...] = ()
    logits: Mapping[str, float] = field(default_factory=dict)
    """A few logits of the first answer, keyed by label (classify) or by token id."""


class Sizes(Protocol):
    """What a prompt's shapes are checked against: a manifest, or anything else that knows its base and sizes."""

    @property
    def base(self) -> Base:
        """The base's name and fingerprint."""

    @property
    def geometry(self) -> Geometry:
        """The base's sizes."""


@dataclass(frozen=True)
class PromptFile:
    """A soft prompt for one task on one base.

    Tensors (float32 or float16, finite): `prompt_embeddings [num_virtual_tokens, hidden_size]`;
    `past_key_values [num_layers, 2, num_key_value_heads, num_virtual_tokens, head_size]`; `head` without the
    "head." of the file, for example `{"classifier.weight": [num_labels, hidden_size]}`. A prompt has embeddings,
    past_key_values, or neither (only a head).
    """

    name: str
    method: str
    task: str
    base: Base
    template: Template
    prompt_embeddings: Array | None = None
    past_key_values: Array | None = None
    encoder_past_key_values: Array | None = None
    """Encoder deep prompts of an encoder-decoder (OpenPrompt's T5 prefix); shape as `past_key_values`."""
    head: Mapping[str, Array] = field(default_factory=dict)
    head_spec: Head | None = None
    verbalizer: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Label -> label words, in label order."""
    verbalizer_aggregation: str = "sum"
    """How the scores of several words become one: "sum" of probabilities, "mean" or "max" of log-probabilities."""
    labels: tuple[str, ...] = ()
    """Label names by class index."""
    calibration: tuple[float, ...] = ()
    """Subtracted from each label's score before the decision (contextual calibration)."""
    tokenizer_fingerprint: str | None = None
    add_special_tokens: bool = True
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Defaults for generation: max_new_tokens, stop, temperature, top_k, top_p, chat; encoder-decoders also num_beams,
    length_penalty, early_stopping, and decoder_prefix (text or ids that the decoder starts with)."""
    tuned_for: TunedFor | tuple[TunedFor, ...] | None = None
    """Several, where one prompt was tuned for several packages."""
    training: Mapping[str, Any] = field(default_factory=dict)
    golden: Golden | None = None
    distilled_from: Mapping[str, Any] = field(default_factory=dict)
    """Of a distilled prompt: the teacher (`base`, `fingerprint`), what it read (`template`), and how closely the prompt
    follows it (docs/distillation.md)."""
    is_infix: bool = False
    """Whether its keys and values stand inside the text, where the template says, and not in front (infix-tuning)."""

    @property
    def tuned_weights(self) -> tuple[TunedFor, ...]:
        """All weights that the prompt was tuned for; empty where that is not known."""
        tuned = self.tuned_for
        return () if tuned is None else (tuned,) if isinstance(tuned, TunedFor) else tuned

    @property
    def num_virtual_tokens(self) -> int:
        """How many virtual tokens or prefix positions the prompt has."""
        if self.prompt_embeddings is not None:
            return int(self.prompt_embeddings.shape[0])
        past = self.past_key_values if self.past_key_values is not None else self.encoder_past_key_values
        return int(past.shape[3]) if past is not None else 0

    def tensors(self) -> dict[str, Array]:
        """All tensors under their names in the file."""
        found = {
            names.PROMPT_EMBEDDINGS: self.prompt_embeddings,
            names.PAST_KEY_VALUES: self.past_key_values,
            f"encoder_{names.PAST_KEY_VALUES}": self.encoder_past_key_values,
            **{f"head.{name}": tensor for name, tensor in self.head.items()},
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def metadata(self) -> dict[str, Any]:
        """The JSON object stored under the `edgeprompt` key."""
        return {
            "format": FORMAT,
            "version": VERSION if self.is_infix else 1,
            "name": self.name,
            "method": self.method,
            "task": self.task,
            "base": dataclasses.asdict(self.base),
            "num_virtual_tokens": self.num_virtual_tokens,
            "template": self.template.to_json(),
            "head": dataclasses.asdict(self.head_spec) if self.head_spec else None,
            "verbalizer": [[label, list(words)] for label, words in self.verbalizer.items()],
            # Left out where it is the default: files of earlier versions keep their bytes, and are read by them.
            **({} if self.verbalizer_aggregation == "sum" else {"verbalizer_aggregation": self.verbalizer_aggregation}),
            "labels": list(self.labels),
            "calibration": list(self.calibration),
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "add_special_tokens": self.add_special_tokens,
            "generation": dict(self.generation),
            "tuned_for": _tuned_json(self.tuned_for),
            "training": dict(self.training),
            "golden": dataclasses.asdict(self.golden) if self.golden else None,
            **({"distilled_from": dict(self.distilled_from)} if self.distilled_from else {}),
        }

    def to_bytes(self) -> bytes:
        """The file's bytes, the same for the same prompt.

        Raises:
            PromptFileError: the prompt breaks the format.
        """
        tensors = {name: np.require(tensor, requirements="C") for name, tensor in sorted(self.tensors().items())}
        try:
            _check_tensors(self, self.tensors())
            text = strict_json.dumps(self.metadata())
            text.encode()
            if not tensors:  # safetensors needs no tensor, but a prompt without any would be no prompt
                raise ValueError("there is no tensor to save")
        except ValueError as error:
            raise PromptFileError(f"cannot save prompt {self.name!r}: {error}") from error
        return save_tensors(tensors, metadata={METADATA_KEY: text})

    @property
    def sha256(self) -> str:
        """Hash of the file's bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def check_base(self, manifest: Manifest) -> None:
        """Reject a package that this prompt was not made for.

        Raises:
            BaseMismatchError: base fingerprint, tokenizer or a tensor's shape differs; both values are named.
        """
        if not self.base.matches(manifest.base):
            raise BaseMismatchError(
                f"prompt {self.name!r} was made for base {self.base.name!r} ({self.base.brief}), "
                f"the package holds {manifest.base.name!r} ({manifest.base.brief})"
                f"{self.base.apart(manifest.base)}; tune it for this base"
            )
        weaker = self.base.weaker(manifest.base)
        if weaker:
            _LOG.info("prompt %r: %s", self.name, weaker)
        ours, theirs = self.tokenizer_fingerprint, manifest.tokenizer_fingerprint
        if ours and theirs and ours != theirs:
            raise BaseMismatchError(f"prompt {self.name!r} was made with tokenizer {ours}, the package holds {theirs}")
        self.check_geometry(manifest)

    def check_geometry(self, manifest: Sizes) -> None:
        """Reject tensors that do not fit the package's sizes.

        Raises:
            BaseMismatchError: names the tensor, its shape and the shape that fits.
        """
        size, count = manifest.geometry, self.num_virtual_tokens
        prefix = (2, size.num_key_value_heads, count, size.head_size)
        expected = {
            names.PROMPT_EMBEDDINGS: (count, size.embedding_size or size.hidden_size),
            names.PAST_KEY_VALUES: (size.num_layers, *prefix),
            f"encoder_{names.PAST_KEY_VALUES}": (size.num_encoder_layers, *prefix),
        }
        for name, shape in expected.items():
            tensor = self.tensors().get(name)
            if tensor is not None and tensor.shape != shape:
                raise BaseMismatchError(
                    f"prompt {self.name!r}: {name} is {list(tensor.shape)}, {manifest.base.name} needs {list(shape)}"
                )


def load_prompt(path: str | os.PathLike[str]) -> PromptFile:
    """Read and check a prompt file.

    Raises:
        PromptFileError: missing, no regular file, too large, broken, or breaking the format; the message says where.
    """
    file = Path(path)
    try:
        return tell_alike(from_bytes(read_regular(file, MAX_FILE_BYTES)))
    except OSError as error:
        raise PromptFileError(f"cannot read prompt file {str(file)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise PromptFileError(f"bad prompt file {str(file)!r}: {error}") from error


def labels_alike(prompt: PromptFile) -> str | None:
    """What is wrong with labels that differ in white space at their ends or in their Unicode form alone."""
    seen: dict[str, str] = {}
    for label in dict.fromkeys((*prompt.labels, *prompt.verbalizer)):
        other = seen.setdefault(unicodedata.normalize("NFC", label.strip()), label)
        if other != label:
            return f"labels {other!a} and {label!a} look the same, and no data can have both"
    return None


def tell_alike(prompt: PromptFile) -> PromptFile:
    """Say so where a prompt of earlier versions has labels that look the same; its answers tell them apart."""
    if alike := labels_alike(prompt):
        _LOG.warning("note: prompt %r: %s", prompt.name, alike)
    return prompt


def save_prompt(prompt: PromptFile, path: str | os.PathLike[str]) -> None:
    """Write a prompt file: atomic, byte-for-byte deterministic.

    Raises:
        PromptFileError: the prompt breaks the format, or the file cannot be written.
        InputError: `path` holds another file than a prompt file, which is not replaced.
    """
    data = prompt.to_bytes()
    if alike := labels_alike(prompt):
        raise PromptFileError(f"cannot save prompt {prompt.name!r}: {alike}; rename one of them")
    try:
        write_atomic(path, data, PROMPT)
    except OSError as error:
        raise PromptFileError(f"cannot write prompt file {str(path)!r}: {error.strerror or error}") from error


def from_bytes(data: bytes) -> PromptFile:
    """Read and check the bytes of a prompt file.

    Raises:
        PromptFileError: broken, or breaking the format.
    """
    with _telling():
        _, written = _read_header(data, len(data))  # before safetensors sees the bytes: sizes, duplicate names
        tensors = dict(load_tensors(data))
        prompt = _from_parts(written, tensors)
        _check_tensors(prompt, prompt.tensors())
        if len(prompt.tensors()) != len(tensors):
            raise ValueError(f"unknown tensor {min(set(tensors) - set(prompt.tensors()))!r}")
        if prompt.num_virtual_tokens != written["num_virtual_tokens"]:
            raise ValueError(
                f"num_virtual_tokens is {written['num_virtual_tokens']}, the tensors have {prompt.num_virtual_tokens}"
            )
    return prompt


def outline(path: str | os.PathLike[str]) -> PromptFile:
    """A prompt as the header of its file tells: its tensors have their shapes, and no values.

    Raises:
        PromptFileError: the file cannot be read, is not whole, or its header breaks the format.
    """
    with _telling():
        try:
            with open_regular(path, MAX_FILE_BYTES) as file:
                whole = os.fstat(file.fileno()).st_size
                data = file.read(8)
                data += file.read(min(int.from_bytes(data, "little"), MAX_HEADER_BYTES))
        except OSError as error:
            raise ValueError(f"it cannot be read: {error.strerror or error}") from error
        specs, written = _read_header(data, whole)
        if whole != len(data) + max((spec["data_offsets"][1] for spec in specs.values()), default=0):
            raise ValueError(f"it has {whole} bytes, its header tells of another number; is it being written?")
        kinds: dict[str, Any] = {"F32": np.zeros((), np.float32), "F16": np.zeros((), np.float16)}
        shapes = {name: np.broadcast_to(kinds[spec["dtype"]], spec["shape"]) for name, spec in specs.items()}
        return _from_parts(written, shapes)


@contextmanager
def _telling() -> Iterator[None]:
    """Make a `PromptFileError` of what goes wrong with a file."""
    try:
        yield
    except PromptFileError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, SafetensorError, TemplateError) as error:
        raise PromptFileError(str(error) or type(error).__name__) from error


def _read_header(data: bytes, whole: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the header at the start of `data` says of each tensor, and the metadata; the file has `whole` bytes."""
    if len(data) < 8:
        raise ValueError("too short for a safetensors file")
    (size,) = struct.unpack("<Q", data[:8])
    if size > min(MAX_HEADER_BYTES, whole - 8):
        raise ValueError(f"the header claims {size} bytes; the file has {whole}, at most {MAX_HEADER_BYTES} fit")
    header = check_type(strict_json.loads(data[8 : 8 + size]), dict, "the header")
    metadata = header.pop("__metadata__", None)
    for name, spec in header.items():
        if not isinstance(spec, dict) or spec.get("dtype") not in ("F32", "F16"):
            kind = spec.get("dtype") if isinstance(spec, dict) else spec
            raise ValueError(f"tensor {name!r} is {kind}, allowed: F32, F16")
    if not isinstance(metadata, dict) or set(metadata) != {METADATA_KEY}:
        raise ValueError(
            f"no edgeprompt prompt file: __metadata__ must hold the key {METADATA_KEY!r} alone "
            "(edgeprompt convert reads other tools' prompts)"
        )
    written = check_type(strict_json.loads(check_type(metadata[METADATA_KEY], str, METADATA_KEY)), dict, "metadata")
    strict_json.dumps(written).encode()  # JSON can escape half a surrogate pair, which no UTF-8 holds
    return header, written


@dataclass(frozen=True)
class _Written:
    """The keys of the metadata, for the check that none is unknown or missing."""

    format: str
    version: int
    name: str
    method: str
    task: str
    base: Any
    num_virtual_tokens: int
    template: Any
    head: Any
    verbalizer: Any
    labels: Any
    calibration: Any
    tokenizer_fingerprint: Any
    add_special_tokens: bool
    generation: Any
    tuned_for: Any
    training: Any
    golden: Any
    verbalizer_aggregation: Any = "sum"
    distilled_from: Any = None


def _tuned_json(tuned: TunedFor | tuple[TunedFor, ...] | None) -> Any:
    if isinstance(tuned, tuple):
        return [dataclasses.asdict(one) for one in tuned]
    return None if tuned is None else dataclasses.asdict(tuned)


def _tuned_for(data: object) -> TunedFor | tuple[TunedFor, ...] | None:
    if isinstance(data, list):
        return tuple(TunedFor(**check_keys(TunedFor, one, "tuned_for")) for one in data)
    return None if data is None else TunedFor(**check_keys(TunedFor, data, "tuned_for"))


def _from_parts(data: dict[str, Any], tensors: dict[str, Array]) -> PromptFile:
    if data.get("format") != FORMAT:
        raise ValueError(f'"format" is {data.get("format")!r}, expected {FORMAT!r}')
    version = data.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(f"version {version!r}, this edgeprompt reads 1 to {VERSION}")
    check_keys(_Written, data, "metadata")
    for key in ("name", "method", "task"):
        check_type(data[key], str, key)
    check_type(data["num_virtual_tokens"], int, "num_virtual_tokens")
    head, golden = data["head"], data["golden"]
    if head is not None:
        steps = check_type(check_keys(Head, head, "head")["steps"], list, "head.steps")
        head = Head(**{**head, "steps": tuple(HeadStep(**check_keys(HeadStep, step, "head step")) for step in steps)})
    base = Base(**check_keys(Base, data["base"], "base"))
    check_type(base.name, str, "base.name")
    check_type(base.fingerprint, str, "base.fingerprint")
    return PromptFile(
        name=data["name"],
        method=data["method"],
        task=data["task"],
        base=base,
        template=Template.from_json(data["template"]),
        prompt_embeddings=tensors.get(names.PROMPT_EMBEDDINGS),
        past_key_values=tensors.get(names.PAST_KEY_VALUES),
        encoder_past_key_values=tensors.get(f"encoder_{names.PAST_KEY_VALUES}"),
        head={name.removeprefix("head."): tensor for name, tensor in tensors.items() if name.startswith("head.")},
        head_spec=head,
        verbalizer=_verbalizer(data["verbalizer"]),
        verbalizer_aggregation=check_type(data.get("verbalizer_aggregation", "sum"), str, "verbalizer_aggregation"),
        labels=tuple(check_type(label, str, "a label") for label in check_type(data["labels"], list, "labels")),
        calibration=tuple(_number(x, "calibration") for x in check_type(data["calibration"], list, "calibration")),
        tokenizer_fingerprint=check_type(data["tokenizer_fingerprint"], (str, type(None)), "tokenizer_fingerprint"),
        add_special_tokens=check_type(data["add_special_tokens"], bool, "add_special_tokens"),
        generation=check_type(data["generation"], dict, "generation"),
        tuned_for=_tuned_for(data["tuned_for"]),
        training=check_type(data["training"], dict, "training"),
        golden=_golden(golden) if golden is not None else None,
        distilled_from=check_type(data.get("distilled_from", {}), dict, "distilled_from"),
        is_infix=version == VERSION,
    )


def _number(value: object, where: str) -> float:
    return float(check_type(value, (int, float), where))


def _golden(data: object) -> Golden:
    found = check_keys(Golden, data, "golden")
    label = check_type(found.get("label"), (str, type(None)), "golden.label")
    token_ids = check_type(found.get("token_ids", []), list, "golden.token_ids")
    for token in token_ids:
        if check_type(token, int, "a golden token id") < 0:
            raise ValueError(f"a golden token id is {token}")
    fields = check_type(found["fields"], dict, "golden.fields")
    for text in fields.values():
        check_type(text, str, "a golden field")
    logits = check_type(found.get("logits", {}), dict, "golden.logits")
    for key, value in logits.items():
        _number(value, "a golden logit")
        if token_ids and label is None and not (key.isascii() and key.isdecimal()):
            raise ValueError(f"golden.logits has key {key!r}, where a token id is needed")
    return Golden(fields, label, tuple(token_ids), logits)


def _verbalizer(data: object) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for label, words in check_type(data, list, "verbalizer"):
        check_type(label, str, "a verbalizer's label")
        if label in found:
            raise ValueError(f"the verbalizer has label {label!r} twice")
        found[label] = tuple(check_type(w, str, "a label word") for w in check_type(words, list, "label words"))
        if not found[label] or not all(found[label]):
            raise ValueError(f"the verbalizer has no word for label {label!r}")
    return found


def _check_tensors(prompt: PromptFile, tensors: Mapping[str, Array]) -> None:
    """Refuse tensors and words that the format does not have.

    Raises:
        ValueError: says which, and what is allowed.
    """
    known = {names.PROMPT_EMBEDDINGS: 2, names.PAST_KEY_VALUES: 5, f"encoder_{names.PAST_KEY_VALUES}": 5}
    for name, tensor in tensors.items():
        rank = known.get(name)
        if rank is None and not name.startswith("head."):
            raise ValueError(f"unknown tensor {name!r}; known: {', '.join(known)}, head.*")
        if tensor.dtype not in (np.float32, np.float16):
            raise ValueError(f"tensor {name!r} is {tensor.dtype}, allowed: float32, float16")
        if rank is not None and tensor.ndim != rank:
            raise ValueError(f"tensor {name!r} has shape {list(tensor.shape)}, {rank} dimensions are needed")
        if tensor.size == 0:
            raise ValueError(f"tensor {name!r} is empty, shape {list(tensor.shape)}")
        if not np.isfinite(tensor).all():
            raise ValueError(f"tensor {name!r} holds NaN or infinity")
    if prompt.num_virtual_tokens > MAX_VIRTUAL_TOKENS:
        raise ValueError(f"{prompt.num_virtual_tokens} virtual tokens, at most {MAX_VIRTUAL_TOKENS} are allowed")
    if prompt.is_infix:
        check_infix(prompt)
    if prompt.prompt_embeddings is not None and prompt.past_key_values is not None:
        raise ValueError("both prompt_embeddings and past_key_values; a prompt has one of them")
    if not tensors:
        raise ValueError("no tensor")
    if prompt.method not in names.METHODS and prompt.method != "head":
        raise ValueError(f"method is {prompt.method!r}, allowed: {', '.join(names.METHODS)}, head")
    if prompt.task not in names.TASKS:
        raise ValueError(f"task is {prompt.task!r}, allowed: {', '.join(names.TASKS)}")
    if double := next((label for label in prompt.labels if prompt.labels.count(label) > 1), None):
        raise ValueError(f"label {double!r} stands twice in labels")
    if prompt.calibration and len(prompt.calibration) != len(prompt.verbalizer):
        raise ValueError(f"{len(prompt.calibration)} calibration values for {len(prompt.verbalizer)} labels")
    if prompt.verbalizer_aggregation not in AGGREGATIONS:
        allowed = ", ".join(AGGREGATIONS)
        raise ValueError(f"verbalizer_aggregation is {prompt.verbalizer_aggregation!r}, allowed: {allowed}")
    if prompt.verbalizer_aggregation != "sum" and not prompt.verbalizer:
        raise ValueError(f"verbalizer_aggregation is {prompt.verbalizer_aggregation!r}, and there is no verbalizer")
    _check_head(prompt)


def check_infix(prompt: PromptFile) -> None:
    """Refuse keys and values inside a text that have no place there, or nothing behind them that reads them.

    Raises:
        ValueError: says why.
    """
    if prompt.past_key_values is None or prompt.template.prompt_is_prefix:
        raise ValueError(f"version {VERSION} is for keys and values inside the text, and there are none")
    if prompt.encoder_past_key_values is not None:
        raise ValueError("encoder_past_key_values, and past_key_values inside the text; a prompt has one of them")
    if prompt.head_spec is not None and prompt.head_spec.input != "last":
        raise ValueError(
            f"a head on {prompt.head_spec.input!r}, and keys and values inside the text: they have no states"
        )
    if not isinstance(prompt.template.parts[-1], Literal):
        raise ValueError(
            f"template {str(prompt.template)!r} has no fixed text at its end, which reads the keys and values inside "
            "the text"
        )
    prompt.template.check_places(prompt.num_virtual_tokens)


def _check_head(prompt: PromptFile) -> None:
    spec = prompt.head_spec
    if spec is None:
        if prompt.head:
            raise ValueError("head tensors without a head description")
        return
    if spec.input not in HEAD_INPUTS:
        raise ValueError(f"head input is {spec.input!r}, allowed: {', '.join(HEAD_INPUTS)}")
    if spec.problem_type not in names.PROBLEM_TYPES:
        raise ValueError(f"problem_type is {spec.problem_type!r}, allowed: {', '.join(names.PROBLEM_TYPES)}")
    for step in spec.steps:
        if step.operation not in HEAD_OPERATIONS:
            raise ValueError(f"head operation is {step.operation!r}, allowed: {', '.join(HEAD_OPERATIONS)}")
        if step.operation in ("linear", "layer_norm") and f"{step.name}.weight" not in prompt.head:
            raise ValueError(
                f"the head needs tensor head.{step.name}.weight; there: {', '.join(prompt.head) or 'none'}"
            )
