"""Several tasks trained together: a prompt file for each, composed as PEFT composes them."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

import edgeprompt
from edgeprompt.errors import DataError, InputError
from edgeprompt.tuning import TuneOptions, tune, tune_tasks

WORDS = {"animal": ["cat", "dog", "cow", "horse"], "number": ["one", "two", "three", "four"]}


def rows_of_two_tasks() -> list[dict[str, str]]:
    """The same texts: one task names their kind, the other whether they are long."""
    chosen, rows = random.Random(0), []
    for _ in range(40):
        for label, words in WORDS.items():
            count = chosen.choice([2, 7])
            text = " ".join(chosen.choices(words, k=count))
            rows.append({"text": text, "label": label, "task": "kind"})
            rows.append({"text": text, "label": "long" if count > 4 else "short", "task": "length"})
    return rows


OPTIONS = TuneOptions(
    num_virtual_tokens=8,
    steps=60,
    learning_rate=0.1,
    seed=3,
    verbalizer={"animal": (" a",), "number": (" n",), "long": (" l",), "short": (" s",)},
)


def test_every_task_gets_its_prompt(tiny_llama_base: Path, tiny_llama_package: Path, tmp_path: Path) -> None:
    rows = rows_of_two_tasks()
    results = tune_tasks(
        tiny_llama_base, rows, output=tmp_path / "two.safetensors", task_column="task", options=OPTIONS
    )
    assert [result.path.name for result in results.values()] == ["two.kind.safetensors", "two.length.safetensors"]
    kind, length = (result.prompt for result in results.values())
    assert kind.verbalizer.keys() == {"animal", "number"}
    assert length.verbalizer.keys() == {"long", "short"}
    assert not np.array_equal(kind.prompt_embeddings, length.prompt_embeddings)
    with edgeprompt.load(tiny_llama_package) as runtime:
        for result in results.values():
            runtime.add_prompt(result.path)
        answers = runtime.run([edgeprompt.Request(row["text"], row["task"]) for row in rows])
    right = [answer.label == row["label"] for answer, row in zip(answers, rows, strict=True)]
    assert np.mean(right) >= 0.8
    assert answers[0].label in ("animal", "number")


def test_what_tasks_refuse(tiny_llama_base: Path, tmp_path: Path) -> None:
    out, rows = tmp_path / "two.safetensors", rows_of_two_tasks()
    with pytest.raises(DataError, match="no column 'kind'"):
        tune_tasks(tiny_llama_base, rows, output=out, task_column="kind", options=OPTIONS)
    with pytest.raises(DataError, match="names one task only"):
        tune_tasks(tiny_llama_base, rows[:1], output=out, task_column="task", options=OPTIONS)
    with pytest.raises(DataError, match="task 'a/b' cannot name a file"):
        tune_tasks(tiny_llama_base, [{**rows[0], "task": "a/b"}], output=out, task_column="task", options=OPTIONS)
    with pytest.raises(InputError, match="needs tasks"):
        tune(tiny_llama_base, rows, output=out, options=TuneOptions(method="multitask-prompt-tuning"))
    assert not list(tmp_path.iterdir())
