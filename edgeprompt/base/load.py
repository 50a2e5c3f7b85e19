"""A base model from a hub id, a local folder or a GGUF file, in float32."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from edgeprompt import names
from edgeprompt.base import accounting, memory
from edgeprompt.base.checkpoint import map_checkpoint, measure, read_checkpoint
from edgeprompt.base.encoder import read_encoder
from edgeprompt.base.families import find_family
from edgeprompt.base.fingerprint import base_fingerprint, note_known
from edgeprompt.base.gguf_file import GgufFile
from edgeprompt.base.mapped import own
from edgeprompt.base.rope import check_rope
from edgeprompt.base.sentencepiece_file import find_sentencepiece, read_sentencepiece
from edgeprompt.base.source import (
    ADAPTER,
    CONFIG,
    TOKENIZERS,
    Source,
    check_config,
    check_contents,
    find_source,
    one_line,
    read_json,
)
from edgeprompt.base.tokenizer_files import check_tokenizer_files
from edgeprompt.errors import SourceError
from edgeprompt.package.manifest import Base

GENERATION_CONFIG = "generation_config.json"
_EMBEDDINGS = ("shared.weight", "embed_tokens.weight")
"""Names that encoder-decoders store the embedding under; any of them gives it."""


@dataclass(frozen=True)
class LoadedBase:
    """A frozen base model in PyTorch, ready to export or to compare with."""

    name: str
    """What people call it: the hub id, the folder's or the GGUF file's name."""
    model: Any
    """A transformers model in float32, in evaluation mode, without gradients."""
    tokenizer: Any | None
    """A transformers tokenizer, None where the base has none."""
    family: Any
    """Its entry in `edgeprompt.base.families`."""
    stored: Mapping[str, str] = field(default_factory=dict)
    """Parameter -> its type in the GGUF file ("Q4_K"); empty for bases that are no GGUF file."""
    pinned: str | None = None
    """`user/repo@commit` of a base that came from the Hugging Face Hub."""

    @property
    def config(self) -> Any:
        """The transformers config."""
        return self.model.config

    @property
    def fingerprint(self) -> str:
        """The base fingerprint (`edgeprompt.base.fingerprint`)."""
        return base_fingerprint(self.model)

    @property
    def base(self) -> Base:
        """Its name and fingerprint, as prompts and packages note them."""
        return Base(self.name, self.fingerprint)


def load_base(
    base: str | os.PathLike[str],
    *,
    need: memory.Need = memory.to_load,
    mapped: bool = False,
    scratch: Path | None = None,
) -> LoadedBase:
    """Load BASE: a Hugging Face id, a local folder, or a `.gguf` file (any part of a split one).

    Every parameter is accounted for (`edgeprompt.base.accounting`); what was changed on the way is logged.

    Args:
        base: What to load.
        need: Memory that the work ahead takes (`edgeprompt.base.memory`).
        mapped: Leave a decoder's large matrices in its files, in the type they have there (`edgeprompt.base.mapped`);
            such a model computes as one in float32 does, and must not be trained or written to.
        scratch: With `mapped`, a folder for the matrices of a `.gguf` file, which are float32 on disk then, not in
            memory; their file there is gone when the model is.

    Raises:
        CapacityError: less memory is free than that.
        SourceError: nothing is there, it is damaged, incomplete or quantised, or its architecture is not known.
    """
    source = find_source(base)
    with _quiet():
        found: tuple[Any, Any, Any, dict[str, str]] = (
            _load_gguf(source, need, scratch if mapped else None)
            if source.gguf
            else (*_load_folder(source, need, mapped), {})
        )
        model, tokenizer, family, stored = found
    accounting.check_made(model, source.given)
    buffers = ((name, value) for name, value in model.named_buffers() if value.is_floating_point())
    accounting.check_values(chain(model.named_parameters(), buffers), source.given)
    model.requires_grad_(False)
    return LoadedBase(source.name, model.eval(), tokenizer, family, stored, source.pinned)


def _load_folder(source: Source, need: memory.Need, mapped: bool) -> tuple[Any, Any, Any]:
    import transformers

    raw = read_json(source.folder / CONFIG)
    if not isinstance(raw.get("model_type"), str):
        raise SourceError(f"the config of {source.given!r} names no model_type, but {raw.get('model_type')!r}")
    known = raw["model_type"] in transformers.CONFIG_MAPPING
    check_config(source.given, raw, known)
    if raw.get("auto_map"):  # it may compute something else, and what is exported is compared with transformers' model
        accounting.tell(
            f"{source.given!r} brings code of its own (auto_map), which edgeprompt does not run; it is taken as "
            f"transformers' own {raw['model_type']!r}"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:  # a foreign file: transformers raises nearly anything
        raise SourceError(f"cannot read the config of {source.given!r}: {one_line(error)}") from error
    family = find_family(config.model_type)
    accounting.check_config_values(config, source.given)
    if (source.folder / ADAPTER).exists():
        raise SourceError(
            f"{source.given!r} holds a PEFT adapter ({ADAPTER}) beside the base's weights, and transformers would "
            "apply it: merge it first (PeftModel.merge_and_unload), or move it away to take the base without it"
        )
    check_rope(config, source.given)
    tokenizer = read_tokenizer(source.given, source.folder)
    mapped = mapped and family.architecture == names.DECODER_ONLY
    memory.check_memory(source.given, measure(source.folder, mapped=mapped), need)
    tensors = read_checkpoint(source.folder)
    check_layers(tensors, config, source.given)
    if family.architecture == names.ENCODER_ONLY:
        model = read_encoder(config, tensors, source.given)
    else:
        if mapped:
            tensors = map_checkpoint(source.folder, tensors)
        model = _read_model(config, tensors, source, family, raw, mapped)
    if hasattr(model, "generation_config"):
        model.generation_config = _generation_config(source)
    model.config._name_or_path = str(source.folder)
    return model, tokenizer, family


def _generation_config(source: Source) -> Any:
    """Of generation_config.json; where there is none, of the fields that older checkpoints have in config.json.

    Raises:
        SourceError: it cannot be read.
    """
    from transformers import GenerationConfig

    own = (source.folder / GENERATION_CONFIG).is_file()
    file = GENERATION_CONFIG if own else CONFIG
    read_json(source.folder / file)
    try:
        return GenerationConfig.from_pretrained(source.folder, config_file_name=file, _from_model_config=not own)
    except Exception as error:
        raise SourceError(f"cannot read the generation config in {file} of {source.given!r}: {one_line(error)}") from (
            error
        )


def _read_model(
    config: Any, tensors: Mapping[str, Any], source: Source, family: Any, raw: Mapping[str, Any], mapped: bool
) -> Any:
    import torch

    model_class = _model_class(config, family)
    renamed = accounting.match(tensors, config, model_class, source.given)
    if family.architecture == names.ENCODER_DECODER and family.untied(raw):
        # transformers ties both whatever the config says, and would fill one that is missing from the other.
        for needed, ends in (("lm_head.weight", ("lm_head.weight",)), ("shared.weight", _EMBEDDINGS)):
            if not any(name.endswith(ends) for name in renamed):
                raise SourceError(
                    f"{source.given!r} lacks 1 tensors that {model_class.__name__} needs ({needed}): its config gives "
                    "the head weights of its own; the checkpoint is incomplete, or its config belongs to another model"
                )
    model, info = accounting.load(model_class, config, renamed, source.given, mapped=mapped)
    accounting.check_loaded(info, model, source.given)
    accounting.check_kept(model, renamed, source.given)
    if family.architecture == names.ENCODER_DECODER:
        shared: Any = model.get_input_embeddings().weight
        table = getattr(model.get_encoder(), "embed_tokens", None)
        if table is not None and not torch.equal(table.weight, shared):
            raise SourceError(
                f"{source.given!r} holds an embedding of the encoder's own beside the shared one, and its family has "
                "one for both; save the model again as it computes"
            )
    if (bias := "final_logits_bias") in model.state_dict() and bias not in renamed:
        accounting.tell(f"{source.given!r} has no {bias}, so its head is taken to have none (zeros)")
    return model


def _load_gguf(source: Source, need: memory.Need, scratch: Path | None) -> tuple[Any, Any, Any, dict[str, str]]:
    import torch
    from transformers import AutoConfig

    file = GgufFile(source.gguf)
    with file.reading() as where:
        try:
            config = AutoConfig.from_pretrained(**where)
        except Exception as error:  # a foreign file: transformers raises nearly anything
            raise SourceError(f"cannot read the config of {source.given!r}: {one_line(error)}") from error
        family = find_family(config.model_type)
        if family.architecture == names.ENCODER_ONLY:
            raise SourceError(f"{source.given!r} is an encoder in a GGUF file; give its safetensors model")
        tokenizer = _gguf_tokenizer(source, file, where)
        check_layers(file.names, config, source.given)
        accounting.check_config_values(config, source.given)
        check_rope(config, source.given)
        counts = [int(tensor.n_elements) for tensor in file.reader.tensors]
        sizes = memory.Sizes(sum(counts), max(counts), 0 if scratch is not None else sum(counts))
        memory.check_memory(source.given, sizes, need)
        file.keep_fields(config)
        with file.on_disk(scratch) if scratch is not None else contextlib.nullcontext() as spill:
            try:
                model, info = _model_class(config, family).from_pretrained(
                    **where, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
                )
            except Exception as error:
                raise SourceError(f"cannot load the base model {source.given!r}: {one_line(error)}") from error
    accounting.check_loaded(info, model, source.given, unused=file.unmapped)
    model = _without_gguf(model)
    note_known(model, file.known(config))
    if spill is not None:
        own(model, [spill.map])
    model.config._name_or_path = str(source.folder)
    return model, tokenizer, family, file.types


def check_layers(stored: Mapping[str, Any] | list[str], config: Any, given: str) -> None:
    """Compare numbers of layers in a file with those of the config, the encoder's and the decoder's apart.

    Raises:
        SourceError: the config has more, or fewer.
    """
    if getattr(config, "is_encoder_decoder", False):
        encoder = getattr(config, "encoder_layers", None) or config.num_layers
        decoder = getattr(config, "decoder_layers", None) or config.num_decoder_layers
        for side, layers in (("encoder.", encoder), ("decoder.", decoder)):
            accounting.check_layers([name for name in stored if side in name], layers, given)
    elif config.model_type != "albert":  # which counts how often one layer is run
        accounting.check_layers(stored, config.num_hidden_layers, given)


def _model_class(config: Any, family: Any) -> Any:
    import transformers

    mapping = {
        names.DECODER_ONLY: transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        names.ENCODER_DECODER: transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    }[family.architecture]
    return mapping[type(config)]


def read_tokenizer(given: str, folder: Path) -> Any | None:
    """The tokenizer in a folder, None where it has none.

    Raises:
        SourceError: it is damaged, or none that a package can hold is made of it.
        MissingDependencyError: a SentencePiece model alone, and the library that reads it is not installed.
    """
    from transformers import AutoTokenizer

    check_tokenizer_files(folder, given)
    if (alone := find_sentencepiece(folder)) is not None:
        return read_sentencepiece(given, folder, alone)
    files = [folder / name for name in TOKENIZERS if (folder / name).exists()]
    if not files:
        return None
    for file in files:
        check_contents(file)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a foreign file: the tokenizers library raises plain Exception
        raise SourceError(f"cannot load the tokenizer of {given!r}: {one_line(error)}") from error


def _gguf_tokenizer(source: Source, file: GgufFile, where: Mapping[str, str]) -> Any:
    """The tokenizer inside a GGUF file; where it has none, the one beside it."""
    try:
        return file.read_tokenizer(where)
    except Exception as error:  # a foreign file: transformers raises nearly anything
        if (source.folder / "tokenizer.json").is_file():
            accounting.tell(
                f"{file.name!r} has no tokenizer that can be read ({one_line(error)}); the tokenizer.json "
                "beside it is used"
            )
            return read_tokenizer(source.given, source.folder)
        raise SourceError(
            f"{source.given!r} has no tokenizer that can be read ({one_line(error)}); put the tokenizer.json of its "
            "model beside it"
        ) from error


def _without_gguf(model: Any) -> Any:
    """The same model as an ordinary one: GGUF loading leaves a quantization_config that refuses saving."""
    from transformers import initialization

    config = type(model.config)(
        **{key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    )
    config.architectures = [type(model).__name__]
    with initialization.no_init_weights():
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    head = model.get_output_embeddings().weight
    if head.data_ptr() != model.get_input_embeddings().weight.data_ptr():  # T5's config ties both whatever the file has
        plain.get_output_embeddings().weight = head
    plain.generation_config = model.generation_config
    return plain


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own report of a load: what it tells is an error here, or nothing."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
