"""`tune` from end to end on a tiny random decoder."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edgeprompt
from edgeprompt.errors import (
    BaseMismatchError,
    DataError,
    InputError,
    PackageError,
    SourceError,
    TemplateError,
    TuningError,
    UnsupportedError,
)
from edgeprompt.package.fingerprint import parse
from edgeprompt.prompts.file import load_prompt
from edgeprompt.tuning import TuneOptions, tune
from edgeprompt.tuning.options import MAX_LENGTH, checkpoint_path
from edgeprompt.tuning.record import Recorder

WORDS = {"animal": ["cat", "dog", "cow", "horse", "sheep"], "number": ["one", "two", "three", "four", "five"]}


def toy_rows(count: int = 96) -> list[dict[str, str]]:
    chosen = random.Random(0)
    return [
        {"text": " ".join(chosen.choices(WORDS[label], k=chosen.randint(2, 6))), "label": label}
        for label in ("animal", "number")
        for _ in range(count // 2)
    ]


TOY = TuneOptions(
    template="{prompt}{text} is",
    verbalizer={"animal": (" a",), "number": (" n",)},
    num_virtual_tokens=8,
    steps=40,
    learning_rate=0.1,
    eval_split=0.25,
    seed=3,
)


def options(**changes: Any) -> TuneOptions:
    return dataclasses.replace(TOY, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "p-tuning", "learning_rate": 0.01},
        {"method": "p-tuning", "encoder": "lstm", "learning_rate": 0.01},
        {"method": "prefix-tuning"},
        {"method": "prefix-tuning", "projection": True, "learning_rate": 0.01},
        {"template": "{text} is {prompt}"},
        {"method": "prefix-tuning", "template": "{text}{prompt} is"},
        {"verbalizer": {"animal": (" a cat", " dog"), "number": (" n",)}},
    ],
    ids=["prompt", "mlp", "lstm", "prefix", "projection", "inside", "infix", "long-words"],
)
def test_learns_a_toy_task(tiny_llama_base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    result = tune(tiny_llama_base, toy_rows(), output=tmp_path / "toy.safetensors", options=options(**changes))
    print(result.value, result.steps, result.best_step, result.prompt.training["metric"])
    assert result.value is not None
    assert result.value >= 0.9


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_the_file_holds_what_peft_computes(tiny_llama_base: Path, tmp_path: Path, method: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = tmp_path / "adapter"
    changes = options(method=method, steps=10, adapter=adapter)
    result = tune(tiny_llama_base, toy_rows(), output=tmp_path / "toy.safetensors", options=changes)
    prompt = load_prompt(result.path)
    assert prompt.sha256 == result.prompt.sha256
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, str(adapter)).eval()
    assert prompt.golden is not None
    ids = AutoTokenizer.from_pretrained(tiny_llama_base)(prompt.golden.fields["text"] + " is", return_tensors="pt")
    with torch.no_grad():
        logarithms = peft(**ids).logits[0, -1].double().log_softmax(-1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_base)
    for label, (word,) in prompt.verbalizer.items():
        (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
        assert prompt.golden.logits[label] == pytest.approx(float(logarithms[token]), abs=1e-4)
    saved = peft.get_prompt_embedding_to_save("default").numpy()
    if method == "prompt-tuning":
        assert prompt.prompt_embeddings is not None
        np.testing.assert_array_equal(prompt.prompt_embeddings, saved)
    else:
        assert prompt.past_key_values is not None
        np.testing.assert_array_equal(prompt.past_key_values, saved.reshape(8, 2, 2, 2, 16).transpose(1, 2, 3, 0, 4))


def test_what_the_file_says(tiny_llama_base: Path, tmp_path: Path) -> None:
    from edgeprompt.base.load import load_base

    prompt = tune(tiny_llama_base, toy_rows(), output=tmp_path / "toy.safetensors", options=options(steps=8)).prompt
    assert prompt.name == "toy"
    assert prompt.task == "classify"
    assert prompt.labels == ("animal", "number")
    assert prompt.base.fingerprint == load_base(tiny_llama_base).fingerprint
    assert prompt.tuned_for is not None
    assert (prompt.tuned_for.precision, prompt.tuned_for.weights_hash) == ("fp32", None)
    assert str(prompt.template) == TOY.template
    training = prompt.training
    assert (training["steps"], training["seed"], training["examples"], training["eval_examples"]) == (8, 3, 72, 24)
    assert training["data"].startswith("sha256:")
    assert not checkpoint_path(tmp_path / "toy.safetensors").exists()


def test_same_seed_same_bytes(tiny_llama_base: Path, tmp_path: Path) -> None:
    made = [
        tune(tiny_llama_base, toy_rows(), output=tmp_path / f"{run}.safetensors", options=options(steps=6, name="toy"))
        for run in "ab"
    ]
    other = tune(tiny_llama_base, toy_rows(), output=tmp_path / "c.safetensors", options=options(steps=6, seed=4))
    assert made[0].path.read_bytes() == made[1].path.read_bytes()
    assert not np.array_equal(made[0].prompt.prompt_embeddings, other.prompt.prompt_embeddings)


@pytest.mark.parametrize("stop", [7, 12], ids=["between evaluations", "after an evaluation"])
def test_resuming_equals_never_stopping(
    tiny_llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    settings = options(method="p-tuning", learning_rate=0.01, steps=16, eval_steps=4, batch_size=20, name="toy")
    whole = tune(tiny_llama_base, toy_rows(), output=tmp_path / "whole.safetensors", options=settings)

    record = Recorder.step

    def interrupted(self: Recorder, step: int, figures: Any) -> None:
        record(self, step, figures)
        if step == stop:
            raise KeyboardInterrupt

    output = tmp_path / "parts.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "step", interrupted)
        with pytest.raises(TuningError, match=f"after step {stop}; go on with --resume"):
            tune(tiny_llama_base, toy_rows(), output=output, options=settings)
    assert not output.exists()
    again = dataclasses.replace(settings, resume=checkpoint_path(output))
    with pytest.raises(TuningError, match="batch_size 20, this run has 10"):
        tune(tiny_llama_base, toy_rows(), output=output, options=dataclasses.replace(again, batch_size=10))
    content = torch.load(checkpoint_path(output), weights_only=True)
    settings_then = json.loads(content["signature"])
    new = parse(settings_then["base"])
    for base, agrees in (("sha256-3:" + "0" * 64, False), (f"sha256-2:{new.signs}.{new.first}", True)):
        data = io.BytesIO()
        torch.save({**content, "signature": json.dumps({**settings_then, "base": base})}, data)
        checkpoint_path(output).write_bytes(data.getvalue())
        if not agrees:
            with pytest.raises(TuningError, match="was made with base sha256-3:0"):
                tune(tiny_llama_base, toy_rows(), output=output, options=again)
    parts = tune(tiny_llama_base, toy_rows(), output=output, options=again)  # from a fingerprint of format 2
    assert parts.path.read_bytes() == whole.path.read_bytes()


def test_starting_as_another_prompt(tiny_llama_base: Path, tiny_gpt2_base: Path, tmp_path: Path) -> None:
    first = tune(tiny_llama_base, toy_rows(), output=tmp_path / "first.safetensors", options=options())
    again = options(resume=first.path, steps=1, learning_rate=1e-9)
    second = tune(tiny_llama_base, toy_rows(), output=tmp_path / "second.safetensors", options=again)
    np.testing.assert_allclose(second.prompt.prompt_embeddings, first.prompt.prompt_embeddings, atol=1e-6)
    with pytest.raises(TuningError, match=r"needs \[4, 64\], found \[8, 64\]"):
        tune(
            tiny_llama_base,
            toy_rows(),
            output=tmp_path / "third.safetensors",
            options=options(resume=first.path, num_virtual_tokens=4),
        )
    with pytest.raises(BaseMismatchError, match=r"was made for base '.*this base is '"):
        tune(tiny_gpt2_base, toy_rows(), output=tmp_path / "third.safetensors", options=again)


def test_generation_learns_its_target_and_its_end(tiny_llama_base: Path, tmp_path: Path) -> None:
    answers = {"animal": "alive", "number": "count"}
    rows = [{"text": row["text"], "target": answers[row["label"]]} for row in toy_rows()]
    settings = options(template=None, verbalizer={}, steps=80, method="prefix-tuning", num_virtual_tokens=16)
    result = tune(tiny_llama_base, rows, output=tmp_path / "toy.safetensors", options=settings)
    assert (result.prompt.task, result.metric) == ("generate", "token_accuracy")
    assert result.value is not None
    assert result.value >= 0.9
    assert result.prompt.golden is not None
    assert result.prompt.golden.token_ids[-1] == 0  # <eos>


def test_early_stopping_keeps_the_best(tiny_llama_base: Path, tmp_path: Path) -> None:
    settings = options(steps=40, eval_steps=1, patience=2, learning_rate=5.0, log=tmp_path / "log")
    result = tune(tiny_llama_base, toy_rows(), output=tmp_path / "toy.safetensors", options=settings)
    assert result.best_step == result.steps - 2
    assert result.steps < 40
    lines = [json.loads(line) for line in (tmp_path / "log/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, result.steps + 1))
    evaluated = {line["step"]: line["eval_accuracy"] for line in lines if "eval_accuracy" in line}
    assert evaluated[result.best_step] == max(evaluated.values()) == result.value
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (events,) = (tmp_path / "log").glob("events.out.tfevents.*")
    found = [
        (event.step, value.tensor.float_val[0])
        for event in EventFileLoader(str(events)).Load()
        for value in event.summary.value
        if value.tag == "loss"
    ]
    assert found == [(line["step"], pytest.approx(line["loss"])) for line in lines if "loss" in line]


def test_half_precision_trains(tiny_llama_base: Path, tmp_path: Path) -> None:
    settings = options(mixed_precision="bf16")
    result = tune(tiny_llama_base, toy_rows(), output=tmp_path / "toy.safetensors", options=settings)
    assert result.value is not None
    assert result.value >= 0.9
    assert result.prompt.prompt_embeddings is not None
    assert result.prompt.prompt_embeddings.dtype == np.float32


def test_values_that_float16_does_not_hold_are_told(tiny_llama_base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = tmp_path / "large"
    shutil.copytree(tiny_llama_base, base)
    tensors = load_file(base / "model.safetensors")
    for name in tensors:
        if "mlp" in name:
            tensors[name] *= 2000
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out" / "toy.safetensors"
    with pytest.raises(TuningError, match="float16 ends at 65504, which this base exceeds"):
        tune(base, toy_rows(), output=out, options=options(mixed_precision="fp16", steps=2))
    assert not out.exists()


@pytest.mark.parametrize("steps", [1, 2])
def test_a_gradient_that_is_no_number_ends_the_run(
    tiny_llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """At the last step, whose prompt no loss looks at any more, too."""
    from accelerate import Accelerator

    plain, called = Accelerator.clip_grad_norm_, []

    def spoilt(self: Any, parameters: Any, *more: Any) -> Any:
        called.append(1)
        if len(called) == steps:
            for parameter in parameters:
                parameter.grad.fill_(float("nan"))
        return plain(self, parameters, *more)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", spoilt)
    out = tmp_path / "toy.safetensors"
    with pytest.raises(TuningError, match=f"the gradient is nan at step {steps}; try a lower --lr") as caught:
        tune(tiny_llama_base, toy_rows(), output=out, options=options(steps=steps, eval_split=0.0))
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_a_run_that_changed_nothing_is_no_run(
    tiny_llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where float16 is scaled, a step whose gradient overflows is left out; all of them were, without a word."""
    from accelerate import Accelerator

    plain = Accelerator.clip_grad_norm_

    def with_scaler(self: Any, *arguments: Any) -> Any:
        self.scaler = object()
        return plain(self, *arguments)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", with_scaler)
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", property(lambda self: True))
    with pytest.raises(TuningError, match="no step changed the prompt"):
        tune(tiny_llama_base, toy_rows(), output=tmp_path / "toy.safetensors", options=options(steps=1))
    assert not (tmp_path / "toy.safetensors").exists()


