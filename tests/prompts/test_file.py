"""The prompt file: literal bytes, strictness, and hostile files."""

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeprompt.errors import BaseMismatchError, PromptFileError
from edgeprompt.package.manifest import Base, Geometry, GraphFile, Manifest, Tokens
from edgeprompt.prompts.file import (
    MAX_FILE_BYTES,
    Golden,
    Head,
    HeadStep,
    PromptFile,
    TunedFor,
    from_bytes,
    load_prompt,
    save_prompt,
)
from edgeprompt.prompts.registry import LoadedPrompt
from edgeprompt.prompts.template import Template
from tests.support.files import IRREGULAR, make_irregular

GOLDEN = Path(__file__).parents[1] / "golden" / "prompt_v1.safetensors"


def make_prompt(**changes):
    prompt = PromptFile(
        name="sentiment",
        method="prompt-tuning",
        task="classify",
        base=Base("tiny", "sha256:" + "0" * 64),
        template=Template.parse("{prompt}{text}\nSentiment:"),
        prompt_embeddings=np.arange(12, dtype=np.float32).reshape(3, 4) / 8,
        verbalizer={"negative": (" negative", " bad"), "positive": (" positive",)},
        labels=("negative", "positive"),
        calibration=(0.25, -0.25),
        generation={"max_new_tokens": 8},
        tuned_for=TunedFor("int4", "sha256:" + "1" * 64),
        training={"steps": 70, "accuracy": 0.875},
        golden=Golden({"text": "Zoë liked it"}, "positive", (7, 8), {"positive": 1.5, "negative": -0.5}),
    )
    return dataclasses.replace(prompt, **changes)


def make_manifest(**geometry):
    sizes = {
        "vocab_size": 10,
        "hidden_size": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_size": 2,
    }
    return Manifest(
        architecture="decoder-only",
        model_type="llama",
        base=Base("tiny", "sha256:" + "0" * 64),
        geometry=Geometry(**{**sizes, **geometry}),
        tokens=Tokens(eos=(2,)),
        precision="int4",
        route="genai",
        graphs={"model": GraphFile("model.onnx", "0" * 64)},
    )


