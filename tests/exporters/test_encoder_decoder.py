from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeprompt
from edgeprompt import EngineOptions
from edgeprompt.base.load import load_base
from edgeprompt.errors import BaseMismatchError, PackageError, UnsupportedError, ValidationError
from edgeprompt.package.folder import open_package
from edgeprompt.package.manifest import Manifest
from edgeprompt.prompts.file import save_prompt
from exporters import convert_prompt, export_model, validate_package
from exporters.package import hash_graphs
from tests.support.prompts import make_prompt

OPTIONS = EngineOptions(provider="cpu", threads=1, spinning=False)
FAMILY = "mT5"


@pytest.mark.parametrize(("precision", "correlation"), [("fp16", 0.9999), ("int8", 0.999), ("int4", 0.95)])
def test_precisions_follow_the_base(seq2seq_package: Callable[..., Path], precision: str, correlation: float) -> None:
    manifest = open_package(seq2seq_package(FAMILY, precision)).manifest
    assert manifest.precision == precision
    assert manifest.validation["least_correlation"] >= correlation
    quantised = {key: len(records) for key, records in manifest.extra["weights"].items()}
    assert all(quantised.values()) == (precision != "fp16")


def test_geometry_where_heads_do_not_fill_the_hidden_size(seq2seq_package: Callable[..., Path]) -> None:
    manifest = open_package(seq2seq_package("T5 v1.1, FLAN")).manifest
    size = manifest.geometry
    assert size.num_attention_heads * size.head_size == 48 != size.hidden_size == 32
    assert (size.num_encoder_layers, size.num_layers, size.max_positions) == (2, 2, 0)
    assert (manifest.tokens.decoder_start, manifest.tokens.eos) == (1, (0,))


def test_an_untied_head_is_not_scaled_whatever_the_config_says(
    seq2seq_base: Callable[[str], Path], tmp_path: Path
) -> None:
    """transformers 5 writes `tie_word_embeddings: true` for every T5 that it saves."""
    import json

    base = tmp_path / "saved-again"
    shutil.copytree(seq2seq_base("T5 v1.1, FLAN"), base)
    config = json.loads((base / "config.json").read_text())
    config.pop("scale_decoder_outputs", None)
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    loaded = load_base(base)
    assert loaded.config.scale_decoder_outputs
    loaded.family.prepare(loaded.model)
    assert not loaded.config.scale_decoder_outputs


def test_validation_with_prompts_and_against_another_base(
    seq2seq_base: Callable[[str], Path], seq2seq_package: Callable[..., Path], tmp_path: Path
) -> None:
    package = seq2seq_package(FAMILY)
    paths = []
    for method in ("prompt-tuning", "prefix-tuning"):
        save_prompt(make_prompt(open_package(package).manifest, method, method), tmp_path / f"{method}.safetensors")
        paths.append(tmp_path / f"{method}.safetensors")
    measured = validate_package(package, against=seq2seq_base(FAMILY), prompts=paths)
    assert set(measured["prompts"]) == {"prompt-tuning", "prefix-tuning"}
    for found in measured["prompts"].values():
        assert found["max_difference"] <= 1e-3 * found["logit_scale"]
    with pytest.raises(BaseMismatchError, match="was exported from"):
        validate_package(package, against=seq2seq_base("T5"))


def test_a_changed_weight_is_found(
    seq2seq_base: Callable[[str], Path], seq2seq_package: Callable[..., Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(seq2seq_package(FAMILY), copy)
    data = bytearray((copy / "decoder.onnx.data").read_bytes())
    weights = np.frombuffer(data, np.float32)
    weights[: weights.size // 2] *= -1
    (copy / "decoder.onnx.data").write_bytes(data)
    with pytest.raises(PackageError, match="SHA-256"):
        validate_package(copy, against=seq2seq_base(FAMILY))
    manifest = Manifest.from_json((copy / "edgeprompt.json").read_bytes())
    files = {key: graph.file for key, graph in manifest.graphs.items()}
    dataclasses.replace(manifest, graphs=hash_graphs(files, copy)).write(copy)
    with pytest.raises(ValidationError, match="differ from PyTorch"):
        validate_package(copy, against=seq2seq_base(FAMILY))


def test_other_routes_are_refused_and_leave_nothing(seq2seq_base: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="does not build encoder-decoders"):
        export_model(seq2seq_base(FAMILY), tmp_path / "out", route="genai")
    assert not list(tmp_path.iterdir())


POSITIVE, NEGATIVE = (" good", " great", " fine"), (" bad", " dull", " poor")
SUBJECTS = {"film": (" film", " actors"), "music": (" music", " song")}


def sentences(count: int, seed: int) -> list[tuple[str, str, str]]:
    """(text, sentiment, topic) of toy reviews."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        good, topic = bool(generator.integers(2)), ("film", "music")[generator.integers(2)]
        word = str(generator.choice(POSITIVE if good else NEGATIVE))
        subject = str(generator.choice(SUBJECTS[topic]))
        found.append((f"the{subject} was{' very' * int(generator.integers(3))}{word}", "yes" if good else "no", topic))
    return found


def train(
    model: Any, parameters: Any, tokenizer: Any, steps: int, batch: Callable[[int], list[tuple[str, str]]]
) -> None:
    import torch

    optimizer = torch.optim.Adam(parameters, lr=5e-3 if steps > 200 else 0.1)
    model.train()
    for step in range(steps):
        texts, targets = zip(*batch(step), strict=True)
        encoded = tokenizer(list(texts), padding=True, return_tensors="pt")
        labels = tokenizer(list(targets), padding=True, return_tensors="pt")
        wanted = labels.input_ids.masked_fill(labels.attention_mask == 0, -100)
        loss = model(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask, labels=wanted).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def test_a_tuned_prompt_makes_a_base_do_its_task(
    tiny_tokenizer: Any, save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """A base that knows two tasks by their instruction; a soft prompt in the instruction's place picks one."""
    import peft
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=512, d_model=48, d_kv=16, d_ff=96, num_layers=1, num_heads=3, dropout_rate=0.0,
        decoder_start_token_id=1, pad_token_id=1, eos_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)

    def both(step: int) -> list[tuple[str, str]]:
        found = sentences(16, step)
        return [(f"A:{text}", mood) for text, mood, _ in found] + [(f"B:{text}", topic) for text, _, topic in found]

    train(model, model.parameters(), tiny_tokenizer, 300, both)
    base = save_tiny(model)
    adapted = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4))
    tuned = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    train(
        adapted, tuned, tiny_tokenizer, 120, lambda step: [(text, mood) for text, mood, _ in sentences(16, 900 + step)]
    )
    adapted.save_pretrained(tmp_path / "adapter")
    prompt, package = tmp_path / "mood.safetensors", tmp_path / "package"
    words = {"yes": ("yes",), "no": ("no",)}
    convert_prompt(tmp_path / "adapter", prompt, base=base, verbalizer=words, name="mood")
    export_model(base, package, prompts=[prompt])
    with edgeprompt.load(package, options=OPTIONS) as runtime:
        held_out = sentences(60, 5000)
        found = runtime.classify([text for text, _, _ in held_out], prompt="mood")
        right = sum(one.label == mood for one, (_, mood, _) in zip(found, held_out, strict=True))
        assert right >= 55
        spoken = runtime.generate([text for text, _, _ in held_out[:10]], prompt="mood", max_new_tokens=2)
        assert sum(mood.startswith(one.text[:1]) for one, (_, mood, _) in zip(spoken, held_out, strict=False)) >= 9
