"""The genai route borrows the builder's classes and gives them back."""

import pytest

from edgeprompt.base.families import find_family
from edgeprompt.base.load import LoadedBase
from exporters import export_model
from exporters.routes import genai
from tests.support.damaged import bases


@pytest.fixture
def builder():
    return genai._import_builder()


def test_the_builder_is_as_before(builder, tiny_llama_base, tmp_path):
    classes = {name: value for name, value in vars(builder).items() if isinstance(value, type)}
    methods = dict(vars(builder.LlamaModel.__mro__[-2]))
    export_model(tiny_llama_base, tmp_path / "p", route="genai")
    assert {name: value for name, value in vars(builder).items() if isinstance(value, type)} == classes
    assert dict(vars(builder.LlamaModel.__mro__[-2])) == methods


def test_the_builder_is_as_before_when_it_fails(builder):
    before = builder.LlamaModel
    loaded = LoadedBase("tiny", bases.model("llama"), None, find_family("llama"))
    with pytest.raises(RuntimeError, match="stopped"), genai._handed_over(builder, loaded.model, keep_tokenizer=False):
        assert builder.LlamaModel is not before
        raise RuntimeError("stopped")
    assert builder.LlamaModel is before
