"""A GGUF file as transformers reads it: parts joined, parsed once, tensors accounted for, rotary scaling kept."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprompt.base.source import check_contents, one_line
from edgeprompt.errors import SourceError

if TYPE_CHECKING:
    from edgeprompt.base.mapped import Spill

_LINEAR_ROPE = ("llama", "mistral", "qwen2", "qwen3")
"""Model types with one set of rotary parameters for all layers."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every Llama 3 model has; the factor is 8 (3.1, 3.3) or 32 (3.2)."""


_PLAIN = {
    "attention.key_length", "attention.value_length", "block_count", "context_length", "decoder_block_count",
    "embedding_length", "feed_forward_length", "pooling_type", "rope.freq_base", "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "tensor_data_layout", "vocab_size",
}  # fmt: skip
"""Keys of sizes, which the tensors show, and of bookkeeping."""
_GPT2 = ("gpt-2", "phi-2", "olmo", "jais", "mpt", "trillion", "granite-docling")
"""Rules (`tokenizer.ggml.pre`) that are GPT-2's in llama.cpp; transformers takes that for all that it does not know."""
_DIGITS_FIRST = ("smollm", "starcoder", "refact")
"""Rules that cut each digit off before GPT-2's, so that white space in front of a digit has other tokens."""
_EPSILONS = {"attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"}
_GEMMA3_27B_LAYERS = 62
_ARCHITECTURE = "general.architecture"


