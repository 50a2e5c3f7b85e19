"""`validate` asks prompts their golden examples."""

import dataclasses
import json

import pytest

import edgeprompt
from edgeprompt import save_prompt
from edgeprompt.prompts.file import Golden
from tests.support.prompts import make_prompt


def test_golden_examples_are_asked(cli, refused, tiny_llama_package, tiny_llama_base, tmp_path):
    words = {"x": (" good",), "y": (" bad",)}
    with edgeprompt.load(tiny_llama_package, provider="cpu") as runtime:
        runtime.add_prompt(make_prompt(runtime.manifest, "p", verbalizer=words))
        found = runtime.classify("the film", prompt="p")
        prompt = runtime.prompt("p")
    paths = []
    for label in ("x", "y"):
        golden = Golden({"text": "the film"}, label, logits=dict(found.logits))
        paths.append(tmp_path / f"{label}.safetensors")
        save_prompt(dataclasses.replace(prompt, name=label, golden=golden), paths[-1])
    right, wrong = paths if found.label == "x" else reversed(paths)
    result = cli("validate", tiny_llama_package, "--against", tiny_llama_base, "--prompt", right, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["golden"] == {found.label: 0.0}
    says = refused("validate", tiny_llama_package, "--against", tiny_llama_base, "--prompt", wrong)
    assert f"answers its golden example with {found.label!r}" in says


@pytest.mark.parametrize("wrong", ["--data", "--prompt", "--against"])
def test_a_wrong_path_is_told_before_the_work(
    refused, tiny_llama_package, tiny_llama_base, tmp_path, monkeypatch, wrong
):
    from edgeprompt.package.folder import Package

    monkeypatch.setattr(Package, "verify", lambda self: pytest.fail("the package was read"))
    missing = tmp_path / {"--data": "no.csv", "--prompt": "no.safetensors", "--against": "no"}[wrong]
    base = () if wrong == "--against" else ("--against", tiny_llama_base)
    assert str(missing) in refused("validate", tiny_llama_package, *base, wrong, missing)
