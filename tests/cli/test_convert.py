"""`convert`: an option that would do nothing is refused."""

import pytest


@pytest.mark.parametrize(("option", "value"), [("--from", "nemo"), ("--task-index", "99")])
def test_options_of_other_tools_files_are_refused_for_a_prompt_file(refused, prompt_folder, tmp_path, option, value):
    source, out = prompt_folder / "sentiment.safetensors", tmp_path / "out.safetensors"
    said = refused("convert", source, "-o", out, option, value)
    assert f"{str(source)!r} is a prompt file" in said
    assert f"leave out {option}" in said
    assert not out.exists()
