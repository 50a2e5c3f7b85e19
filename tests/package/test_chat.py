# ruff: noqa: E501  (templates as they are published)
"""Chat templates render as transformers renders them."""

import json
import shutil

import pytest

from edgeprompt.errors import InputError, PackageError, UnsupportedError
from edgeprompt.package.tokenizer import Tokenizer

TEMPLATES = {
    "SmolLM2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}",
    "SmolLM3": "{%- set today = strftime_now('%d %B %Y') -%}{%- set mode = namespace(think=true) -%}\n"
    "{%- for message in messages -%}\n  {%- if message.role == 'system' -%}{%- if '/no_think' in message.content -%}"
    "{%- set mode.think = false -%}{%- endif -%}<|im_start|>system\nToday Date: {{ today }}\n{{ message.content }}<|im_end|>"
    "\n{%- elif message.role == 'user' -%}{{ '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}"
    "{%- elif message.role == 'assistant' -%}\n    {% generation %}\n    {%- if mode.think -%}"
    "{{ '<|im_start|>assistant\n' + message.content.lstrip('\n') + '<|im_end|>\n' }}\n    {%- else -%}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n' + message.content + '<|im_end|>\n' }}\n    {%- endif -%}\n"
    "    {% endgeneration %}\n  {%- endif -%}\n{%- endfor -%}\n{% if add_generation_prompt %}\n    {% generation %}\n"
    "<|im_start|>assistant\n    {% endgeneration %}\n{% endif %}",
    "Llama 3": "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n        "
    "{%- set date_string = strftime_now('%d %b %Y') %}\n    {%- else %}\n        {%- set date_string = '26 Jul 2024' %}\n"
    "    {%- endif %}\n{%- endif %}\n{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = "
    "messages[0]['content']|trim %}\n    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = '' %}"
    "\n{%- endif %}\n{{- '<|start|>system\n' + date_string + '\n' + system_message }}\n{%- for message in messages %}\n    "
    "{{- '<|start|>' + message['role'] + '\n\n' + message['content'] | trim + '<|eot|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|start|>assistant\n\n' }}\n{%- endif %}\n",
    "Gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + "
    "message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{'<start_of_turn>model\n'}}{% endif %}",
    "Qwen3": "{%- if tools %}\n    {{- tools | tojson }}\n{%- endif %}\n{%- set ns = namespace(multi_step_tool=true, "
    "last=messages|length - 1) %}\n{%- for message in messages[::-1] %}\n    {%- set index = (messages|length - 1) - "
    "loop.index0 %}\n    {%- if ns.multi_step_tool and message.role == 'user' %}\n        {%- set ns.multi_step_tool = "
    "false %}\n        {%- set ns.last = index %}\n    {%- endif %}\n{%- endfor %}\n{%- for message in messages %}\n    "
    "{%- if message.content is string %}\n        {%- set content = message.content %}\n    {%- else %}\n        "
    "{%- set content = '' %}\n    {%- endif %}\n    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}"
    "\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n    "
    "{%- if enable_thinking is defined and enable_thinking is false %}\n        {{- '<think>\n\n</think>\n\n' }}\n"
    "    {%- endif %}\n{%- endif %}",
    "loop controls and tojson": "{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}"
    "{{ message | tojson(indent=2, sort_keys=true) }}{{ message.content | tojson(ensure_ascii=true) }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "what is not defined": "{{ bos_token is defined }}{{ pad_token }}{{ unk_token is defined }}{{ tools is none }}",
}  # fmt: skip
USER = [{"role": "user", "content": " What's <b>new</b> & ähnlich? "}]
TURNS = [*USER, {"role": "assistant", "content": "\nNothing."}, {"role": "user", "content": "Sure?"}]
CONVERSATIONS = {"user": USER, "turns": TURNS, "system": [{"role": "system", "content": "Be brief. /no_think"}, *TURNS]}


