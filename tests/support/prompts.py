"""Random prompts for tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import PromptFile
from edgeprompt.prompts.template import Template


def make_prompt(
    manifest: Manifest,
    name: str,
    method: str = "prompt-tuning",
    *,
    seed: int = 0,
    count: int = 4,
    template: Template | None = None,
    **fields: Any,
) -> PromptFile:
    """A random prompt of `count` virtual tokens for a package."""
    rng, size = np.random.default_rng(seed), manifest.geometry
    rows = rng.normal(0, 0.3, (count, size.embedding_size or size.hidden_size)).astype(np.float32)
    shape = (size.num_layers, 2, size.num_key_value_heads, count, size.head_size)
    deep = method in ("prefix-tuning", "p-tuning-v2")
    return PromptFile(
        name=name,
        method=method,
        task=fields.pop("task", "classify" if fields.get("verbalizer") else "generate"),
        base=manifest.base,
        template=template or Template.parse("{prompt}{text}\nA:" if fields.get("verbalizer") else "{prompt}{text}"),
        prompt_embeddings=None if deep else rows,
        past_key_values=rng.normal(0, 1, shape).astype(np.float32) if deep else None,
        **fields,
    )


def make_infix(manifest: Manifest, name: str, template: str, **fields: Any) -> PromptFile:
    """A random prompt with keys and values inside the text, where the template says."""
    return make_prompt(manifest, name, "prefix-tuning", template=Template.parse(template), is_infix=True, **fields)
