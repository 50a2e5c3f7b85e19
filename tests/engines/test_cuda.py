from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest

import edgeprompt
from edgeprompt import EngineOptions, Request
from edgeprompt.request import GenerationOptions
from tests.support.prompts import make_prompt

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
        reason="no CUDA here: needs an NVIDIA GPU and onnxruntime-gpu",
    ),
]


def test_cuda_answers_as_the_cpu_does(tiny_llama_package: Path) -> None:
    options = GenerationOptions(max_new_tokens=12)
    found = {}
    for provider in ("cpu", "cuda"):
        with edgeprompt.load(tiny_llama_package, options=replace(EngineOptions(), provider=provider)) as runtime:
            assert runtime.provider == provider
            words = {"x": (" good", " very good"), "y": (" bad",)}
            runtime.add_prompt(make_prompt(runtime.manifest, "rows", verbalizer=words))
            runtime.add_prompt(make_prompt(runtime.manifest, "deep", "prefix-tuning", seed=1))
            generate = [Request("the film", p, task="generate", options=options) for p in (None, "rows", "deep")]
            texts = [result.token_ids for result in runtime.run(generate)]
            found[provider] = texts, dict(runtime.classify("the film", prompt="rows").logits)
    assert found["cpu"][0] == found["cuda"][0]
    assert found["cpu"][1] == pytest.approx(found["cuda"][1], abs=1e-2)
