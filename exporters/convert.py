"""Somebody's prompt to a prompt file, and a prompt file to other tools."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeprompt.errors import BaseMismatchError, InputError, SourceError
from edgeprompt.package import hub
from edgeprompt.package.manifest import Base
from edgeprompt.package.outputs import ADAPTER, KV, ONNX_ADAPTER, PROMPT, PROMPT_SET, TABLE, Kind, check_output
from edgeprompt.prompts.file import METADATA_KEY, PromptFile, load_prompt, save_prompt
from edgeprompt.prompts.template import Template, VirtualTokens
from exporters import writers
from exporters.importers import read_foreign
from exporters.importers.base_facts import read_base_facts
from exporters.importers.foreign import BaseFacts, ForeignPrompt, NeedsBaseError, ReadOptions
from exporters.importers.servable import check_servable
from exporters.kv import write_kv

TARGETS = ("auto", "prompt", "onnx-adapter", "npy", "peft", "trtllm", "kv")
_BY_ENDING = {".safetensors": "prompt", ".onnx_adapter": "onnx-adapter", ".npy": "npy"}
_NO_BASE = Base("unknown", "unknown")


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion found, wrote and left out."""

    source_format: str
    target: str
    prompts: tuple[str, ...]
    outputs: tuple[Path, ...]
    found: tuple[str, ...]
    dropped: tuple[str, ...]
    """Each with the reason."""
    notes: tuple[str, ...] = ()


PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""Files of a PEFT adapter on the Hub: the first, and one of the others."""


def _local(source: str | os.PathLike[str]) -> Path:
    """Where a source lies; one on the Hugging Face Hub (a PEFT adapter, or a file) is downloaded.

    Raises:
        HubError: it cannot be had from the Hub.
    """
    wanted = hub.parse(source)
    if wanted is None:
        return Path(source)
    if wanted.file is not None and Path(wanted.file).suffix:
        return hub.fetch_file(wanted, what="prompt")
    inside = "" if wanted.file is None else f"{wanted.file}/"

    def weights(config: Path) -> Iterator[tuple[str, bool]]:
        yield f"{inside}{PEFT_FILES[1]}", False
        if not (config.parent / PEFT_FILES[1]).exists():
            yield f"{inside}{PEFT_FILES[2]}", True

    return hub.fetch(wanted, f"{inside}{PEFT_FILES[0]}", weights, what="prompt").folder / inside


def convert_prompt(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    source_format: str = "auto",
    target: str = "auto",
    base: str | os.PathLike[str] | BaseFacts | None = None,
    template: str | None = None,
    verbalizer: Mapping[str, Sequence[str]] | None = None,
    labels: Sequence[str] = (),
    task_index: str | int | None = None,
    name: str | None = None,
    kv_dtype: str = "float32",
    force: bool = False,
) -> ConversionReport:
    """Read a prompt of any known format, check it, and write it in another.

    Args:
        source: A file or folder of another tool, or a prompt file; several for a TensorRT-LLM table.
        output: `.safetensors`: prompt file; `.onnx_adapter`: adapter of stock ONNX Runtime; `.npy`: bare tensor; a
            folder: one prompt file per task, or a PEFT adapter with `target="peft"`.
        source_format: One of `exporters.importers.FORMATS`, or "auto".
        target: One of `TARGETS`; "auto" goes by the ending of `output`.
        base: The base model that the prompt was trained on, or its package; needed for prompt files.
        template: Where virtual tokens and text stand; default: the prompt in front of the text.
        verbalizer: Label -> label words, for prompts that answer with a word.
        labels: Names of the classes, in order, for prompts with a head or a verbalizer of their own.
        task_index: Which prompt of a file that holds several: its name or its index.
        name: The prompt's name; default: from the source.
        kv_dtype: For `target="kv"`: "float32", or "float16" (half the file, and rounded).
        force: Replace an adapter that edgeprompt wrote, an empty folder, or a table (.npy) or ONNX Runtime adapter,
            whoever wrote it.

    Raises:
        SourceError: the source is missing, broken, hostile or of no known format.
        UnsupportedError: it holds more than a soft prompt can express.
        BaseMismatchError: it does not fit the base.
        InputError: options contradict each other or the source, or the output may not be replaced.
    """
    kind = _target(Path(output), target)
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    check_output(output, _output_kind(kind, Path(output)), force=force, sources=(base, *sources))
    if kv_dtype != "float32" and kind != "kv":
        raise InputError(f"kv_dtype {kv_dtype!r} is for keys and values (--to kv); leave it out")
    options = ReadOptions(template, tuple(labels), bool(verbalizer))
    if base is not None and not isinstance(base, BaseFacts):
        _check_sources([_local(one) for one in sources], source_format, options)
    facts = base if isinstance(base, BaseFacts) or base is None else read_base_facts(base)
    prompts: list[PromptFile] = []
    found: list[str] = []
    dropped: list[str] = []
    notes: list[str] = []
    source_formats: list[str] = []
    for path in map(_local, sources):
        if _is_prompt_file(path):
            if source_format != "auto" or task_index is not None:
                wrong = f"--from {source_format}" if source_format != "auto" else "--task-index"
                raise InputError(
                    f"{str(path)!r} is a prompt file, which holds one prompt of edgeprompt; leave out {wrong}"
                )
            prompts.append(_reread(load_prompt(path), facts, template, verbalizer, labels))
            source_formats.append("edgeprompt")
            continue
        read_as, foreign = read_foreign(path, source_format, facts, options)
        source_formats.append(read_as)
        for item in _select(foreign, task_index):
            prompts.append(_assemble(item, facts, template, verbalizer, labels, needs_base=kind == "prompt"))
            found += item.found
            dropped += item.dropped
            notes += (*item.notes, *_base_note(item, facts))
    if name is not None:
        prompts = [dataclasses.replace(prompt, name=name) for prompt in prompts]
    for prompt in prompts:
        prompt.to_bytes()  # every check of the format, whatever the target
        if facts and kind == "prompt":
            check_servable(prompt, facts)
    package = Path(base) if isinstance(base, (str, os.PathLike)) else None
    outputs = _write(prompts, Path(output), kind, facts, package, force, (base, *sources), kv_dtype)
    return ConversionReport(
        ", ".join(dict.fromkeys(source_formats)),
        kind,
        tuple(prompt.name for prompt in prompts),
        outputs,
        tuple(dict.fromkeys(found)),
        tuple(dict.fromkeys(dropped)),
        tuple(dict.fromkeys(notes)),
    )


def _target(output: Path, target: str) -> str:
    if target not in TARGETS:
        raise InputError(f"target {target!r} is not one of {', '.join(TARGETS)}")
    by_ending = _BY_ENDING.get(output.suffix)
    if target == "auto":
        if by_ending is None and output.suffix:
            raise InputError(
                f"output {str(output)!r} must end in {', '.join(_BY_ENDING)}, or be a folder (one prompt file per "
                "task, or --to peft)"
            )
        return by_ending or "prompt"
    allowed = {"prompt": ("prompt", None), "peft": (None,), "trtllm": ("npy",), "kv": ("prompt",)}.get(
        target, (target,)
    )
    if by_ending not in allowed:
        raise InputError(f"output {str(output)!r} does not fit --to {target}")
    return target


def _output_kind(target: str, output: Path) -> Kind:
    if target == "prompt":
        return PROMPT if output.suffix else PROMPT_SET
    return {"peft": ADAPTER, "onnx-adapter": ONNX_ADAPTER, "kv": KV}.get(target, TABLE)


def _check_sources(sources: Sequence[Path], source_format: str, options: ReadOptions) -> None:
    """Say what is wrong with a source before its base is loaded, which takes seconds."""
    for path in sources:
        if _is_prompt_file(path):
            load_prompt(path)
            continue
        with contextlib.suppress(NeedsBaseError):
            read_foreign(path, source_format, None, dataclasses.replace(options, template=None))


def _is_prompt_file(path: Path) -> bool:
    """A .safetensors file with our metadata; a broken one goes on to the importers, which say what is wrong."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, framework="numpy") as opened:
            return METADATA_KEY in (opened.metadata() or {})
    except (OSError, ValueError, SafetensorError):
        return False


