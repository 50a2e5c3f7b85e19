"""Templates: written form, stored form, and the ids they give with a real tokenizer."""

import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from edgeprompt.errors import InputError, TemplateError
from edgeprompt.package.tokenizer import Tokenizer
from edgeprompt.prompts.template import Literal, Mask, Slot, Template, VirtualTokens

WORDS = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "was", "great", ":", "mood"]
FIRST = 100


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    model = HfTokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    model.add_special_tokens(["[CLS]", "[SEP]", "[MASK]"])
    model.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"mask_token": {"content": "[MASK]"}}')
    return Tokenizer(folder)


def encode(template, tokenizer, text="the film was great", count=3, **options):
    return Template.parse(template).encode(
        tokenizer, {"text": text}, num_virtual_tokens=count, first_virtual_id=FIRST, **options
    )


@pytest.mark.parametrize(
    "text", ["{prompt}{text}\nSentiment:", "{text}", "{prompt:2}a{{b}} {text} {prompt} {mask}", "{question}|{context}"]
)
def test_written_and_stored_forms_return(text):
    template = Template.parse(text)
    assert str(template) == text
    assert Template.from_json(template.to_json()) == template


def test_parts():
    parts = Template.parse("{prompt:2}It is {mask}: {text}{prompt}").parts
    assert parts == (VirtualTokens(2), Literal("It is "), Mask(), Literal(": "), Slot("text"), VirtualTokens())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{prompt} only", "no slot"),
        ("{text} {", "stray '{'"),
        ("} {text}", "stray '}'"),
        ("{prompt}{prompt}{text}", "twice"),
        ("{prompt:0}{text}", "at least 1"),
        ("{text:3}", "only {prompt:N}"),
        ("{Text}", "no slot"),
    ],
)
def test_bad_templates_are_refused(text, says):
    with pytest.raises(TemplateError, match=says):
        Template.parse(text)


@pytest.mark.parametrize("data", [None, "x", [{"literal": 1}], [{"slot": "text", "x": 1}], [{"other": 1}], [[]]])
def test_bad_stored_forms_are_refused(data):
    with pytest.raises(TemplateError):
        Template.from_json(data)


def test_leading_prompt_stands_before_special_tokens(tokenizer):
    assert encode("{prompt}{text} mood :", tokenizer) == [100, 101, 102, 1, 4, 5, 6, 7, 9, 8, 2]


def test_no_prompt_is_the_plain_text(tokenizer):
    assert encode("{prompt}{text}", tokenizer, count=0) == tokenizer.encode("the film was great")


def test_virtual_tokens_inside_and_behind(tokenizer):
    assert encode("{text}{prompt}mood", tokenizer) == [1, 4, 5, 6, 7, 100, 101, 102, 9, 2]
    assert encode("{prompt:1}{text}{prompt}", tokenizer) == [100, 1, 4, 5, 6, 7, 101, 102, 2]
    assert encode("{text}{prompt}", tokenizer) == [1, 4, 5, 6, 7, 100, 101, 102, 2]


def test_mask(tokenizer):
    assert encode("{prompt}{text} {mask}", tokenizer, count=1) == [100, 1, 4, 5, 6, 7, 3, 2]


def test_only_the_slot_is_cut(tokenizer):
    long = "the film was great " * 50
    ids = encode("{prompt}{text} mood :", tokenizer, text=long, max_length=12)
    assert len(ids) == 12
    assert ids[:4] == [100, 101, 102, 1]
    assert ids[-3:] == [9, 8, 2]
    with pytest.raises(InputError, match="at most 6"):
        encode("{prompt}{text} mood :", tokenizer, text=long, max_length=6)


def test_a_missing_field_is_named(tokenizer):
    with pytest.raises(InputError, match="'text'"):
        Template.parse("{text}").encode(tokenizer, {"other": "x"}, num_virtual_tokens=0, first_virtual_id=FIRST)


def test_counts_must_add_up(tokenizer):
    with pytest.raises(TemplateError, match="places 2 virtual tokens"):
        encode("{prompt:2}{text}", tokenizer, count=3)
    with pytest.raises(TemplateError, match="places 4 virtual tokens"):
        encode("{prompt:4}{text}", tokenizer, count=3)


@pytest.mark.parametrize(
    ("written", "advice"),
    [
        ("{prompt}{Title}", "'{Title}' at 8, which is no slot: a name has small letters.*write {title}, or {{Title}}"),
        ("{Two Words}", "write {two_words}, or"),
        ("{1st}", "write {_1st}, or"),
        ("{}", "write {text}, or"),
        ("{prompt:x}{text}", "write {prompt}, or {prompt:4}"),
        ("{text}{", "stray '{' at 6; write {{"),
    ],
)
def test_what_is_no_slot_is_told_with_the_rule(written, advice):
    with pytest.raises(TemplateError, match=advice):
        Template.parse(written)
