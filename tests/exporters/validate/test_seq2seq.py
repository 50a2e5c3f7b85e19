"""Packages of encoder-decoders against PyTorch and PEFT: logits of every step, greedy tokens and beams.

`EDGEPROMPT_WRITE_DOCS=1 pytest tests/exporters/validate/test_seq2seq.py` writes the table in docs/.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeprompt
from edgeprompt import EngineOptions, GenerationOptions, Request
from edgeprompt.engines.seq2seq.graphs import Seq2SeqGraphs, SourceRow
from edgeprompt.errors import UnsupportedError
from edgeprompt.ort.session import Sessions
from edgeprompt.package.folder import open_package
from tests.support.prompts import make_prompt
from tests.support.seq2seq_models import CONFIGS, METHODS, peft_model

TABLE = Path(__file__).parents[3] / "docs/parity-encoder-decoders.md"
OPTIONS = EngineOptions(provider="cpu", threads=1, spinning=False)
TEXTS = ("the film was never boring, and the actors are good", "a story")
NEW_TOKENS = 8
TASK = 1

Cell = Callable[[str, str], str]


@pytest.fixture(scope="session")
def cell(
    seq2seq_base: Callable[[str], Path],
    seq2seq_package: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Cell:
    """What the table says of a family and a method, found out once: "exact", or why not."""

    def find(family: str, method: str) -> str:
        from exporters import convert_prompt

        base, folder = seq2seq_base(family), tmp_path_factory.mktemp("parity")
        adapted = peft_model(base, method)
        adapted.save_pretrained(folder / "adapter")
        index = TASK if method == "MULTITASK_PROMPT_TUNING" else None
        try:
            convert_prompt(
                folder / "adapter", folder / "prompt.safetensors", base=base, task_index=index, name="parity"
            )
        except UnsupportedError as error:
            return f"not supported: {str(error).partition(';')[0]}"
        compare(adapted, seq2seq_package(family), folder / "prompt.safetensors", index)
        return "exact"

    return cache(find)


def compare(adapted: Any, package: Path, prompt: Path, task: int | None) -> None:
    import torch

    with edgeprompt.load(package, prompts=[prompt], options=OPTIONS) as runtime:
        opened = open_package(package)
        graphs = Seq2SeqGraphs(opened, Sessions(opened, OPTIONS))
        for text in TEXTS:
            ids = runtime._package.tokenizer.encode(text)
            inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
            if task is not None:
                inputs["task_ids"] = torch.tensor([task])
            with torch.no_grad():
                greedy = adapted.generate(
                    **inputs,
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
                beams = adapted.generate(**inputs, max_new_tokens=NEW_TOKENS, num_beams=3, do_sample=False)
            wanted = torch.stack(greedy.logits, dim=1)[0].numpy()
            found = steps(graphs, runtime, ids, greedy.sequences[0].tolist())
            assert np.abs(found - wanted).max() <= 1e-3 * np.abs(wanted).max()
            for options, sequence in (({}, greedy.sequences), ({"num_beams": 3}, beams)):
                answer = runtime.generate(text, prompt="parity", max_new_tokens=NEW_TOKENS, **options)
                assert list(answer.token_ids) == clean(sequence[0].tolist(), runtime.manifest.tokens)


def steps(graphs: Seq2SeqGraphs, runtime: Any, ids: list[int], sequence: list[int]) -> Any:
    """The package's logits behind each token of a sequence."""
    prompt = runtime.prompt("parity")
    vocab, table = runtime.manifest.geometry.vocab_size, prompt.prompt_embeddings
    if table is not None:
        ids = [*range(vocab, vocab + len(table)), *ids]
    source = graphs.encode([SourceRow(np.array(ids), table)])
    state = graphs.begin(source, [prompt.past_key_values])
    return np.concatenate([graphs.step(state, [token]) for token in sequence[:-1]])


def clean(sequence: list[int], tokens: Any) -> list[int]:
    """A generated sequence without the start token, the end token and what follows it."""
    sequence = sequence[1:]
    ends = [at for at, token in enumerate(sequence) if token in tokens.eos]
    return sequence[: ends[0]] if ends else sequence


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CONFIGS)
def test_package_equals_peft(cell: Cell, family: str, method: str) -> None:
    drops_scale = family in ("Pegasus", "Marian") and method != "PREFIX_TUNING"
    expected = "not supported: PEFT hands" if drops_scale else "exact"
    assert cell(family, method).startswith(expected)


def test_the_committed_table_is_what_was_found(cell: Cell) -> None:
    lines = [
        "# Encoder-decoders: which prompts compute what PEFT computes",
        "",
        "Written by `tests/exporters/validate/test_seq2seq.py`, on small random models. *exact*: the fp32 package's",
        "logits at every step are within 1e-3 of their scale of PyTorch + PEFT, and greedy and beam-search tokens are",
        "equal.",
        "",
        "| family | " + " | ".join(METHODS) + " |",
        "| --- |" + " --- |" * len(METHODS),
        *(f"| {family} | " + " | ".join(cell(family, method) for method in METHODS) + " |" for family in CONFIGS),
        "",
        "P-Tuning v2 (deep prompts in the encoder) is not in PEFT. OpenPrompt's prefix for T5 has a part in the",
        "encoder. It is served for T5, v1.1 and mT5 (`encoder_past_key_values` in the prompt file). The other",
        "families have absolute positions, and nobody trains encoder prefixes for them. They are not supported, and",
        "an error says so.",
        "",
    ]
    text = "\n".join(lines)
    if os.environ.get("EDGEPROMPT_WRITE_DOCS"):
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(text, encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == text


def test_results_of_a_mixed_batch_are_those_of_each_row_alone(
    seq2seq_package: Callable[[str], Path],
) -> None:
    with edgeprompt.load(seq2seq_package("T5 v1.1, FLAN"), options=OPTIONS) as runtime:
        words = {"negative": (" bad", " very bad"), "positive": (" good",)}
        for index, (method, fields) in enumerate(
            [
                ("prompt-tuning", {}),
                ("prefix-tuning", {}),
                ("prefix-tuning", {"verbalizer": words}),
                ("prompt-tuning", {"verbalizer": words}),
            ]
        ):
            prompt = make_prompt(runtime.manifest, f"p{index}", method, seed=index, count=3 + index, **fields)
            runtime.add_prompt(prompt)
        requests = [
            Request(text, prompt, options=GenerationOptions(max_new_tokens=6, num_beams=beams))
            for text in (*TEXTS, "the music is long and never ends, the story is short")
            for prompt, beams in (("p0", 1), ("p1", 3), ("p2", 1), ("p3", 1), (None, 2))
        ]
        together = runtime.run(requests)
        for request, found in zip(requests, together, strict=True):
            (alone,) = runtime.run([request])
            if hasattr(alone, "token_ids"):
                assert found.token_ids == alone.token_ids
            else:
                assert found.label == alone.label
                for label, value in alone.logits.items():
                    assert found.logits[label] == pytest.approx(value, abs=1e-4)
