"""Chat from end to end: answers through the runtime are those of PyTorch behind `apply_chat_template`."""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path

import pytest

import edgeprompt
from edgeprompt.errors import InputError
from tests.support.runtimes import QUIET

HEAD = "{% for message in messages %}"
TAIL = "{% if add_generation_prompt %}<assistant>{% endif %}"
ROUND = HEAD + "<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}" + TAIL
TEMPLATES = {
    "strftime_now": "{{ strftime_now('%Y') }} " + ROUND,
    "raise_exception": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + ROUND
    ),
    "loop controls": (
        HEAD + "{% if message['role'] == 'system' %}{% continue %}{% endif %}<{{ message['role'] }}>"
        "{{ message['content'] | trim }}{% if loop.index > 5 %}{% break %}{% endif %}{% endfor %}"
    ),
    "generation": (
        HEAD + "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
        "{% else %}<user>{{ message['content'] }}{% endif %}{% endfor %}"
    ),
    "twice": "{{ messages[-1]['content'] }} {{ messages[-1]['content'] }}",
}
USER = [{"role": "user", "content": " What is the film about? "}]
TURNS = [*USER, {"role": "assistant", "content": "War."}, {"role": "user", "content": "Sure?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *TURNS]


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_those_behind_apply_chat_template(
    name: str, tiny_llama_package: Path, tiny_llama_base: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = shutil.copytree(tiny_llama_package, tmp_path / "package")
    (package / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tiny_llama_base)
    theirs.chat_template = TEMPLATES[name]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_base).eval()

    def expected(messages: list[dict[str, str]]) -> list[int]:
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        made = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
        return made[: made.index(0)] if 0 in made else made

    if name == "strftime_now":
        assert str(datetime.now().year) in theirs.apply_chat_template(USER, tokenize=False)
    with edgeprompt.load(package, options=QUIET) as runtime:
        text = USER[0]["content"]
        assert list(runtime.generate(text, chat=True, max_new_tokens=8).token_ids) == expected(USER)
        for messages in (USER, TURNS, SYSTEM):
            if name == "raise_exception" and messages is SYSTEM:
                with pytest.raises(InputError, match="System role not supported"):
                    runtime.chat(messages, max_new_tokens=8)
                continue
            assert list(runtime.chat(messages, max_new_tokens=8).token_ids) == expected(messages), messages