def test_labels_and_words_come_from_the_data(tiny_llama_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "toy.jsonl"
    data.write_text("".join(json.dumps({"body": r["text"], "kind": r["label"]}) + "\n" for r in toy_rows()))
    settings = options(verbalizer={}, template=None, text_column="body", label_column="kind", steps=2, shots=3)
    prompt = tune(tiny_llama_base, data, output=tmp_path / "toy.safetensors", options=settings).prompt
    assert prompt.verbalizer == {"animal": (" animal",), "number": (" number",)}
    assert str(prompt.template) == "{prompt}{text}\nLabel:"
    assert prompt.training["examples"] == 6


def test_a_base_that_takes_less_than_the_default_length_has_its_own(tiny_llama_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_llama_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    rows = [{**row, "text": f"{row['text']} " * 80} for row in toy_rows()]
    done = tune(base, rows, output=tmp_path / "toy.safetensors", options=options(steps=1, max_length=MAX_LENGTH))
    assert done.prompt.training["examples"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"label_column": "kind"}, DataError, "neither a column 'kind'.*it has: text, label"),
        ({"text_column": "body"}, DataError, "row 1 of 'rows' has no column 'body'; it has text, label"),
        ({"template": "{prompt}{title} {text}"}, DataError, "no column 'title'"),
        ({"verbalizer": {"animal": (" a",), "x": (" x",)}}, DataError, "label 'number' has no verbalizer word"),
        ({"verbalizer": {"animal": (" a",), "number": (" a",)}}, TemplateError, "share the label word ' a'"),
        ({"template": "{text"}, TemplateError, "stray"),
        ({"task": "generate", "verbalizer": {}}, DataError, "no column 'target'"),
        ({"task": "generate"}, InputError, "a verbalizer is for --task classify"),
        ({"max_length": 9999}, InputError, "max_length is 9999, .* takes at most 256"),
        ({"max_length": 8}, InputError, "at most 8 fit"),
        ({"package": Path("nowhere")}, PackageError, "no package folder at 'nowhere'"),
        ({"resume": Path("nowhere.checkpoint")}, TuningError, "cannot go on from 'nowhere.checkpoint'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tiny_llama_base: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        tune(
            tiny_llama_base, toy_rows(), output=tmp_path / "toy.safetensors", options=options(**{"steps": 4, **changes})
        )
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_base_of_values_that_are_no_numbers_is_refused(tiny_llama_base: Path, tmp_path: Path) -> None:
    from edgeprompt.base.load import load_base

    loaded = load_base(tiny_llama_base)
    loaded.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(SourceError, match=r"'norm.weight' has values that are NaN or infinite"):
        tune(loaded, toy_rows(), output=tmp_path / "toy.safetensors", options=TOY)
    assert not list(tmp_path.iterdir())


def test_other_bad_input(tiny_llama_base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must end in \.safetensors"):
        tune(tiny_llama_base, toy_rows(), output=tmp_path / "toy.bin")
    with pytest.raises(SourceError, match="no base model at"):
        tune(tmp_path / "nothing", toy_rows(), output=tmp_path / "toy.safetensors", options=TOY)
    with pytest.raises(DataError, match="is empty"):
        tune(tiny_llama_base, [], output=tmp_path / "toy.safetensors", options=TOY)
    with pytest.raises(DataError, match="one label only"):
        tune(tiny_llama_base, toy_rows()[:5], output=tmp_path / "toy.safetensors", options=options(verbalizer={}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lora"}, "method is 'lora', allowed: prompt-tuning"),
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"steps": 3, "epochs": 2}, "steps or epochs"),
        ({"eval_split": 1.0}, "eval_split is 1.0"),
        ({"learning_rate": 1e38}, "learning_rate is 1e.38, it must be at most 1000000"),
        ({"seed": 2**70}, "seed is 1180591620717411303424, it must be at most"),
        ({"verbalizer": {"a": ()}}, "no word for label 'a'"),
        ({"init": "magic"}, "init is 'magic', allowed: text, vocab, labels, random"),
    ],
)
def test_options_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TuneOptions(**changes)


