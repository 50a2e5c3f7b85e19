"""Prompts of text in place of virtual tokens."""

from pathlib import Path

import pytest

from edgeprompt.package.folder import open_package
from edgeprompt.prompts.hard_prompt import hard_prompt
from edgeprompt.prompts.registry import LoadedPrompt
from edgeprompt.prompts.template import Template
from tests.support.prompts import make_infix, make_prompt


@pytest.mark.parametrize("text", ["", "Say yes or no.\n"])
def test_nothing_of_the_prompt_stays(text: str, tiny_llama_package: Path) -> None:
    manifest = open_package(tiny_llama_package).manifest
    template = "{text}{prompt}\nA:"
    tuned = [
        make_prompt(manifest, "tokens", template=Template.parse(template)),
        make_prompt(manifest, "prefix", "prefix-tuning", template=Template.parse("{text}\nA:")),
        make_infix(manifest, "infix", template),
    ]
    for prompt in tuned:
        hard = LoadedPrompt("hard", hard_prompt(prompt, text, name="hard"))
        assert hard.file.template == Template.parse(text + "{text}\nA:")
        assert (hard.rows, hard.past_length, hard.is_infix) == (0, 0, False)
