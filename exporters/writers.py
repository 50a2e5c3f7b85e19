"""Prompt files to other tools: PEFT folders, ONNX Runtime adapters, bare tables."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprompt import names
from edgeprompt.errors import InputError, SourceError, UnsupportedError
from edgeprompt.package.files import atomic_file, atomic_folder, write_atomic
from edgeprompt.package.outputs import ADAPTER, ONNX_ADAPTER, TABLE
from edgeprompt.prompts.file import HeadStep, PromptFile
from exporters.heads import sequence_head
from exporters.importers.foreign import BaseFacts

_HEAD_TASKS = {"classify": "SEQ_CLS", "tag": "TOKEN_CLS", "qa": "QUESTION_ANS"}
_TASK_TYPES = {
    names.DECODER_ONLY: "CAUSAL_LM",
    names.ENCODER_DECODER: "SEQ_2_SEQ_LM",
    names.ENCODER_ONLY: "FEATURE_EXTRACTION",
}


def write_npy(prompt: PromptFile, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write the bare tensor: embeddings [tokens, hidden] or past_key_values [layers, 2, heads, tokens, size]."""
    _save_npy(_only_tensor(prompt), path, force)


def write_table(prompts: Sequence[PromptFile], path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write a TensorRT-LLM prompt table: float32 [tasks, most tokens, hidden_size], zero padded.

    Raises:
        UnsupportedError: a prompt is a prefix.
        InputError: prompts of different hidden sizes or bases.
    """
    tables = []
    for prompt in prompts:
        if prompt.prompt_embeddings is None:
            raise UnsupportedError(f"prompt {prompt.name!r} has no embeddings, and a prompt table holds nothing else")
        tables.append(prompt.prompt_embeddings)
    one = bool(prompts) and all(prompt.base.matches(prompts[0].base) for prompt in prompts)
    if not one or len({table.shape[1] for table in tables}) != 1:
        raise InputError("the prompts of one table must be made for one base")
    full = np.zeros((len(tables), max(map(len, tables)), tables[0].shape[1]), np.float32)
    for row, table in enumerate(tables):
        full[row, : len(table)] = table
    _save_npy(full, path, force)


def write_onnx_adapter(prompt: PromptFile, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write an adapter of stock ONNX Runtime whose parameters are the graph's inputs.

    Embeddings become `prompt_embeddings`; a prefix becomes `past_key_values.{i}.key` and `.value`, for a batch of one.
    ONNX Runtime never checks `model_version`; it holds the first 28 bits of the base fingerprint, for tools.
    """
    import onnxruntime as ort

    _only_tensor(prompt)
    inputs: dict[str, npt.NDArray[np.float32]] = {}
    if prompt.prompt_embeddings is not None:
        inputs[names.PROMPT_EMBEDDINGS] = prompt.prompt_embeddings.astype(np.float32)
    elif prompt.past_key_values is not None:
        for layer, pair in enumerate(prompt.past_key_values.astype(np.float32)):
            for part, tensor in zip(("key", "value"), pair, strict=True):
                inputs[names.past(layer, part)] = np.ascontiguousarray(tensor[None])
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    digest = prompt.base.fingerprint.rpartition(":")[2][:7]
    adapter.set_model_version(int(digest, 16) if all(c in "0123456789abcdef" for c in digest) else 0)
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in inputs.items()})
    with atomic_file(path, ONNX_ADAPTER, force=force) as temporary:
        try:
            adapter.export_adapter(str(temporary))
        except RuntimeError as error:
            raise InputError(f"ONNX Runtime cannot write {str(path)!r}; is the disk full?") from error


def write_peft(
    prompt: PromptFile, folder: str | os.PathLike[str], base: BaseFacts | None = None, *, force: bool = False
) -> None:
    """Write a PEFT adapter folder that `PeftModel.from_pretrained` loads.

    Embedding prompts become PROMPT_TUNING, whatever trained them: a P-tuning or multitask prompt is stored projected
    and composed, and computes the same. Prefixes become PREFIX_TUNING.

    Args:
        prompt: What to write.
        folder: Where.
        base: The base's facts; None takes what the prompt's source says.
        force: Replace an older adapter of ours.

    Raises:
        UnsupportedError: PEFT has no such prompt, or transformers no such head.
        SourceError: the base is needed, and not known.
    """
    from safetensors.numpy import save_file

    task_type = _task_type(prompt, base)
    config: dict[str, Any] = {
        "base_model_name_or_path": prompt.base.name,
        "inference_mode": True,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": prompt.num_virtual_tokens,
        "task_type": task_type,
    }
    if prompt.head:
        config["modules_to_save"] = sorted({name.split(".")[0] for name in prompt.head})
    tensors: dict[str, Any] = {f"base_model.{name}": tensor for name, tensor in prompt.head.items()}
    if prompt.prompt_embeddings is not None:
        config |= {"peft_type": "PROMPT_TUNING", "token_dim": prompt.prompt_embeddings.shape[1]}
        tensors[names.PROMPT_EMBEDDINGS] = prompt.prompt_embeddings
    else:
        prefix = _peft_prefix(prompt, seq2seq=task_type == "SEQ_2_SEQ_LM")
        layers, _, heads, tokens, size = prefix.shape
        config |= {
            "peft_type": "PREFIX_TUNING",
            "num_layers": layers,
            "num_attention_heads": heads,
            "token_dim": heads * size,
            "num_transformer_submodules": 2 if task_type == "SEQ_2_SEQ_LM" else 1,
        }
        tensors[names.PROMPT_EMBEDDINGS] = np.ascontiguousarray(prefix.transpose(3, 0, 1, 2, 4)).reshape(tokens, -1)
    with atomic_folder(folder, ADAPTER, force=force) as temporary:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (temporary / "adapter_config.json").write_text(text, encoding="utf-8")
        ordered = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
        metadata = {"format": "pt", names.WRITTEN_BY: "edgeprompt"}
        save_file(ordered, temporary / "adapter_model.safetensors", metadata=metadata)


