"""How long a package takes to the first token (a label: to the answer), with a soft prompt and with the instruction."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from edgeprompt.loading import load
from edgeprompt.prompts.file import PromptFile
from edgeprompt.request import Generation, GenerationOptions, Request

_WARMUP = 2


def measure_first_token(
    package: Path, soft: PromptFile, hard: PromptFile, texts: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """Milliseconds, medians over `texts`, both prompts in turn; the soft prompt's keys and values are resident.

    Args:
        package: what serves.
        soft: the distilled prompt.
        hard: the instruction, which every request brings along.
        texts: fields of requests; the first two are for warming up, and asked again.
    """
    names = {"prompt": "soft", "instruction": "hard"}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with load(package) as runtime:
        runtime.add_prompt(soft, name="soft")
        runtime.add_prompt(dataclasses.replace(hard, base=soft.base, tokenizer_fingerprint=None), name="hard")
        for number, fields in enumerate([*texts[:_WARMUP], *texts]):
            for key, name in names.items():
                options = GenerationOptions(max_new_tokens=1)
                request = Request(fields, name, options=options, truncate=True)
                started = time.perf_counter()
                (result,) = runtime.run([request])
                taken = time.perf_counter() - started
                if number >= _WARMUP:
                    seconds[key].append(result.timings.ttft if isinstance(result, Generation) else taken)
    found = {f"{key}_ms": round(1000 * median(values), 3) for key, values in seconds.items()}
    ratio = median(seconds["prompt"]) / median(seconds["instruction"])
    return {**found, "ratio": round(ratio, 4), "texts": len(texts)}
