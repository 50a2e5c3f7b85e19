"""Text never becomes an id beyond the base's embedding: there the rows of soft prompts begin."""

import dataclasses
import json
import random
import shutil

import pytest

import edgeprompt
from edgeprompt import Request
from edgeprompt.base.tokenizer_files import check_tokenizer_files
from edgeprompt.errors import DataError, InputError, MissingDependencyError, PackageError, SourceError, TemplateError
from edgeprompt.package.folder import open_package
from edgeprompt.package.tokenizer import Tokenizer
from edgeprompt.prompts.template import Template
from edgeprompt.tuning import TuneOptions, tune
from exporters import export_model
from tests.support.encoder_prompts import with_head
from tests.support.packages import package_before_the_check, with_more_tokens
from tests.support.prompts import make_prompt

WORD = "zyzzyva"
ARCHITECTURES = ("decoder", "encoder", "encoder-decoder")


@pytest.fixture
def base(tiny_llama_base, encoder_base, seq2seq_base, tmp_path):
    def copy(architecture):
        source = {"decoder": lambda: tiny_llama_base, "encoder": lambda: encoder_base("BERT")}.get(
            architecture, lambda: seq2seq_base("T5")
        )()
        return shutil.copytree(source, tmp_path / f"base-{architecture}")

    return copy


@pytest.fixture
def old_package(tiny_llama_package, encoder_package, seq2seq_package, tmp_path):
    """A package as it was exported before the check: its tokenizer has a token more than the base."""

    def make(architecture):
        source = {"decoder": lambda: tiny_llama_package, "encoder": lambda: encoder_package("BERT")}.get(
            architecture, lambda: seq2seq_package("T5")
        )()
        return package_before_the_check(source, tmp_path / f"package-{architecture}", WORD)

    return make


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_export_refuses_tokens_without_an_embedding(base, architecture, tmp_path):
    folder = base(architecture)
    with_more_tokens(folder, WORD, *(f"w{number}" for number in range(9)))
    with pytest.raises(SourceError, match=rf"'{WORD}' \(512\).*and 5 more; resize the embeddings"):
        export_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokens_that_no_text_becomes_pass(base, tmp_path):
    folder = base("decoder")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["\U0001f600reserved"] = 600  # no merge makes it, and its letters are no bytes
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert export_model(folder, tmp_path / "out").path.is_dir()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_text_reads_another_prompts_rows(old_package, architecture):
    with edgeprompt.load(old_package(architecture)) as runtime:
        manifest = runtime.manifest
        behind = Template.parse("{text} and {prompt}")
        for name, seed in (("first", 1), ("second", 2)):
            if architecture == "encoder":
                runtime.add_prompt(with_head(runtime, name, 2, "mean", seed=seed, template=behind))
            else:
                runtime.add_prompt(make_prompt(manifest, name, seed=seed, template=behind))
        task = {"encoder": runtime.classify}.get(architecture, runtime.generate)
        for prompt in ("first", "second"):
            with pytest.raises(InputError, match=f"the token '{WORD}', which has id 512"):
                task(f"a {WORD} b", prompt=prompt)
        good, bad = (Request(text, "first") for text in ("a good b", f"a {WORD} b"))
        answers = runtime.run([good, bad], return_errors=True)
        assert isinstance(answers[1], InputError)
        assert not isinstance(answers[0], Exception)
        if architecture == "encoder":
            pair = Template.parse("{prompt}{question}{context}")
            runtime.add_prompt(with_head(runtime, "qa", 2, "tokens", task="qa", labels=(), template=pair))
            runtime.add_prompt(with_head(runtime, "tag", 3, "tokens", task="tag", labels=("O", "B-x", "I-x")))
            for text, name in (({"question": "a", "context": WORD}, "qa"), (f"a {WORD}", "tag")):
                with pytest.raises(InputError, match=WORD):
                    runtime.run([Request(text, name)])
            with pytest.raises(InputError, match=WORD):
                runtime.embed([WORD])
            return
        with pytest.raises(InputError, match=f"^label word ' {WORD}' of label 'a' has the token"):
            runtime.add_prompt(make_prompt(manifest, "words", verbalizer={"a": (f" {WORD}",), "b": (" b",)}))
        with pytest.raises(InputError, match=f"^choice '{WORD}' has the token"):
            runtime.generate("a", prompt="first", choices=[WORD, "b"])
        with pytest.raises(InputError, match=WORD):
            runtime.generate(WORD)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tuning_refuses_them_too(base, architecture, tmp_path):
    folder = base(architecture)
    with_more_tokens(folder, WORD)
    chosen = random.Random(0)
    rows = [{"text": f"{chosen.random()} {WORD}", "label": label} for label in ("a", "b") for _ in range(4)]

    def refused(kind, told, rows, **options):
        with pytest.raises(kind, match=rf"^{told} has the token '{WORD}', which has id 512"):
            tune(
                folder, rows, output=tmp_path / "p.safetensors", progress=False,
                options=TuneOptions(**{"steps": 1, "max_length": 90, **options}),
            )  # fmt: skip
        assert not (tmp_path / "p.safetensors").exists()

    good = [{"text": f"{chosen.random()}", "label": label} for label in ("a", "b") for _ in range(4)]
    refused(DataError, "row 1 of .*: the text", rows)
    refused(DataError, "row 9 of .*: the text", [*good, rows[0]])
    refused(TemplateError, f"' {WORD} is' of (the )?template.*", good, template=f"{{text}} {WORD} is")
    two = [{**row, "title": f"a {WORD}" if row is good[5] else "a"} for row in good]
    refused(DataError, r"row 6 of .*: \{title\}", two, template="{title} {text} is")
    pair = [{**row, "title": f"a {WORD}" if row is good[5] else "a"} for row in good]
    if architecture == "encoder":
        refused(DataError, r"row 6 of .*: \{title\}", pair, template="{prompt}{text}{title}")
        return
    words = {"a": (" a",), "b": (f" {WORD}",)}
    refused(InputError, f"label word ' {WORD}' of label 'b'", good, verbalizer=words)
    refused(InputError, f"label word ' {WORD}' of label 'b'", good, verbalizer=words, init="random")
    refused(InputError, "the text that the prompt starts from", good, init="text", init_text=WORD)
    targets = [{"text": row["text"], "target": WORD if row is good[3] else "x"} for row in good]
    refused(DataError, "row 4 of .*: the target", targets, task="generate")


