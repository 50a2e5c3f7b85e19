"""The prompts that are shipped for MiniLM, on its int8 package."""

from pathlib import Path

import edgeprompt
from edgeprompt import EngineOptions, Request

PROMPTS = Path(__file__).resolve().parents[2] / "examples" / "prompts"


def test_minilm_serves_both_tasks_from_one_graph(minilm_int8_package, snippets):
    with edgeprompt.load(minilm_int8_package, options=EngineOptions(provider="cpu", threads=1)) as runtime:
        tasks = [runtime.add_prompt(PROMPTS / f"minilm-{name}.safetensors") for name in ("sentiment", "source")]
        assert all(runtime.check(task).passed for task in tasks)
        found = runtime.run([Request(text, task) for text, _ in snippets for task in tasks])
    sentiments, sources = found[::2], found[1::2]
    right = sum(answer.label == label for answer, (_, label) in zip(sentiments, snippets, strict=True))
    movies = sum(answer.label == "movie" for answer in sources)
    held_out = 0.8325  # of 400 snippets, as the file says; these 120 may differ by four standard errors
    assert right / len(snippets) > held_out - 4 * 0.034
    assert movies / len(snippets) > 0.8
