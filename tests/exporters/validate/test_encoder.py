"""Packages of encoders against PyTorch and PEFT: the scores of every task with every method.

`EDGEPROMPT_WRITE_DOCS=1 pytest tests/exporters/validate/test_encoder.py` writes the table in docs/.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeprompt
from edgeprompt import EngineOptions, PromptFile, Request
from edgeprompt.engines.encoder.batch import make_row
from edgeprompt.heads.answers import token_logits
from edgeprompt.prompts.template import Template
from tests.support.encoder_models import CONFIGS

TABLE = Path(__file__).parents[3] / "docs/parity-encoders.md"
OPTIONS = EngineOptions(provider="cpu", threads=1, spinning=False)
TEXTS = ("the film was never boring, and the actors are good", "a story")
COUNT = 5
PEFT_METHODS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING")
METHODS = (*PEFT_METHODS, "P-Tuning v2")
TASKS = {
    "classify": ("SEQ_CLS", "SequenceClassification"),
    "tag": ("TOKEN_CLS", "TokenClassification"),
    "qa": ("QUESTION_ANS", "QuestionAnswering"),
    "embed": ("FEATURE_EXTRACTION", ""),
}
TASK_INDEX = 1

Cell = Callable[[str, str, str], str]


@pytest.fixture(scope="session")
def cell(encoder_base: Callable[[str], Path], encoder_package: Callable[..., Path]) -> Cell:
    """What the table says of a family, task and method, found out once."""

    @cache
    def runtime(family: str) -> edgeprompt.Runtime:
        return edgeprompt.load(encoder_package(family), options=OPTIONS)

    def find(family: str, task: str, method: str) -> str:
        model = task_model(encoder_base(family), task)
        if method == "P-Tuning v2":
            compare_deep(runtime(family), encoder_base(family), task, model)
            return "exact"
        try:
            adapted = peft_model(model, TASKS[task][0], method)
            if method == "PREFIX_TUNING" and not takes_cache(model):
                raise ValueError("for feature extraction PEFT hands over a prefix that such a model ignores")
            wanted = [peft_scores(adapted, runtime(family), text, method) for text in TEXTS]
        except (ValueError, TypeError, RuntimeError, AttributeError):
            return "not in PEFT"
        prompt = prompt_of(adapted, runtime(family), task, method)
        runtime(family).add_prompt(prompt, name="parity")
        for text, want in zip(TEXTS, wanted, strict=True):
            got = scores(runtime(family), text, task)
            close(got, want if task == "classify" else want[len(want) - len(got) :])
        return "exact"

    return cache(find)


def task_model(base: Path, task: str) -> Any:
    import torch
    import transformers

    torch.manual_seed(1)
    auto = getattr(transformers, f"AutoModel{'For' if TASKS[task][1] else ''}{TASKS[task][1]}")
    settings = {"num_labels": 2 if task == "qa" else 3} if task != "embed" else {}
    return auto.from_pretrained(base, **settings).eval()


def peft_model(model: Any, task_type: str, method: str) -> Any:
    """An adapter of random numbers, with a head as PEFT trains it."""
    import peft
    import torch

    kinds = {
        "PROMPT_TUNING": peft.PromptTuningConfig,
        "P_TUNING": peft.PromptEncoderConfig,
        "PREFIX_TUNING": peft.PrefixTuningConfig,
        "MULTITASK_PROMPT_TUNING": peft.MultitaskPromptTuningConfig,
    }
    extra: dict[str, Any] = {"num_tasks": 3, "num_ranks": 2} if method.startswith("MULTITASK") else {}
    if model.config.model_type == "distilbert":
        extra |= {"token_dim": 64, "num_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(2)
    adapted = peft.get_peft_model(model, kinds[method](task_type=task_type, num_virtual_tokens=COUNT, **extra)).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "prompt_encoder" in name:
                weight.normal_(0, 0.5)
            elif weight.requires_grad:
                weight.normal_(0, 0.3)
    return adapted


def takes_cache(model: Any) -> bool:
    return "past_key_values" in inspect.signature(model.base_model.forward).parameters


def peft_scores(adapted: Any, runtime: edgeprompt.Runtime, text: str, method: str) -> Any:
    import torch

    ids = runtime._package.tokenizer.encode(text)
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if method.startswith("MULTITASK"):
        inputs["task_ids"] = torch.tensor([TASK_INDEX])
    with torch.no_grad():
        return plain_scores(adapted(**inputs))


def plain_scores(output: Any) -> Any:
    if "start_logits" in output:
        return np.stack([output.start_logits[0].numpy(), output.end_logits[0].numpy()], -1)
    return (output.logits if "logits" in output else output.last_hidden_state)[0].numpy()


def prompt_of(adapted: Any, runtime: edgeprompt.Runtime, task: str, method: str) -> PromptFile:
    import torch

    rows = adapted.get_prompt_embedding_to_save("default").detach()
    if method.startswith("MULTITASK"):
        with torch.no_grad():
            rows = adapted.get_prompt(1, task_ids=torch.tensor([TASK_INDEX]))[0]
    table = rows.float().numpy()
    size = runtime.manifest.geometry
    deep = method == "PREFIX_TUNING"
    if deep:
        shape = (COUNT, size.num_layers, 2, size.num_key_value_heads, size.head_size)
        table = np.ascontiguousarray(table.reshape(shape).transpose(1, 2, 3, 0, 4))
    return prompt_file(runtime, adapted, task, method, table, deep)


def prompt_file(runtime: edgeprompt.Runtime, model: Any, task: str, method: str, table: Any, deep: bool) -> PromptFile:
    from exporters.heads import head_from_model

    head, tensors = (None, {}) if task == "embed" else head_from_model(model)
    return PromptFile(
        name="parity",
        method=method.lower().replace("_", "-").replace(" ", "-"),
        task=task,
        base=runtime.manifest.base,
        template=Template.parse("{text}" if deep else "{prompt}{text}"),
        prompt_embeddings=None if deep else table,
        past_key_values=table if deep else None,
        head=tensors,
        head_spec=head,
    )


def scores(runtime: edgeprompt.Runtime, text: str, task: str) -> Any:
    """The package's scores: of the text, or of every token of it."""
    if task == "classify":
        return np.array(list(runtime.classify(text, prompt="parity").logits.values()))
    engine: Any = runtime._engine
    prompt = runtime._prompts.find("parity")
    job = engine.prepare(Request(text, "parity"), prompt, None)
    row = job.row()
    states = engine._graph.run([row], job.outputs)[0]["last_hidden_state"]
    return (states if task == "embed" else token_logits(prompt.file, states, prompt.rows))[row.text]