def test_a_tokenizer_alone_takes_its_whole_vocabulary(old_package):
    folder = old_package("decoder")
    assert max(Tokenizer(folder).encode(WORD)) == 512
    for encode in ("encode", "encode_with_offsets"):
        with pytest.raises(InputError, match=WORD):
            getattr(Tokenizer(folder, 512), encode)(WORD)
    with pytest.raises(InputError, match=WORD):
        Tokenizer(folder, 512).encode_pair("a", WORD)


@pytest.mark.parametrize("name", ["spm.model", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"])
def test_a_sentencepiece_model_alone_is_told_of_before_the_work(base, name, tmp_path, monkeypatch):
    folder = base("encoder-decoder")
    for file in folder.glob("token*"):
        file.unlink()
    (folder / name).write_bytes(b"pieces")
    monkeypatch.setattr("importlib.util.find_spec", lambda wanted, *rest: None)
    for refuse in (
        lambda: check_tokenizer_files(folder),
        lambda: export_model(folder, tmp_path / "out"),
        lambda: tune(folder, [{"text": "a", "label": "b"}], output=tmp_path / "p.safetensors"),
    ):
        with pytest.raises(MissingDependencyError, match=f"{name}.*pip install sentencepiece"):
            refuse()
    (folder / "tokenizer.json").write_text("{}")
    check_tokenizer_files(folder)


def test_marians_two_models_are_refused(base, tmp_path):
    folder = base("encoder-decoder")
    for file in folder.glob("token*"):
        file.unlink()
    for name in ("source.spm", "target.spm", "vocab.json"):
        (folder / name).write_bytes(b"{}")
    with pytest.raises(SourceError, match="two SentencePiece models"):
        export_model(folder, tmp_path / "out")


def test_a_package_without_a_tokenizer_says_so(tiny_llama_package, tmp_path):
    folder = shutil.copytree(tiny_llama_package, tmp_path / "package")
    (folder / "tokenizer.json").unlink()
    manifest = open_package(folder).manifest
    dataclasses.replace(manifest, tokenizer_fingerprint=None).write(folder)
    with pytest.raises(PackageError, match=r"has no tokenizer\.json: its base had none"):
        _ = open_package(folder).tokenizer