def _select(prompts: list[ForeignPrompt], task: str | int | None) -> list[ForeignPrompt]:
    if task is None:
        return prompts
    chosen = [prompt for prompt in prompts if prompt.name == task]
    if not chosen and str(task).isdigit() and int(task) < len(prompts):
        chosen = [prompts[int(task)]]
    if not chosen:
        known = ", ".join(prompt.name for prompt in prompts[:20])
        raise InputError(f"no task {task!r} in this file; it holds {len(prompts)}, indices from 0: {known}")
    return chosen


def _base_note(prompt: ForeignPrompt, facts: BaseFacts | None) -> list[str]:
    theirs = prompt.base_name
    if facts is None or not theirs or Path(theirs).name == Path(facts.base.name).name:
        return []
    return [f"the file was made for {theirs!r}; the prompt file names {facts.base.name!r}, as --base says"]


def _assemble(
    item: ForeignPrompt,
    facts: BaseFacts | None,
    template: str | None,
    verbalizer: Mapping[str, Sequence[str]] | None,
    labels: Sequence[str],
    *,
    needs_base: bool,
) -> PromptFile:
    if facts is None and needs_base:
        says = f" (the file names {item.base_name!r})" if item.base_name else ""
        raise SourceError(f"a prompt file names its base: give --base, the model or its exported package{says}")
    words = {label: tuple(given) for label, given in (verbalizer or item.verbalizer).items()}
    several = any(len(texts) > 1 for texts in words.values())
    prompt = PromptFile(
        name=item.name,
        method=item.method,
        task="classify" if words and item.task == "generate" else item.task,
        base=facts.base if facts else _NO_BASE,
        template=_template(item, template),
        prompt_embeddings=item.prompt_embeddings,
        past_key_values=item.past_key_values,
        encoder_past_key_values=item.encoder_past_key_values,
        head=item.head,
        head_spec=item.head_spec,
        verbalizer=words,
        verbalizer_aggregation=item.verbalizer_aggregation if several else "sum",
        labels=_labels(item, words, labels),
        tokenizer_fingerprint=facts.tokenizer_fingerprint if facts else None,
        add_special_tokens=item.add_special_tokens,
        generation=dict(item.generation),
        training={"source": dict(item.source)},
    )
    if facts:
        prompt.check_geometry(facts)
    return prompt


