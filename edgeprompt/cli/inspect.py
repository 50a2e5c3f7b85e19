"""`edgeprompt inspect`: what a package, a prompt file or an adapter is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeprompt import names
from edgeprompt.cli import console

if TYPE_CHECKING:
    from edgeprompt.package.manifest import Base


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(path: Path, as_json: bool) -> None:
    """Show what PATH is, its base and its sizes.

    PATH is a package folder, a prompt file (.safetensors) or an ONNX Runtime adapter (.onnx_adapter), here or on the
    Hugging Face Hub (user/repo[@revision][/file]).
    """
    from edgeprompt.package.fingerprint import brief

    console.need_stdout()
    facts = describe(path)
    if as_json:
        click.echo(console.as_json(facts))
        return
    width = max(map(len, facts)) + 2
    for key, value in facts.items():
        click.echo(f"{key:<{width}}{_text(brief(value) if key == 'fingerprint' else value)}")


def describe(path: Path) -> dict[str, Any]:
    """The facts about a path, in the order in which a person wants them.

    Raises:
        PackageError: a folder that is no package.
        PromptFileError: a file that is no prompt.
        InputError: another kind of file, or none that can be read.
    """
    from edgeprompt.errors import InputError
    from edgeprompt.package import hub
    from edgeprompt.package.files import check_regular
    from edgeprompt.package.folder import open_package
    from edgeprompt.prompts.file import MAX_FILE_BYTES

    there = hub.parse(path)
    if there is not None:
        is_file = (there.file or "").endswith((".safetensors", ".onnx_adapter"))
        path = hub.fetch_file(there, what="prompt file") if is_file else open_package(path).path
    if not path.exists():
        raise InputError(f"nothing is at {str(path)!r}; give a package folder, a .safetensors or an .onnx_adapter file")
    if path.is_dir():
        return _package(path)
    try:
        check_regular(path, MAX_FILE_BYTES)
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    if path.suffix == ".safetensors":
        return _prompt(path)
    if path.suffix == ".onnx_adapter":
        return _adapter(path)
    raise InputError(f"cannot inspect {str(path)!r}; known: package folders, .safetensors and .onnx_adapter files")


def _package(path: Path) -> dict[str, Any]:
    from edgeprompt.package.folder import open_package

    package = open_package(path)
    manifest = package.manifest
    size = manifest.geometry
    facts: dict[str, Any] = {
        "kind": "package",
        "base": manifest.base.name,
        "fingerprint": manifest.base.fingerprint,
        **_weaker(manifest.base),
        "architecture": f"{manifest.architecture} ({manifest.model_type})",
        "precision": manifest.precision,
        **({"block_size": manifest.extra["block_size"]} if "block_size" in manifest.extra else {}),
        "route": manifest.route,
        "prompt_input": manifest.prompt_input,
        "layers": size.num_layers,
        "hidden_size": size.hidden_size,
        "heads": f"{size.num_attention_heads} ({size.num_key_value_heads} key/value) of size {size.head_size}",
        "vocab_size": size.vocab_size,
        "max_positions": size.max_positions or None,
        "kv_dtype": manifest.kv_dtype,
        "graphs": {key: graph.file for key, graph in manifest.graphs.items()},
        "prompts": list(manifest.prompts),
        "size_bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "weights_hash": manifest.weights_hash,
        "validation": dict(manifest.validation),
        "made_with": dict(manifest.versions),
    }
    return facts


def _weaker(base: Base) -> dict[str, Any]:
    """The config's values that a fingerprint holds, or a line for one of an older format."""
    from edgeprompt.package.fingerprint import OPTIONAL, parse

    if reason := base.weaker(base):
        return {"fingerprint_note": reason}
    facts = {name: value for name, value in (parse(base.fingerprint).facts or {}).items() if name not in OPTIONAL}
    return {"base_config": facts} if facts else {}


def _prompt(path: Path) -> dict[str, Any]:
    from edgeprompt.prompts.file import load_prompt

    prompt = load_prompt(path)
    tuned = [f"{one.precision} {one.weights_hash or '(full precision)'}" for one in prompt.tuned_weights]
    return {
        "kind": "prompt file",
        "name": prompt.name,
        "task": prompt.task,
        "method": prompt.method,
        "base": prompt.base.name,
        "fingerprint": prompt.base.fingerprint,
        **_weaker(prompt.base),
        "tuned_for": ", ".join(tuned) or None,
        "num_virtual_tokens": prompt.num_virtual_tokens,
        "template": str(prompt.template),
        "verbalizer": {label: list(words) for label, words in prompt.verbalizer.items()},
        "labels": list(prompt.labels),
        "tensors": {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in prompt.tensors().items()},
        "generation": dict(prompt.generation),
        "training": dict(prompt.training),
        "golden": dict(prompt.golden.fields) if prompt.golden else None,
        **({"distilled_from": dict(prompt.distilled_from)} if prompt.distilled_from else {}),
        "size_bytes": path.stat().st_size,
    }


def _adapter(path: Path) -> dict[str, Any]:
    from edgeprompt.errors import InputError
    from edgeprompt.ort.session import import_onnxruntime

    onnxruntime = import_onnxruntime()
    try:
        adapter = onnxruntime.AdapterFormat.read_adapter(str(path))
        tensors = {name: value.numpy() for name, value in adapter.get_parameters().items()}
    except Exception as error:  # onnxruntime raises its own kinds, which share no public parent
        raise InputError(f"cannot read adapter {str(path)!r}: {' '.join(str(error).split())}") from error
    rows = tensors.get(names.PROMPT_EMBEDDINGS)
    return {
        "kind": "ONNX Runtime adapter",
        "num_virtual_tokens": int(rows.shape[0]) if rows is not None else None,
        "tensors": {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()},
        "adapter_version": adapter.get_adapter_version(),
        "model_version": adapter.get_model_version(),
        "size_bytes": path.stat().st_size,
    }


def _text(value: Any) -> str:
    """A fact as people read it."""
    if value is None or value in ({}, []):
        return "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{_text(key)}={_text(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return console.printable(str(value))