def _task_type(prompt: PromptFile, base: BaseFacts | None) -> str:
    source = prompt.training.get("source")
    source = source if isinstance(source, dict) else {}
    said = source.get("task_type")
    if prompt.head_spec is not None:
        if prompt.task == "classify" and source.get("format") != "peft":
            _check_head(prompt, base)
        return _HEAD_TASKS[prompt.task]
    if base:
        return _TASK_TYPES[base.architecture]
    if isinstance(said, str) and said in _TASK_TYPES.values():
        return said
    raise SourceError(
        f"a PEFT adapter names its task type, which goes by the base's architecture: give --base for {prompt.name!r}"
    )


def _check_head(prompt: PromptFile, base: BaseFacts | None) -> None:
    """Refuse a head that transformers does not give this family: PEFT could not load it, or would compute another."""
    assert prompt.head_spec is not None
    if base is None:
        raise SourceError(f"whether PEFT loads the head of {prompt.name!r} goes by the base's family: give --base")
    if base.architecture == names.DECODER_ONLY:
        source, steps = "last", [HeadStep("linear", "score")]
    else:
        source, steps = sequence_head(base.model_type, base.config)
    if (prompt.head_spec.input, list(prompt.head_spec.steps)) != (source, steps):
        theirs, ours = (
            ", ".join(step.name or step.operation for step in some) for some in (steps, prompt.head_spec.steps)
        )
        raise UnsupportedError(
            f"the head of {prompt.name!r} reads {prompt.head_spec.input!r} through {ours}; in transformers, that of "
            f"{base.model_type} reads {source!r} through {theirs}, and PEFT loads no other"
        )


def _peft_prefix(prompt: PromptFile, seq2seq: bool) -> npt.NDArray[Any]:
    """The prefix with layers in PEFT's slots (see the importer: decoder layer i reads slot 2i modulo layers)."""
    prefix = prompt.past_key_values
    if prefix is None or prompt.encoder_past_key_values is not None or prompt.is_infix:
        what = "keys and values inside its text" if prompt.is_infix else "a prefix in the encoder"
        what = "no prompt at all, a head alone" if prefix is None else what
        raise UnsupportedError(f"prompt {prompt.name!r} has {what}, which PEFT cannot load")
    if not seq2seq:
        return prefix
    layers = len(prefix)
    slots = np.zeros_like(prefix)
    for layer in range(layers):
        slots[2 * layer % layers] = prefix[layer]
    if not all(np.array_equal(slots[2 * layer % layers], prefix[layer]) for layer in range(layers)):
        raise UnsupportedError(
            f"prompt {prompt.name!r} has a prefix of its own in each of {layers} decoder layers; PEFT gives layers "
            f"i and i + {layers // 2} the same one"
        )
    return slots


def _only_tensor(prompt: PromptFile) -> npt.NDArray[Any]:
    tensor = prompt.prompt_embeddings if prompt.prompt_embeddings is not None else prompt.past_key_values
    if prompt.is_infix:
        raise UnsupportedError(
            f"prompt {prompt.name!r} has keys and values inside its text ({prompt.template}); others put them in front "
            "of it, so keep it as a prompt file"
        )
    if tensor is None or prompt.encoder_past_key_values is not None:
        raise UnsupportedError(f"prompt {prompt.name!r} is not one tensor; keep it as a prompt file")
    return tensor


def _save_npy(array: npt.NDArray[Any], path: str | os.PathLike[str], force: bool) -> None:
    # Through memory: into a file numpy drops the end without a word where the disk is full.
    data = io.BytesIO()
    np.save(data, np.ascontiguousarray(array), allow_pickle=False)
    write_atomic(path, data.getvalue(), TABLE, force=force)