@pytest.fixture
def tokenizers(tiny_tokenizer, tmp_path):
    def make(source):
        from transformers import AutoTokenizer

        tiny_tokenizer.save_pretrained(tmp_path)
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        theirs.bos_token = "<eos>"
        theirs.chat_template = source
        theirs.save_pretrained(tmp_path)
        return Tokenizer(tmp_path), theirs

    return make


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("opened", [True, False])
def test_templates_render_as_in_transformers(tokenizers, name, conversation, opened):
    ours, theirs = tokenizers(TEMPLATES[name])
    messages = CONVERSATIONS[conversation]
    if name == "Gemma" and conversation == "system":
        with pytest.raises(InputError, match="rejects the conversation: System role not supported"):
            ours.chat(messages)
        return
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    assert ours.chat(messages, add_generation_prompt=opened) == expected


def test_a_string_is_a_users_turn(tokenizers):
    ours, _ = tokenizers(TEMPLATES["SmolLM2"])
    assert ours.chat("hello") == ours.chat([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize(
    ("source", "error"),
    [("{% if %}", "is broken"), ("{{ 1 / 0 }}", "fails"), ("{{ messages.__class__.__mro__ }}", "fails"),
     ("{% set ns = namespace(_x=1) %}", "fails"), ("{{ messages[9].content.x }}", "fails"),
     ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails"), ("{{ 'a'.encode('nope') }}", "fails"),
     ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "is broken")],
)  # fmt: skip
def test_a_broken_template_is_one_line(tokenizers, source, error):
    ours, _ = tokenizers(source)
    with pytest.raises(PackageError, match=f"the chat template {error}"):
        ours.chat(USER)


def test_a_template_file_that_is_no_text_is_one_line(tokenizers, tmp_path):
    ours, _ = tokenizers("{{ messages[0].content }}")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(PackageError, match=r"cannot read the chat template .*chat_template.jinja"):
        ours.chat(USER)


def test_named_templates_without_a_default_are_told(tokenizers, tmp_path):
    tokenizers("x")
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "T"}, "broken", {"name": "rag", "template": "R"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    with pytest.raises(UnsupportedError, match="chat templates named rag, tool_use, and none named default"):
        Tokenizer(tmp_path).chat(USER)


@pytest.mark.parametrize(
    "messages", [[{"content": "x"}], [{"role": "robot", "content": "x"}], [{"role": "user"}], ["x"]]
)
def test_a_broken_message_is_refused(tokenizers, messages):
    ours, _ = tokenizers(TEMPLATES["SmolLM2"])
    with pytest.raises(InputError, match="message"):
        ours.chat(messages)


def test_a_template_that_hides_the_text_is_refused(tiny_llama_package, tmp_path):
    import edgeprompt

    folder = shutil.copytree(tiny_llama_package, tmp_path / "package")
    (folder / "chat_template.jinja").write_text("hello")
    with edgeprompt.load(folder) as runtime, pytest.raises(UnsupportedError, match="leave out chat"):
        runtime.generate("a", chat=True)


@pytest.mark.parametrize("source", [TEMPLATES["Llama 3"], TEMPLATES["Gemma"], "{{ messages[0].content * 2 }}"])
@pytest.mark.parametrize("soft", [False, True])
def test_the_engine_encodes_what_transformers_encodes(tokenizers, source, soft):
    from edgeprompt.engines.decoder.engine import DecoderEngine
    from edgeprompt.prompts.template import Template

    ours, theirs = tokenizers(source)
    engine = object.__new__(DecoderEngine)
    engine._tokenizer = ours
    template = engine._chat(Template.parse("{prompt}{text}" if soft else "{text}"), ())
    virtual = 3 if soft else 0
    settings = {"num_virtual_tokens": virtual, "first_virtual_id": 10_000, "add_special_tokens": False}
    expected = theirs.apply_chat_template(USER, add_generation_prompt=True, return_dict=False)
    lead = list(range(10_000, 10_000 + virtual))
    ids = template.encode(ours, {"text": USER[0]["content"]}, **settings)
    assert ids == [*lead, *expected]
    cut = template.encode(ours, {"text": USER[0]["content"]}, max_length=len(ids) - 2, **settings)
    assert len(cut) <= len(ids) - 2
    assert cut[:virtual] == lead