class GgufFile:
    """One GGUF file or all parts of a split one."""

    def __init__(self, parts: tuple[Path, ...]) -> None:
        self.path, self.name = parts[0], parts[0].name
        self.reader = _joined(parts)
        self.mapped: dict[str, str] = {}
        """Name in the file -> name in the model, filled while transformers loads."""

    @property
    def names(self) -> list[str]:
        """All tensors, by their names in the file."""
        return [tensor.name for tensor in self.reader.tensors]

    @property
    def unmapped(self) -> list[str]:
        """Tensors that the model has no place for; transformers passes over them in silence."""
        return [name for name in self.names if name not in self.mapped]

    @property
    def types(self) -> dict[str, str]:
        """Name in the model -> type in the file; known once transformers has loaded it."""
        kinds = {tensor.name: str(tensor.tensor_type.name) for tensor in self.reader.tensors}
        return {name: kinds[stored] for stored, name in self.mapped.items() if stored in kinds}

    @property
    def has_tokenizer(self) -> bool:
        """Whether it holds a vocabulary."""
        return "tokenizer.ggml.tokens" in self.reader.fields

    def read_tokenizer(self, where: Mapping[str, str]) -> Any:
        """The tokenizer in the file, by the file's own rules; `where` is what `reading` gave.

        Raises:
            ValueError: transformers would replace a rule by another in silence; it is named.
            Exception: what transformers raises for a vocabulary that it cannot read.
        """
        from tokenizers import pre_tokenizers
        from transformers import AutoTokenizer
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

        if not self.has_tokenizer:
            raise ValueError("it holds no vocabulary")
        kind, rule, space, architecture = (
            self.reader.fields[key].contents() if key in self.reader.fields else None
            for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.add_space_prefix", _ARCHITECTURE)
        )
        if kind == "gpt2" and rule not in (*_GPT2, *_DIGITS_FIRST, *GGUF_PRE_TOKENIZER_SPLITS):
            raise ValueError(f"tokenizer.ggml.pre is {rule!r}, by whose rules transformers does not cut text")
        if kind == "llama" and space is False and not str(architecture).startswith("gemma"):
            raise ValueError("tokenizer.ggml.add_space_prefix is false, which transformers passes over")
        tokenizer = AutoTokenizer.from_pretrained(**where)
        if kind == "gpt2" and rule in _DIGITS_FIRST:
            digits = pre_tokenizers.Digits(individual_digits=True)
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        return tokenizer

    def field(self, key: str) -> Any:
        """A metadata value by its key without the architecture's name in front; None where the file has none."""
        found = self.reader.fields.get(f"{self.reader.fields['general.architecture'].contents()}.{key}")
        return found.contents() if found is not None else None

    @contextlib.contextmanager
    def reading(self) -> Iterator[dict[str, str]]:
        """Let transformers take this reader: it would parse the file for the config, the tokenizer and the weights.

        Yields:
            Arguments of `from_pretrained`: the file in a folder of its own, since transformers would take a tokenizer
            or an adapter that lies beside it, whosever it is.
        """
        import gguf
        from transformers import modeling_gguf_pytorch_utils as loader

        find = loader.get_gguf_hf_weights_map

        def find_and_tell(*args: Any, **kwargs: Any) -> dict[str, str]:
            found: dict[str, str] = find(*args, **kwargs)
            self.mapped |= found
            return found

        before, maps = gguf.GGUFReader, gguf.get_tensor_name_map
        gguf.GGUFReader, loader.get_gguf_hf_weights_map = lambda *args, **kwargs: self.reader, find_and_tell
        made: dict[Any, Any] = {}
        gguf.get_tensor_name_map = lambda *key: made.get(key) or made.setdefault(key, maps(*key))
        try:
            with tempfile.TemporaryDirectory() as home:
                (Path(home) / self.name).symlink_to(self.path.resolve())
                yield {"pretrained_model_name_or_path": home, "gguf_file": self.name}
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = before, maps
            loader.get_gguf_hf_weights_map = find

    @contextlib.contextmanager
    def on_disk(self, folder: Path) -> Iterator[Spill]:
        """Let transformers put what it dequantises into a file in `folder` instead of memory, one tensor at a time."""
        from types import SimpleNamespace

        import torch
        from transformers import modeling_gguf_pytorch_utils as loader

        from edgeprompt.base.mapped import Spill

        spill = Spill(folder, [int(tensor.n_elements) for tensor in self.reader.tensors])
        before = loader.torch
        loader.torch = SimpleNamespace(**{**vars(torch), "from_numpy": spill.put})
        try:
            yield spill
        finally:
            loader.torch = before

    def known(self, config: Any) -> list[str]:
        """Names of the config's values that the file tells; all others are the defaults of the config's class."""
        from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

        architecture = str(self.reader.fields[_ARCHITECTURE].contents())
        found = [
            name
            for key, name in GGUF_CONFIG_MAPPING.get(architecture, {}).items()
            if name and self.field(key) is not None
        ]
        rope = getattr(config, "rope_parameters", None) or {}
        if any(tensor.name == "rope_freqs.weight" for tensor in self.reader.tensors) or self.field("rope.scaling.type"):
            found += [f"rope_parameters.{name}" for name in ("rope_type", *rope)]
        if "rope_theta" in found:
            inner = "full_attention." if "full_attention" in rope else ""
            found.append(f"rope_parameters.{inner}rope_theta")
        return found

    def keep_fields(self, config: Any) -> None:
        """Put into a config what the file says of how the model computes and transformers passes over.

        Raises:
            SourceError: the file says something that this model's config cannot hold.
        """
        from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

        taken = {*_PLAIN, *self._keep_rotary_scaling(config), *self._keep_rotary_width(config)}
        self._keep_activation(config)
        if config.model_type == "gemma3_text":  # as llama.cpp has it: no key tells
            wide = config.num_hidden_layers == _GEMMA3_27B_LAYERS
            config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if wide else config.head_dim
            if (theta := self.field("rope.freq_base_swa")) is not None:
                config.rope_parameters["sliding_attention"]["rope_theta"] = float(theta)
            taken.add("rope.freq_base_swa")
        elif config.model_type == "phi3":
            config.sliding_window = self.field("attention.sliding_window") or None
            taken.add("attention.sliding_window")
        architecture = str(self.reader.fields[_ARCHITECTURE].contents())
        taken |= {key for key, name in GGUF_CONFIG_MAPPING.get(architecture, {}).items() if name}
        epsilons = {key: value for key in _EPSILONS if (value := self.field(key)) is not None}
        if taken & epsilons.keys() and len(set(epsilons.values())) == 1:
            taken |= _EPSILONS  # T5's files have the same under both names
        for full, entry in self.reader.fields.items():
            key = full.removeprefix(f"{architecture}.")
            if full == key or key in taken:
                continue
            value = entry.contents()
            usual = [1] if key == "attention.causal" else [0, "none"]
            if "scale" in key or "factor" in key:
                usual.append(1)
            if value not in usual:
                raise SourceError(
                    f"{self.name!r} says {key} = {value!r}, which cannot be kept for {config.model_type}; give the "
                    "safetensors model that it was made from"
                )

    def _keep_rotary_width(self, config: Any) -> tuple[str, ...]:
        """Phi's partial rotation; other models have none, and their shapes show it."""
        width, head = self.field("rope.dimension_count"), getattr(config, "head_dim", None)
        head = head or config.hidden_size // config.num_attention_heads
        if config.model_type == "phi3" and width:
            config.rope_parameters = {**config.rope_parameters, "partial_rotary_factor": width / head}
        elif width not in (None, head):
            return ()
        return ("rope.dimension_count",)

    def _keep_rotary_scaling(self, config: Any) -> tuple[str, ...]:
        """The file's scaling of rotary positions; the keys that it is told by."""
        kind = self.field("rope.scaling.type")
        factor = self.field("rope.scaling.factor") or self.field("rope.scale_linear")
        if kind is None and factor not in (None, 1):
            kind = "linear"  # what llama.cpp takes it for
        frequencies = next((tensor for tensor in self.reader.tensors if tensor.name == "rope_freqs.weight"), None)
        keys: tuple[str, ...] = ("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear")
        if kind in (None, "none") and frequencies is None:
            return keys
        if config.model_type not in _LINEAR_ROPE or kind not in (None, "none", "linear", "yarn"):
            raise SourceError(
                f"{self.name!r} scales rotary positions ({kind or 'rope_freqs'}) in a way that cannot be kept for "
                f"{config.model_type}; give the safetensors model that it was made from"
            )
        rope = {**config.rope_parameters}
        if kind == "linear":
            config.rope_parameters = {**rope, "rope_type": "linear", "factor": float(factor)}
        elif kind == "yarn":
            length = self.field("rope.scaling.original_context_length")
            rope |= {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": int(length)}
            for name in ("beta_fast", "beta_slow"):
                if (beta := self.field(f"rope.scaling.yarn_{name}")) is not None:
                    rope[name] = float(beta)
            config.rope_parameters = rope
            keys += ("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow")
        if frequencies is not None:
            self._keep_frequencies(config, frequencies.data)
        return keys

    def _keep_activation(self, config: Any) -> None:
        """Put T5's activation into a config, by the file's tensors as llama.cpp does: gated GELU, or ReLU."""
        if config.model_type in ("t5", "umt5", "mt5"):
            config.is_gated_act = any("ffn_gate" in name for name in self.names)
            config.dense_act_fn = "gelu_new" if config.is_gated_act else "relu"
            config.feed_forward_proj = "gated-gelu" if config.is_gated_act else "relu"

    def _keep_frequencies(self, config: Any, divisors: Any) -> None:
        import numpy as np
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        divisors = np.asarray(divisors, np.float32)
        if (divisors == 1).all():
            return
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        plain = config.rope_parameters["rope_theta"] ** (-np.arange(0, head, 2, dtype=np.float64) / head)
        before = config.rope_parameters
        config.rope_parameters = {**before, "rope_type": "llama3", "factor": float(divisors.max()), **_LLAMA3}
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        if len(divisors) != head // 2 or not np.allclose(scaled.numpy(), plain / divisors, rtol=1e-3):
            config.rope_parameters = before
            raise SourceError(
                f"{self.name!r} scales rotary positions by factors (rope_freqs.weight) that are not those of Llama 3; "
                "give the safetensors model that it was made from"
            )


def _joined(parts: tuple[Path, ...]) -> Any:
    reader = None
    for part in parts:
        found = _read(part)
        if reader is None:
            reader = found
            continue
        twice = {tensor.name for tensor in reader.tensors} & {tensor.name for tensor in found.tensors}
        if twice:
            raise SourceError(f"{part.name!r} holds {min(twice)!r} again, which a part before it has")
        reader.tensors.extend(found.tensors)
    assert reader is not None
    if "general.architecture" not in reader.fields:
        raise SourceError(f"{parts[0].name!r} names no general.architecture; it is not the file of a language model")
    expected = reader.fields.get("split.tensors.count")
    if expected is not None and expected.contents() != len(reader.tensors):
        raise SourceError(
            f"the parts of {parts[0].name!r} hold {len(reader.tensors)} tensors, its first part says "
            f"{expected.contents()}; download all parts again"
        )
    if not reader.tensors:
        raise SourceError(f"{parts[0].name!r} holds no tensors (a vocabulary alone); give the model's file")
    return reader


def _read(path: Path) -> Any:
    import gguf

    check_contents(path)
    with path.open("rb") as file:
        start = file.read(8)
    if start[:4] != b"GGUF":
        raise SourceError(f"{str(path)!r} is no GGUF file: it starts with {start[:4]!r}")
    version = int.from_bytes(start[4:], sys.byteorder)
    if version & 0xFFFF == 0:
        raise SourceError(
            f"{str(path)!r} is a GGUF file for machines of the other byte order; convert it with "
            "gguf-convert-endian, or download the usual one"
        )
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # a file of foreign bytes: the reader raises nearly anything
        reason = one_line(error)
        if "GGMLQuantizationType" in reason:
            raise SourceError(
                f"{str(path)!r} holds a tensor of a kind that gguf does not know ({reason}); give another "
                "quantisation of it, for example Q4_K_M, or update gguf"
            ) from error
        raise SourceError(f"{str(path)!r} is cut short or no GGUF file ({reason}); download it again") from error
    size, end = path.stat().st_size, max((t.data_offset + t.n_bytes for t in reader.tensors), default=0)
    if end > size:
        raise SourceError(f"{str(path)!r} has {size} bytes, its tensors end at {end}; download it again")
    return reader