def _template(item: ForeignPrompt, written: str | None) -> Template:
    deep = item.prompt_embeddings is None
    if item.template is not None:
        template = item.template
    else:
        slots = "{question}{context}" if item.task == "qa" else "{text}"
        template = Template.parse(written if written is not None else slots if deep else f"{{prompt}}{slots}")
    if deep:
        return template.without_prompt()
    if not any(isinstance(part, VirtualTokens) for part in template.parts):
        raise InputError(f"template {str(template)!r} has no {{prompt}}; write where the virtual tokens stand")
    return template


def _labels(item: ForeignPrompt, words: Mapping[str, Sequence[str]], labels: Sequence[str]) -> tuple[str, ...]:
    if item.head_spec is None or item.task == "qa":
        if labels and not words:
            raise InputError(f"--label given for prompt {item.name!r}, which has no head; give --verbalizer label=word")
        if labels and tuple(labels) != tuple(words):
            raise InputError(f"--label {', '.join(labels)} differs from the verbalizer's labels {', '.join(words)}")
        return tuple(words)
    last = [step.name for step in item.head_spec.steps if step.operation == "linear"][-1]
    classes = item.head[f"{last}.weight"].shape[0]
    if labels and len(labels) != classes:
        raise InputError(f"{len(labels)} labels given, the head of {item.name!r} has {classes} classes")
    return tuple(labels) or tuple(f"LABEL_{index}" for index in range(classes))


def _reread(
    prompt: PromptFile,
    facts: BaseFacts | None,
    template: str | None,
    verbalizer: Mapping[str, Sequence[str]] | None,
    labels: Sequence[str],
) -> PromptFile:
    """An edgeprompt prompt file as source: options replace what it holds; its base is never changed."""
    if facts and not facts.base.matches(prompt.base):
        raise BaseMismatchError(
            f"prompt {prompt.name!r} was made for base {prompt.base.name!r} ({prompt.base.brief}), "
            f"--base is {facts.base.name!r} ({facts.base.brief}){prompt.base.apart(facts.base)}"
        )
    if template is not None:
        prompt = dataclasses.replace(prompt, template=Template.parse(template))
    if verbalizer:
        prompt = dataclasses.replace(prompt, verbalizer={label: tuple(words) for label, words in verbalizer.items()})
    if labels:
        prompt = dataclasses.replace(prompt, labels=tuple(labels))
    return prompt


def _write(
    prompts: list[PromptFile],
    output: Path,
    kind: str,
    facts: BaseFacts | None,
    package: Path | None,
    force: bool,
    sources: Sequence[object],
    kv_dtype: str,
) -> tuple[Path, ...]:
    if kind == "trtllm":
        writers.write_table(prompts, output, force=force)
        return (output,)
    if kind == "prompt" and not output.suffix:
        return _write_folder(prompts, output, sources)
    if len(prompts) != 1:
        raise InputError(
            f"the source holds {len(prompts)} prompts ({', '.join(p.name for p in prompts[:10])}): choose one with "
            "--task-index, or give a folder as output"
        )
    (prompt,) = prompts
    if kind == "prompt":
        save_prompt(prompt, output)
    elif kind == "onnx-adapter":
        writers.write_onnx_adapter(prompt, output, force=force)
    elif kind == "npy":
        writers.write_npy(prompt, output, force=force)
    elif kind == "kv":
        write_kv(prompt, output, package, dtype=kv_dtype)
    else:
        writers.write_peft(prompt, output, facts, force=force)
    return (output,)


def _write_folder(prompts: list[PromptFile], folder: Path, sources: Sequence[object]) -> tuple[Path, ...]:
    paths = [folder / f"{_file_name(prompt.name)}.safetensors" for prompt in prompts]
    if len(set(paths)) != len(paths):
        raise InputError("two prompts of the source have the same file name; convert them one by one with --task-index")
    for path in paths:
        check_output(path, PROMPT, sources=sources)  # all of them, before the first is written
    for prompt, path in zip(prompts, paths, strict=True):
        save_prompt(prompt, path)
    return tuple(paths)


def _file_name(name: str) -> str:
    """A name that stays inside the folder, whatever a foreign file calls its tasks."""
    safe = re.sub(r"[^\w.-]", "_", name).lstrip(".")[:100]
    if not safe:
        raise InputError(f"prompt name {name!r} cannot be a file name; give --name")
    return safe
