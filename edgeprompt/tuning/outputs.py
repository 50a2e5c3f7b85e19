"""What a run writes besides its prompt: checked before the work, and never over somebody else's file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from edgeprompt import names
from edgeprompt.package.files import atomic_folder
from edgeprompt.package.outputs import ADAPTER, CHECKPOINT, LOG, METRICS, PROMPT, check_output
from edgeprompt.tuning.options import TuneOptions, checkpoint_path

METRICS_FILE = "metrics.jsonl"


def check_outputs(prompts: Iterable[Path], output: Path, base: object, data: object, options: TuneOptions) -> None:
    """Check every path that a run writes.

    Args:
        prompts: The prompt files.
        output: The output that the run was given; its checkpoint lies beside it.
        base: The base, as it was given.
        data: The data, as it was given.
        options: The run's options.

    Raises:
        InputError: one of them holds something that is not replaced, or is what the run reads.
    """
    sources = (base, data, options.eval_data, options.package, options.resume)
    for path in prompts:
        check_output(path, PROMPT, sources=sources)
    check_output(checkpoint_path(output), CHECKPOINT, sources=(base, data, options.eval_data, options.package))
    if options.adapter is not None:
        check_output(options.adapter, ADAPTER, force=True, sources=sources)
    if options.log is not None:
        check_output(options.log, LOG, sources=sources)
        check_output(options.log / METRICS_FILE, METRICS, sources=sources)


def save_adapter(model: Any, folder: Path) -> None:
    """Write a PEFT model as an adapter folder, marked as ours so that a later run may replace it."""
    with atomic_folder(folder, ADAPTER, force=True) as temporary:
        model.save_pretrained(str(temporary))
        (temporary / "README.md").unlink(missing_ok=True)  # a form that PEFT leaves empty
        file = temporary / "adapter_model.safetensors"
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        save_file(tensors, file, metadata={"format": "pt", names.WRITTEN_BY: "edgeprompt"})
