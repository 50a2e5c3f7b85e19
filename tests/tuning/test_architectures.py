"""Tuning encoders and encoder-decoders: the numbers of PEFT and transformers, and prompts that the runtime serves."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edgeprompt
from edgeprompt.base.geometry import geometry_of
from edgeprompt.base.load import load_base
from edgeprompt.errors import DataError, InputError, TemplateError, UnsupportedError
from edgeprompt.tuning import TuneOptions, tune
from edgeprompt.tuning.encoder import EncoderPrompt
from edgeprompt.tuning.seq2seq import Seq2SeqPrompt
from edgeprompt.tuning.soft_prompt import SoftPrompt
from exporters import export_model

WORDS = {"animal": ["cat", "dog", "cow", "horse", "sheep"], "number": ["one", "two", "three", "four", "five"]}
COUNT = 4
VIRTUAL = list(range(512, 512 + COUNT))
ROWS = [[3, 77, 200, 9], [5, 6, 7, 8, 400, 401, 402], [11, 12]]


def toy_rows(count: int = 64) -> list[dict[str, str]]:
    chosen = random.Random(0)
    return [
        {"text": " ".join(chosen.choices(WORDS[label], k=chosen.randint(2, 6))), "label": label}
        for label in ("animal", "number")
        for _ in range(count // 2)
    ]


@pytest.fixture(scope="module")
def tiny_bert(save_tiny: Callable[..., Path]) -> Path:
    """A random masked BERT."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    return save_tiny(
        BertForMaskedLM(
            BertConfig(
                vocab_size=512,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=128,
                initializer_range=0.1,
            )
        )
    )


