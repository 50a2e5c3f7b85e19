"""Every command that writes: what must not be replaced is told before the work, in one line, and is kept."""

import os
import shutil

import pytest

from edgeprompt import save_prompt


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def place(tmp_path, monkeypatch, make_prompt, tiny_llama_package):
    """Somebody's folder, and the working directory: notes in git, data, a prompt, a LoRA, a package."""
    (tmp_path / "thesis" / ".git").mkdir(parents=True)
    (tmp_path / "thesis" / "thesis.tex").write_text("years")
    (tmp_path / "thesis" / ".git" / "HEAD").write_text("ref")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 8}')
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(b"trained")
    (tmp_path / "data.csv").write_text("text,label\na,negative\nb,positive\n")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    save_prompt(make_prompt("sentiment"), tmp_path / "p.safetensors")
    (tmp_path / "linked.safetensors").hardlink_to(tmp_path / "p.safetensors")
    shutil.copytree(tiny_llama_package, tmp_path / "package")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# "missing" is a base that is not there: that the output is what the line tells of shows that it is looked at first.
@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("export missing -o . --force", "the working directory"),
        ("export missing -o .. --force", "the working directory"),
        ("export missing -o thesis --force", "a git checkout"),
        ("export missing -o thesis/.git --force", "it has no edgeprompt.json"),
        ("export missing -o lora --force", "it has no edgeprompt.json"),
        ("export missing -o data.csv --force", "is a file"),
        ("export missing -o data.csv/package", "is a file"),
        ("export package -o package --force", "also what the command reads"),
        ("export package/model.onnx -o package --force", "which the command reads"),
        ("export missing -o package --prompt package/x/../../p.safetensors --force", None),
        ("export missing -o thesis --force --precision auto --prompt p.safetensors --data data.csv", "a git checkout"),
        ("convert missing -o thesis --to peft --force", "a git checkout"),
        ("convert missing -o lora --to peft --force", "another tool wrote the adapter"),
        ("convert missing -o model.safetensors", "it is another file"),
        ("convert p.safetensors -o p.safetensors", "also what the command reads"),
        ("convert p.safetensors -o linked.safetensors", "also what the command reads"),
        ("convert p.safetensors -o thesis/../p.safetensors", "also what the command reads"),
        ("convert lora -o lora", "also what the command reads"),
        ("convert missing -o data.csv/out.npy", "is a file"),
        ("tune missing data.csv -o model.safetensors", "it is another file"),
        ("tune missing data.csv -o thesis.safetensors --adapter lora", "another tool wrote the adapter"),
        ("tune missing data.csv -o out.safetensors --adapter .", "holds 'data.csv'"),
        ("tune missing data.csv -o out.safetensors --adapter data.csv", "also what the command reads"),
        ("tune missing data.csv -o out.safetensors --log data.csv", "also what the command reads"),
        ("tune missing p.safetensors -o p.safetensors", "ends in '.safetensors'; known: .csv"),
        ("tune missing data.csv -o p.safetensors --resume p.safetensors", "also what the command reads"),
        ("run package --input data.csv --output data.csv", "also what the command reads"),
        ("run package --input data.csv --output thesis", "is a folder"),
        ("run package --input data.csv --output package/tokenizer.json", "is a file of 'package'"),
        ("run package --input data.csv --output package/model.onnx", "is a file of 'package'"),
        ("run package hello --output model.onnx --prompt model.onnx", None),
        ("run package hello --output p.safetensors", "it is no text"),
        ("run package hello --output /dev/null", "no regular file"),
        ("bench package -o package/edgeprompt.json", "is a file of 'package'"),
        ("bench package --prompt p.safetensors -o p.safetensors", "also what the command reads"),
        ("bench package -o thesis", "is a folder"),
    ],
)
def test_what_is_not_ours_is_kept(refused, place, command, reason):
    before = tree(place)
    line = refused(*command.split())
    assert reason is None or reason in line, line
    assert reason is None or "missing" not in line
    assert tree(place) == before
    assert not [name for name in os.listdir(place) if name.startswith(".")]


def test_the_base_is_kept(refused, tiny_llama_base, tmp_path):
    base = shutil.copytree(tiny_llama_base, tmp_path / "base")
    (tmp_path / "link").symlink_to(base)
    before = tree(tmp_path)
    for out in (base, tmp_path / "link", base / "..", base / "config.json"):
        refused("export", base, "-o", out, "--force")
    assert tree(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["base", "link"]


def test_our_own_adapter_is_replaced_by_force(cli, refused, place):
    arguments = ("convert", "p.safetensors", "--base", "package", "--to", "peft", "-o", "ours")
    assert cli(*arguments).exit_code == 0
    assert "give --force" in refused(*arguments)
    assert cli(*arguments, "--force").exit_code == 0
    (place / "ours" / "notes.md").write_text("mine")
    assert "'notes.md'" in refused(*arguments, "--force")


def test_a_folder_of_prompts_keeps_the_source_inside_it(refused, place):
    (place / "set").mkdir()
    shutil.copy(place / "p.safetensors", place / "set" / "sentiment.safetensors")
    before = tree(place)
    line = refused(
        "convert", "set/sentiment.safetensors", "-o", "set", "--base", "package", "--template", "{prompt}{text}"
    )
    assert "also what the command reads" in line
    assert tree(place) == before
