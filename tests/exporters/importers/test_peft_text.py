"""Converted PEFT adapters asked with text: the spans and the words' labels that PEFT's own scores give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeprompt import Request, load_prompt
from edgeprompt.heads.answers import answer, tag
from exporters import convert_prompt
from tests.exporters.importers.peft_adapters import take_base, tuned


@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
@pytest.mark.parametrize("base", ["bert", "llama", "gpt2"])
def test_peft_answers_from_text(
    base: str, method: str, bases: dict[str, Path], package: Any, runtime: Any, tmp_path: Path
) -> None:
    """The span that PEFT's scores give, read as PEFT trains them."""
    import torch
    from transformers import AutoTokenizer

    model = tuned(tmp_path / "adapter", bases[base], "AutoModelForQuestionAnswering", method, "QUESTION_ANS")
    if base == "llama":
        take_base(model, bases[base])
    convert_prompt(tmp_path / "adapter", tmp_path / "qa.safetensors", base=package(base), name=f"answers {method}")
    served = runtime(base)
    name = served.add_prompt(tmp_path / "qa.safetensors")
    question, context = "was it great ?", "the film is great , the story was bad and the music terrible ."
    encoded = AutoTokenizer.from_pretrained(bases[base])(question, context, return_offsets_mapping=True)
    given = {
        key: torch.tensor([encoded[key]]) for key in ("input_ids", "attention_mask", "token_type_ids") if key in encoded
    }
    ids = given["input_ids"]
    with torch.no_grad():
        out = model(**given)
    scores = torch.stack([out.start_logits[0], out.end_logits[0]], -1)[: ids.shape[1]].numpy()
    places = zip(encoded["offset_mapping"], encoded.sequence_ids(), strict=True)
    want = answer(scores, [span if part == 1 else None for span, part in places], context)
    found = served.run([Request({"question": question, "context": context}, prompt=name)])[0]
    assert (found.text, found.start, found.end) == (want.text, want.start, want.end)
    assert abs(found.score - want.score) < 1e-4


@pytest.mark.parametrize(
    ("base", "method"), [("llama", "prefix tuning"), ("gpt2", "prompt tuning"), ("t5", "prompt tuning")]
)
def test_peft_tags_from_text(
    base: str, method: str, bases: dict[str, Path], package: Any, runtime: Any, tmp_path: Path
) -> None:
    """Labels of words, where the text comes in pieces."""
    import torch
    from transformers import AutoTokenizer

    model = tuned(
        tmp_path / "adapter", bases[base], "AutoModelForTokenClassification", method, "TOKEN_CLS", num_labels=3
    )
    file = tmp_path / "tags.safetensors"
    convert_prompt(tmp_path / "adapter", file, base=package(base), name=f"tags {method}")
    served = runtime(base)
    name = served.add_prompt(file)
    text = "the film is great , the story was bad"
    encoded = AutoTokenizer.from_pretrained(bases[base])(text, return_offsets_mapping=True)
    ids = torch.tensor([encoded["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]
    places = [span if span[1] > span[0] else None for span in encoded["offset_mapping"]]
    want = tag(load_prompt(file), logits.numpy(), places, text)
    found = served.run([Request(text, prompt=name)])[0]
    assert [(word.label, word.text) for word in found.words] == [(word.label, word.text) for word in want.words]
    assert len(found.words) == 9
    for word, expected in zip(found.words, want.words, strict=True):
        assert abs(word.score - expected.score) < 1e-4