@pytest.fixture(scope="module")
def tiny_t5(save_tiny: Callable[..., Path]) -> Path:
    """A random T5 whose heads together are wider than its hidden states."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=512,
        d_model=64,
        d_kv=32,
        d_ff=128,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=4,
        decoder_start_token_id=1,
        eos_token_id=0,
        pad_token_id=1,
        initializer_factor=2.0,
    )
    return save_tiny(T5ForConditionalGeneration(config))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """fp32 packages, exported once each."""
    made: dict[Path, Path] = {}

    def export(base: Path) -> Path:
        if base not in made:
            made[base] = export_model(base, tmp_path_factory.mktemp("package") / "out", precision="fp32").path
        return made[base]

    return export


def soft_prompt(loaded: Any, task_type: str, **options: Any) -> SoftPrompt:
    torch.manual_seed(1)
    return SoftPrompt(geometry_of(loaded.config), TuneOptions(num_virtual_tokens=COUNT, **options), task_type=task_type)


@pytest.mark.parametrize("method", ["prompt-tuning", "p-tuning", "p-tuning-v2"])
def test_encoder_states_equal_peft(tiny_bert: Path, method: str) -> None:
    loaded = load_base(tiny_bert)
    soft = soft_prompt(loaded, "FEATURE_EXTRACTION", method=method)
    model = EncoderPrompt(loaded, geometry_of(loaded.config), soft)
    rows = ROWS if soft.is_prefix else [[*VIRTUAL, *row] for row in ROWS]
    states, real = model.states(rows)
    assert real.sum(1).tolist() == [len(row) for row in ROWS]
    peft = soft.as_peft(loaded.model.base_model).eval()
    for index, row in enumerate(ROWS):
        ids = torch.tensor([row])
        expected = peft(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        found = states[index, : len(rows[index])]
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_encoder_decoder_logits_equal_transformers_row_by_row(tiny_t5: Path, method: str) -> None:
    from transformers import DynamicCache, EncoderDecoderCache

    loaded = load_base(tiny_t5)
    soft = soft_prompt(loaded, "SEQ_2_SEQ_LM", method=method)
    model = Seq2SeqPrompt(loaded.model, soft, vocab_size=512, start=[1])
    rows = ROWS if soft.is_prefix else [[*VIRTUAL, *row] for row in ROWS]
    answers: list[list[list[int]]] = [[[], [7, 8]], [[9]], [[]]]
    found = model.logits(rows, answers).split([1 + 3, 2, 1])
    for index, row in enumerate(ROWS):
        for part, answer in zip(found[index].split([len(a) + 1 for a in answers[index]]), answers[index], strict=True):
            embedded = loaded.model.get_input_embeddings()(torch.tensor(row))
            cache = None
            if soft.is_prefix:
                layers = [(layer[0][None], layer[1][None]) for layer in soft()]
                cache = EncoderDecoderCache(DynamicCache(layers), DynamicCache())
            else:
                embedded = torch.cat([soft(), embedded])
            expected = loaded.model(
                inputs_embeds=embedded[None], decoder_input_ids=torch.tensor([[1, *answer]]), past_key_values=cache
            ).logits[0]
            torch.testing.assert_close(part, expected, rtol=0, atol=1e-4 * float(expected.detach().abs().max()))


BASIC = TuneOptions(num_virtual_tokens=8, steps=40, learning_rate=0.05, eval_split=0.25, seed=3, max_length=64)


def serve(package: Path, result: Any, rows: list[dict[str, Any]]) -> list[Any]:
    """Answers of the runtime, after the golden example has come out as in training."""
    golden = result.prompt.golden
    with edgeprompt.load(package) as runtime:
        runtime.add_prompt(result.path)
        name = result.prompt.name
        if result.prompt.task == "classify":
            (answer,) = runtime.classify([dict(golden.fields)], prompt=name)
            assert answer.logits == pytest.approx(golden.logits, abs=2e-3)
            if result.prompt.labels:
                assert answer.label == golden.label
        requests = [
            edgeprompt.Request({slot: row[slot] for slot in result.prompt.template.slots}, name) for row in rows
        ]
        return runtime.run(requests)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "p-tuning-v2"},
        {"method": "p-tuning-v2", "projection": True, "learning_rate": 0.01},
        {"method": "head"},
    ],
    ids=["shallow", "deep", "deep-projected", "head"],
)
def test_encoder_classification_is_served_as_trained(
    tiny_bert: Path, tmp_path: Path, packages: Callable[[Path], Path], changes: dict[str, Any]
) -> None:
    options = dataclasses.replace(BASIC, **changes)
    result = tune(tiny_bert, toy_rows(), output=tmp_path / "toy.safetensors", options=options)
    assert result.value is not None
    assert result.value >= 0.85
    answers = serve(packages(tiny_bert), result, toy_rows())
    right = [answer.label == row["label"] for answer, row in zip(answers, toy_rows(), strict=True)]
    assert np.mean(right) >= 0.85


def losses(log: Path) -> list[float]:
    """Training losses of a run, step by step."""
    lines = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_cloze_words_are_served_as_trained(tiny_bert: Path, tmp_path: Path, packages: Callable[[Path], Path]) -> None:
    options = dataclasses.replace(
        BASIC,
        method="p-tuning-v2",
        template="{prompt}{text} is {mask}",
        verbalizer={"animal": ("a",), "number": ("n",)},
        log=tmp_path / "log",
    )
    result = tune(tiny_bert, toy_rows(), output=tmp_path / "toy.safetensors", options=options)
    found = losses(tmp_path / "log")
    # A random base learns little of it; what counts is that it learns, and that the runtime agrees.
    assert np.mean(found[-5:]) < np.mean(found[:3])
    assert len(serve(packages(tiny_bert), result, toy_rows())) == 64


def test_several_labels_and_numbers(tiny_bert: Path, tmp_path: Path, packages: Callable[[Path], Path]) -> None:
    rows = [{"text": f"{a['text']} {b['text']}", "label": sorted({a["label"], b["label"]})}
            for a, b in zip(toy_rows(), toy_rows()[::-1][3:] + toy_rows()[:3], strict=True)]  # fmt: skip
    options = dataclasses.replace(BASIC, method="p-tuning-v2", steps=60)
    result = tune(tiny_bert, rows, output=tmp_path / "many.safetensors", options=options)
    assert result.metric == "exact_match"
    answers = serve(packages(tiny_bert), result, rows)
    assert np.mean([sorted(a.labels) == row["label"] for a, row in zip(answers, rows, strict=True)]) >= 0.85

    numbers = [{"text": row["text"], "label": 3.5 if row["label"] == "animal" else -1} for row in toy_rows()]
    options = dataclasses.replace(options, problem_type="regression")
    result = tune(tiny_bert, numbers, output=tmp_path / "number.safetensors", options=options)
    answers = serve(packages(tiny_bert), result, numbers)
    errors = [abs(float(a.label) - row["label"]) for a, row in zip(answers, numbers, strict=True)]
    assert np.mean(errors) < 0.7


def test_tags_belong_to_words(tiny_bert: Path, tmp_path: Path, packages: Callable[[Path], Path]) -> None:
    kinds = {word: label for label, words in WORDS.items() for word in words}
    chosen = random.Random(1)
    rows = []
    for _ in range(64):
        words = chosen.choices(list(kinds), k=chosen.randint(2, 7))
        rows.append({"tokens": words, "tags": ["O" if kinds[w] == "number" else "B-animal" for w in words]})
    options = dataclasses.replace(BASIC, method="p-tuning-v2", steps=60)
    result = tune(tiny_bert, rows, output=tmp_path / "tags.safetensors", options=options)
    assert (result.prompt.task, result.metric) == ("tag", "word_accuracy")
    texts = [{"text": " ".join(row["tokens"])} for row in rows]
    answers = serve(packages(tiny_bert), result, texts)
    pairs = [
        (word.label, tag) for answer, row in zip(answers, rows, strict=True)
        for word, tag in zip(answer.words, row["tags"], strict=True)
    ]  # fmt: skip
    assert np.mean([found == tag for found, tag in pairs]) >= 0.85
    assert result.value is not None
    assert result.value >= 0.8


def test_answers_are_found_in_the_context(tiny_bert: Path, tmp_path: Path, packages: Callable[[Path], Path]) -> None:
    chosen = random.Random(2)
    rows = []
    for _ in range(96):
        words = chosen.sample(WORDS["number"], 3)
        animal = chosen.choice(WORDS["animal"])
        words.insert(chosen.randint(0, 3), animal)
        context = " ".join(words)
        answers = {"text": [animal], "answer_start": [context.index(animal)]}
        rows.append({"question": "which animal", "context": context, "answers": answers})
    options = dataclasses.replace(BASIC, method="head", learning_rate=0.3, steps=120)
    result = tune(tiny_bert, rows, output=tmp_path / "qa.safetensors", options=options)
    assert result.prompt.task == "qa"
    answers = serve(packages(tiny_bert), result, rows)
    # This tokenizer's tokens cover the space in front of a word.
    right = [answer.text.strip() == row["answers"]["text"][0] for answer, row in zip(answers, rows, strict=True)]
    assert np.mean(right) >= 0.7  # one of four words by chance
    with edgeprompt.load(packages(tiny_bert)) as runtime:
        checked = runtime.check(runtime.add_prompt(result.prompt))
    assert checked.passed
    assert checked.found in rows[0]["context"]


@pytest.mark.parametrize(
    "changes", [{"learning_rate": 0.3}, {"method": "prefix-tuning"}], ids=["embeddings", "decoder-prefix"]
)
def test_encoder_decoder_classification_is_served_as_trained(
    tiny_t5: Path, tmp_path: Path, packages: Callable[[Path], Path], changes: dict[str, Any]
) -> None:
    options = dataclasses.replace(BASIC, verbalizer={"animal": (" an", " cow"), "number": (" n",)}, **changes)
    result = tune(tiny_t5, toy_rows(), output=tmp_path / "toy.safetensors", options=options)
    assert result.value is not None
    answers = serve(packages(tiny_t5), result, toy_rows())
    right = np.mean([answer.label == row["label"] for answer, row in zip(answers, toy_rows(), strict=True)])
    assert right >= 0.8


def test_encoder_decoder_generation_is_served_as_trained(
    tiny_t5: Path, tmp_path: Path, packages: Callable[[Path], Path]
) -> None:
    rows = [{"text": row["text"], "target": "a dog" if row["label"] == "animal" else "n"} for row in toy_rows()]
    options = dataclasses.replace(BASIC, method="prefix-tuning", learning_rate=0.1, steps=60, log=tmp_path / "log")
    result = tune(tiny_t5, rows, output=tmp_path / "toy.safetensors", options=options)
    golden = result.prompt.golden
    assert golden is not None
    answers = serve(packages(tiny_t5), result, [dict(golden.fields)])
    assert list(answers[0].token_ids)[: len(golden.token_ids) - 1] == list(golden.token_ids)[:-1]
    found = losses(tmp_path / "log")
    assert np.mean(found[-5:]) < 0.8 * np.mean(found[:3])


def test_what_does_not_go_together(tiny_bert: Path, tiny_t5: Path, tiny_llama_base: Path, tmp_path: Path) -> None:
    out, rows = tmp_path / "a.safetensors", toy_rows()
    words = {"animal": ("a",), "number": ("n",)}
    cases: list[tuple[Path, list[dict[str, Any]], dict[str, Any], type[Exception], str]] = [
        (tiny_bert, [{"text": "a", "target": "b"}], {}, UnsupportedError, "does not generate"),
        (tiny_llama_base, [{"tokens": ["a"], "tags": ["O"]}], {}, UnsupportedError, "needs an encoder-only base"),
        (tiny_llama_base, rows, {"method": "head"}, InputError, "this task has none"),
        (tiny_bert, rows, {"verbalizer": words}, InputError, r"need a \{mask\} in the template"),
        (
            tiny_bert,
            rows,
            {"template": "{text} {mask}", "verbalizer": {"animal": ("a long word",), "number": ("n",)}},
            TemplateError,
            "a mask stands for one",
        ),
        (tiny_t5, [{"text": "a", "label": 1.5}], {"problem_type": "regression"}, UnsupportedError, "needs a head"),
        (tiny_bert, [{"tokens": ["a", "b"], "tags": ["O"]}], {}, DataError, "2 tokens and 1 tags"),
        (
            tiny_bert,
            [{"question": "q", "context": "c", "answer": "x"}],
            {},
            DataError,
            "'x' does not stand in the context",
        ),
        (tiny_bert, rows, {"adapter": tmp_path / "peft"}, UnsupportedError, "head of its own is no PEFT adapter"),
    ]
    for base, data, changes, error, message in cases:
        with pytest.raises(error, match=message):
            tune(base, data, output=out, options=dataclasses.replace(BASIC, **changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("base", ["T5", "BERT"])
def test_keys_and_values_inside_the_text_are_for_decoders(
    base: str, seq2seq_base: Callable[[str], Path], tiny_bert: Path, tmp_path: Path
) -> None:
    asked = dataclasses.replace(BASIC, method="prefix-tuning", template="{text}{prompt} is")
    folder = seq2seq_base("T5") if base == "T5" else tiny_bert
    with pytest.raises(InputError, match="On a decoder they can stand"):
        tune(folder, toy_rows(), output=tmp_path / "x.safetensors", options=asked)