def close(got: Any, want: Any) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 1e-3 * np.abs(want).max()


def compare_deep(runtime: edgeprompt.Runtime, base: Path, task: str, model: Any) -> None:
    """Deep prompts, for all families: against PyTorch with the prefix concatenated to keys and values."""
    from edgeprompt.base.load import load_base
    from exporters.validate.encoder import reference

    size = runtime.manifest.geometry
    rng = np.random.default_rng(3)
    shape = (size.num_layers, 2, size.num_key_value_heads, COUNT, size.head_size)
    prompt = prompt_file(runtime, model, task, "P-Tuning v2", rng.normal(0, 1, shape).astype(np.float32), True)
    runtime.add_prompt(prompt, name="parity")
    loaded = load_base(base)
    for text in TEXTS:
        ids = runtime._package.tokenizer.encode(text)
        states = reference(loaded, make_row(ids, size.vocab_size, prefix=prompt.past_key_values), runtime.manifest)
        want = head_on(model, states["last_hidden_state"], states.get("pooler_output"), task)
        close(scores(runtime, text, task), want)


def head_on(model: Any, states: Any, pooled: Any, task: str) -> Any:
    """transformers' own task model, with its base replaced by these states."""
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    if task == "embed":
        return states
    fixed = BaseModelOutputWithPooling(
        last_hidden_state=torch.from_numpy(states)[None],
        pooler_output=None if pooled is None else torch.from_numpy(pooled)[None],
    )

    class Fixed(torch.nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return fixed

    setattr(model, model.base_model_prefix, Fixed())
    with torch.no_grad():
        ids = torch.zeros(1, len(states), dtype=torch.long)
        return plain_scores(model(input_ids=ids, attention_mask=torch.ones_like(ids)))


NARROW = ("ELECTRA, small", "ALBERT")
"""Families with embeddings narrower than hidden states, for which PEFT makes rows of the wrong width."""
NO_CACHE = ("ALBERT", "MPNet", "DeBERTa-v2, v3", "ModernBERT", "DistilBERT")
"""Families without past_key_values."""


def expected(family: str, task: str, method: str) -> str:
    if method == "PREFIX_TUNING":
        return "not in PEFT" if family in NO_CACHE else "exact"
    no_task_ids = method == "MULTITASK_PROMPT_TUNING" and task in ("qa", "embed")
    return "not in PEFT" if method in PEFT_METHODS and (family in NARROW or no_task_ids) else "exact"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", CONFIGS)
def test_package_equals_peft(cell: Cell, family: str, task: str) -> None:
    for method in METHODS:
        assert cell(family, task, method) == expected(family, task, method), method


def test_the_committed_table_is_what_was_found(cell: Cell) -> None:
    lines = [
        "# Encoders: which prompts compute what PEFT computes",
        "",
        "Written by `tests/exporters/validate/test_encoder.py`, on small random models.",
        "",
        "- *exact*: the scores of the fp32 package (of the text, or of every token) are within 1e-3 of their scale",
        "  of the scores of PyTorch + PEFT. P-Tuning v2 (deep prompts without PEFT) is compared with transformers,",
        "  with the prefix concatenated to every layer's keys and values.",
        "- *not in PEFT*: PEFT raises an error, or ignores the prefix. Deep prompts work there as P-Tuning v2, and",
        "  embedding prompts that were trained without PEFT are served.",
        "",
        "| family | task | " + " | ".join(METHODS) + " |",
        "| --- | --- |" + " --- |" * len(METHODS),
        *(
            f"| {family} | {TASKS[task][0]} | " + " | ".join(cell(family, task, method) for method in METHODS) + " |"
            for family in CONFIGS
            for task in TASKS
        ),
        "",
    ]
    text = "\n".join(lines)
    if os.environ.get("EDGEPROMPT_WRITE_DOCS"):
        TABLE.write_text(text, encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == text