def test_for_a_package_trains_on_its_weights(tiny_llama_base: Path, tiny_gpt2_base: Path, tmp_path: Path) -> None:
    from edgeprompt.package.folder import open_package
    from exporters import export_model

    package = export_model(tiny_llama_base, tmp_path / "package", precision="int4").path
    manifest = open_package(package).manifest
    settings = options(steps=4, package=package)
    result = tune(tiny_llama_base, toy_rows(), output=tmp_path / "int4.safetensors", options=settings)
    plain = tune(tiny_llama_base, toy_rows(), output=tmp_path / "fp32.safetensors", options=options(steps=4))
    assert result.prompt.tuned_for is not None
    assert result.prompt.tuned_for.precision == "int4"
    assert result.prompt.tuned_for.weights_hash == manifest.weights_hash
    assert result.prompt.base.fingerprint == plain.prompt.base.fingerprint == manifest.base.fingerprint
    assert not np.array_equal(result.prompt.prompt_embeddings, plain.prompt.prompt_embeddings)
    # What is left is the rounding of activations.
    assert result.checks["graph_max_difference"] < 0.1 * result.checks["logit_scale"]
    with pytest.raises(BaseMismatchError):
        tune(tiny_gpt2_base, toy_rows(), output=tmp_path / "other.safetensors", options=settings)


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_a_base_that_memory_does_not_hold_stays_in_its_files(
    method: str,
    tiny_llama_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import shutil

    from transformers import AutoModelForCausalLM

    from edgeprompt.base import memory

    folder = tmp_path / "base"
    shutil.copytree(tiny_llama_base, folder)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    wanted = options(method=method, steps=4, learning_rate=0.01)
    whole = tune(folder, toy_rows(), output=tmp_path / "whole.safetensors", options=wanted)
    monkeypatch.setattr(memory, "free_memory", lambda: 1)
    monkeypatch.setattr(memory, "to_train", lambda sizes: 0)
    read = tune(folder, toy_rows(), output=tmp_path / "read.safetensors", options=wanted)
    assert "stay in their files" in caplog.text
    key = "prompt_embeddings" if method == "prompt-tuning" else "past_key_values"
    want, got = (np.asarray(getattr(found.prompt, key), np.float64) for found in (whole, read))
    # Adam turns the sign of a gradient that is nearly zero into a whole step: single values may differ.
    assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"template": "{text}{prompt}"}, "in one place inside it, with fixed text at the end"),
        ({"template": "{text}{prompt}{label}"}, "in one place inside it, with fixed text at the end"),
        ({"template": "{text}{prompt:2} is{prompt} a"}, "in one place inside it"),
        ({"adapter": Path("adapter")}, "PEFT has no adapter with keys and values inside the text"),
    ],
)
def test_an_infix_that_cannot_be_is_refused(
    tiny_llama_base: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    fields = {"template": "{text}{prompt} is", "method": "prefix-tuning"} | changes
    if "adapter" in fields:
        fields["adapter"] = tmp_path / "adapter"
    with pytest.raises((InputError, UnsupportedError), match=says):
        tune(tiny_llama_base, toy_rows(), output=tmp_path / "toy.safetensors", options=options(**fields))
    assert not any(tmp_path.glob("*.safetensors"))


def test_an_infix_is_served_as_it_was_trained(tiny_llama_base: Path, tiny_llama_package: Path, tmp_path: Path) -> None:
    asked = options(method="prefix-tuning", template="{text}{prompt} is")
    result = tune(tiny_llama_base, toy_rows(), output=tmp_path / "toy.safetensors", options=asked)
    prompt = load_prompt(result.path)
    assert prompt.is_infix
    assert prompt.golden is not None
    with edgeprompt.load(tiny_llama_package) as runtime:
        runtime.add_prompt(result.path)
        found = runtime.classify(prompt.golden.fields["text"], prompt="toy")
        assert found.label == prompt.golden.label
        for label, logit in prompt.golden.logits.items():
            assert found.logits[label] == pytest.approx(logit, abs=1e-3)
        answers = [runtime.classify(row["text"], prompt="toy").label == row["label"] for row in toy_rows()]
    assert np.mean(answers) >= 0.9


def test_a_prefix_is_no_start_for_an_infix(tiny_llama_base: Path, tmp_path: Path) -> None:
    asked = options(method="prefix-tuning", steps=2)
    front = tune(tiny_llama_base, toy_rows(), output=tmp_path / "front.safetensors", options=asked)
    inside = dataclasses.replace(asked, template="{text}{prompt} is", resume=front.path)
    with pytest.raises(TuningError, match="stand in front of the text, and --template puts them elsewhere"):
        tune(tiny_llama_base, toy_rows(), output=tmp_path / "inside.safetensors", options=inside)