def rewrite(data, change_header=None, change_metadata=None):
    """The file with its header or its metadata changed by a function."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    if change_metadata:
        metadata = json.loads(header["__metadata__"]["edgeprompt"])
        change_metadata(metadata)
        header["__metadata__"]["edgeprompt"] = json.dumps(metadata)
    if change_header:
        change_header(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def test_golden_bytes():
    """Files written by version 1 stay readable, and are written the same."""
    assert make_prompt().to_bytes() == GOLDEN.read_bytes()
    assert from_bytes(GOLDEN.read_bytes()).metadata() == make_prompt().metadata()


def test_round_trip_keeps_everything(tmp_path):
    prompt = make_prompt(
        method="prefix-tuning",
        prompt_embeddings=None,
        past_key_values=np.random.default_rng(0).standard_normal((2, 2, 1, 3, 2)).astype(np.float16),
        head={"classifier.weight": np.ones((2, 4), np.float32), "classifier.bias": np.zeros(2, np.float32)},
        head_spec=Head("first_text", (HeadStep("linear", "classifier"),)),
    )
    save_prompt(prompt, tmp_path / "p.safetensors")
    loaded = load_prompt(tmp_path / "p.safetensors")
    assert loaded.to_bytes() == prompt.to_bytes()
    assert loaded.num_virtual_tokens == 3
    assert loaded.head_spec == prompt.head_spec
    assert loaded.template == prompt.template
    np.testing.assert_array_equal(loaded.past_key_values, prompt.past_key_values)


def infix(**changes):
    past = np.random.default_rng(0).standard_normal((2, 2, 1, 3, 2)).astype(np.float16)
    template = Template.parse("{text}{prompt} is")
    fields = {"method": "prefix-tuning", "prompt_embeddings": None, "past_key_values": past, "template": template}
    fields["is_infix"] = True
    return make_prompt(**fields | changes)


def test_keys_and_values_inside_the_text_are_version_2(tmp_path):
    """Older readers would put them in front."""
    save_prompt(infix(), tmp_path / "p.safetensors")
    loaded = load_prompt(tmp_path / "p.safetensors")
    assert loaded.metadata()["version"] == 2
    assert loaded.is_infix
    assert loaded.to_bytes() == infix().to_bytes()
    assert str(loaded.template) == "{text}{prompt} is"


def test_version_1_has_keys_and_values_in_front_whatever_the_template_says():
    for template in ("{prompt}{text} is", "{text} is", "{text}{prompt} is"):
        data = infix(template=Template.parse(template), is_infix=False).to_bytes()
        old = from_bytes(data)
        assert (old.metadata()["version"], old.is_infix, str(old.template)) == (1, False, template)
        assert old.to_bytes() == data


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"template": Template.parse("{text}{prompt}")}, "no fixed text at its end"),
        ({"template": Template.parse("{text}{prompt}{other}")}, "no fixed text at its end"),
        ({"template": Template.parse("{text}{prompt:2} is")}, "places 2 virtual"),
        ({"template": Template.parse("{prompt}{text} is")}, "there are none"),
        ({"past_key_values": None, "prompt_embeddings": np.ones((3, 4), np.float32)}, "there are none"),
        ({"head_spec": Head("tokens", ()), "task": "tag"}, "they have no states"),
    ],
)
def test_keys_and_values_that_cannot_stand_inside_the_text(changes, says):
    with pytest.raises(PromptFileError, match=says):
        infix(**changes).to_bytes()
    with pytest.raises(PromptFileError, match=says):
        LoadedPrompt("x", infix(**changes))


def test_saving_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "p.safetensors"
    save_prompt(make_prompt(), path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(PromptFileError, match="No space left"):
        save_prompt(make_prompt(name="other"), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt_embeddings": np.full((2, 4), np.nan, np.float32)}, "NaN"),
        ({"prompt_embeddings": np.ones((2, 4), np.float64)}, "float64"),
        ({"prompt_embeddings": np.ones(4, np.float32)}, "2 dimensions"),
        ({"prompt_embeddings": np.ones((0, 4), np.float32)}, "empty"),
        ({"past_key_values": np.ones((2, 2, 1, 3, 2), np.float32)}, "both"),
        ({"prompt_embeddings": None}, "no tensor"),
        ({"method": "lora"}, "allowed: prompt-tuning"),
        ({"task": "dance"}, "allowed: classify"),
        ({"calibration": (1.0,)}, "1 calibration values for 2 labels"),
        ({"head": {"x.weight": np.ones((1, 4), np.float32)}}, "without a head description"),
        ({"head_spec": Head("first", (HeadStep("linear", "x"),))}, "needs tensor head.x.weight"),
        ({"head_spec": Head("middle", ())}, "head input"),
    ],
)
def test_what_breaks_the_format_is_not_saved(changes, says):
    with pytest.raises(PromptFileError, match=says):
        make_prompt(**changes).to_bytes()


HOSTILE_METADATA = [
    (lambda m: m.update(version=2), "version 2"),
    (lambda m: m.update(format="x"), "format"),
    (lambda m: m.update(extra=1), "unknown key 'extra'"),
    (lambda m: m.pop("template"), "lacks key 'template'"),
    (lambda m: m.update(num_virtual_tokens=4), "the tensors have 3"),
    (lambda m: m.update(num_virtual_tokens=True), "must be int"),
    (lambda m: m.update(name=3), "name must be str"),
    (lambda m: m.update(base={"name": "x"}), "lacks key 'fingerprint'"),
    (lambda m: m.update(verbalizer=[["a", []]]), "no word"),
    (lambda m: m.update(verbalizer=[["a", ["x"]], ["a", ["y"]]]), "twice"),
    (lambda m: m.update(verbalizer=[["a"]]), "unpack"),
    (lambda m: m.update(labels="ab"), "must be list"),
    (lambda m: m.update(template=[{"slot": {}}]), "template"),
    (lambda m: m.update(calibration=["1", "2"]), "calibration must be int or float"),
    (lambda m: m.update(calibration=[10**400, 1]), "int too large"),
    (lambda m: m.update(name="a\ud800b"), "surrogates not allowed"),
    (lambda m: m.update(golden={"fields": {}, "token_ids": 3}), "token_ids must be list"),
    (lambda m: m.update(golden={"fields": {}, "token_ids": ["3"]}), "token id must be int"),
    (lambda m: m.update(golden={"fields": {}, "token_ids": [-3]}), "token id is -3"),
    (lambda m: m.update(golden={"fields": {"text": 5}}), "golden field must be str"),
    (lambda m: m.update(golden={"fields": [], "label": "x"}), "golden.fields must be dict"),
    (lambda m: m.update(golden={"fields": {}, "label": 3}), "golden.label must be str or null"),
    (lambda m: m.update(golden={"fields": {}, "label": "x", "logits": {"x": []}}), "golden logit must be int or float"),
    (lambda m: m.update(golden={"fields": {}, "token_ids": [1], "logits": {"x": 1.0}}), "a token id is needed"),
    (lambda m: m.update(tuned_for={"precision": "int4", "x": 1}), "unknown key 'x'"),
]


@pytest.mark.parametrize(("change", "says"), HOSTILE_METADATA)
def test_hostile_metadata_is_refused(change, says):
    with pytest.raises(PromptFileError, match=says):
        from_bytes(rewrite(make_prompt().to_bytes(), change_metadata=change))


HOSTILE_HEADERS = [
    (lambda h: h["prompt_embeddings"].update(dtype="BF16"), "BF16"),
    (lambda h: h["prompt_embeddings"].update(shape=[4, 4]), "."),
    (lambda h: h["prompt_embeddings"].update(data_offsets=[0, 4]), "."),
    (lambda h: h["prompt_embeddings"].update(data_offsets=[0, 1 << 40]), "."),
    (lambda h: h.update(other=h["prompt_embeddings"]), "."),
    (lambda h: h.pop("__metadata__"), "no edgeprompt prompt file"),
    (lambda h: h["__metadata__"].update(format="pt"), "no edgeprompt prompt file"),
]


@pytest.mark.parametrize(("change", "says"), HOSTILE_HEADERS)
def test_hostile_headers_are_refused(change, says):
    with pytest.raises(PromptFileError, match=says):
        from_bytes(rewrite(make_prompt().to_bytes(), change_header=change))


def test_duplicate_keys_are_refused():
    data = make_prompt().to_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + size].replace(b'{"__metadata__"', b'{"prompt_embeddings":{},"__metadata__"', 1)
    with pytest.raises(PromptFileError, match="duplicate key"):
        from_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def test_every_truncation_is_refused():
    data = make_prompt().to_bytes()
    for length in (*range(0, len(data), 7), len(data) - 1):
        with pytest.raises(PromptFileError):
            from_bytes(data[:length])


def test_a_header_that_claims_too_much_is_refused():
    with pytest.raises(PromptFileError, match="claims"):
        from_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def test_deep_nesting_is_refused():
    text = b'{"__metadata__":' + b"[" * 200_000
    with pytest.raises(PromptFileError):
        from_bytes(struct.pack("<Q", len(text)) + text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PromptFileError, match=r"nothing\.safetensors"):
        load_prompt(tmp_path / "nothing.safetensors")


def test_errors_are_also_standard_ones():
    with pytest.raises(ValueError, match="too short"):
        from_bytes(b"x")


def test_another_base_is_refused_and_both_are_named():
    prompt = make_prompt(base=Base("other", "sha256:" + "9" * 64))
    with pytest.raises(BaseMismatchError, match=r"'other' \(sha256:9+\).*'tiny' \(sha256:0+\)"):
        prompt.check_base(make_manifest())


def test_another_geometry_is_refused():
    make_prompt().check_base(make_manifest())
    with pytest.raises(BaseMismatchError, match=r"\[3, 4\].*\[3, 8\]"):
        make_prompt().check_base(make_manifest(hidden_size=8))
    prefix = make_prompt(prompt_embeddings=None, past_key_values=np.ones((2, 2, 1, 5, 2), np.float32))
    prefix.check_base(make_manifest())
    with pytest.raises(BaseMismatchError, match="past_key_values"):
        prefix.check_base(make_manifest(num_layers=3))


def test_another_tokenizer_is_refused():
    manifest = dataclasses.replace(make_manifest(), tokenizer_fingerprint="sha256:b")
    with pytest.raises(BaseMismatchError, match="tokenizer"):
        make_prompt(tokenizer_fingerprint="sha256:a").check_base(manifest)


def test_sha256_is_the_files():
    assert make_prompt().sha256 == hashlib.sha256(make_prompt().to_bytes()).hexdigest()


@pytest.mark.skipif(os.name == "nt", reason="pipes and sockets with a path")
@pytest.mark.parametrize("kind", IRREGULAR)
@pytest.mark.parametrize("read", [load_prompt, LoadedPrompt.open])
def test_only_regular_files_are_read(kind: str, read: Callable[[Path], object], tmp_path: Path) -> None:
    path = make_irregular(kind, tmp_path / "x.safetensors")
    with pytest.raises(PromptFileError, match=f"it is {kind}, and only regular files are read"):
        read(path)


def test_a_file_larger_than_any_prompt_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    for read in (load_prompt, LoadedPrompt.open):
        with pytest.raises(PromptFileError, match=f"at most {MAX_FILE_BYTES} are allowed"):
            read(path)


@pytest.mark.parametrize("aggregation", ["mean", "max"])
def test_aggregation_is_read_back_and_its_default_changes_no_bytes(aggregation: str) -> None:
    prompt = make_prompt(verbalizer_aggregation=aggregation)
    assert from_bytes(prompt.to_bytes()).verbalizer_aggregation == aggregation
    assert "verbalizer_aggregation" not in make_prompt().metadata()
    assert from_bytes(make_prompt().to_bytes()).verbalizer_aggregation == "sum"


@pytest.mark.parametrize(
    "changes", [{"verbalizer_aggregation": "median"}, {"verbalizer_aggregation": "mean", "verbalizer": {}}]
)
def test_an_aggregation_without_sense_is_refused(changes) -> None:
    with pytest.raises(PromptFileError, match="verbalizer_aggregation is"):
        make_prompt(calibration=(), **changes).to_bytes()


@pytest.mark.parametrize("pair", [("\u00e9", "e\u0301"), ("good", "good "), ("good", "\tgood")])
@pytest.mark.parametrize("where", ["labels", "verbalizer"])
def test_labels_that_look_the_same_are_not_saved_and_old_ones_are_told(pair, where, tmp_path, caplog) -> None:
    given = pair if where == "labels" else {pair[0]: (" a",), pair[1]: (" b",)}
    prompt = make_prompt(**{"calibration": (), "golden": None, "labels": (), "verbalizer": {}, where: given})
    path = tmp_path / "a.safetensors"
    with pytest.raises(PromptFileError, match=r"look the same.*rename one of them"):
        save_prompt(prompt, path)
    assert not path.exists()
    path.write_bytes(prompt.to_bytes())  # as earlier versions did
    for read in (load_prompt, LoadedPrompt.open):
        caplog.clear()
        read(path)
        assert f"labels {pair[0]!a} and {pair[1]!a} look the same" in caplog.text


def test_a_label_twice_is_refused() -> None:
    with pytest.raises(PromptFileError, match="label 'a' stands twice"):
        make_prompt(labels=("a", "b", "a"), verbalizer={}, calibration=()).to_bytes()
