"""Many labels of several tokens: scored in parts, with the numbers and gradients of one pass, in bounded memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeprompt import progress
from edgeprompt.base.geometry import geometry_of
from edgeprompt.base.load import load_base
from edgeprompt.names import DECODER_ONLY
from edgeprompt.prompts.verbalizer import Verbalizer
from edgeprompt.tuning import TuneOptions, objectives, tune
from edgeprompt.tuning.causal import CausalPrompt
from edgeprompt.tuning.objectives import WordClassify
from edgeprompt.tuning.seq2seq import Seq2SeqPrompt
from edgeprompt.tuning.soft_prompt import SoftPrompt
from edgeprompt.tuning.verbalizer import LabelWords
from tests.support import decoder_models

COUNT = 4
TEXTS = [[3, 77, 200, 9], [5, 6, 7, 8, 400, 401], [11, 12]]


def labels(count: int) -> Verbalizer:
    words = [(10 + index % 90, 100 + index // 7, 200 + index % 300)[: 1 + index % 3] for index in range(count)]
    unique = list(dict.fromkeys(words))
    return Verbalizer(tuple(map(str, range(len(unique)))), tuple(unique), tuple(range(len(unique))))


def scored(model: Any, count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    objective = WordClassify.__new__(WordClassify)
    objective._model, objective.words = model, LabelWords(labels(count))
    leads = getattr(model, "_leads", True)
    virtual = [] if model.soft.is_prefix and leads else list(range(model.vocab_size, model.vocab_size + COUNT))
    inside = 0 if leads else 1
    texts = [[*text[:inside], *virtual, *text[inside:]] for text in TEXTS]
    scores = objective.scores(texts)
    model.zero_grad()
    torch.nn.functional.cross_entropy(scores, torch.tensor([0, 1, 2])).backward()
    return scores.detach(), [value.grad.clone() for value in model.soft.parameters() if value.grad is not None]


def prompted(loaded: Any, method: str, *, leads: bool = True) -> Any:
    torch.manual_seed(0)
    decoder = loaded.family.architecture == DECODER_ONLY
    soft = SoftPrompt(
        geometry_of(loaded.config),
        TuneOptions(num_virtual_tokens=COUNT, method=method),
        task_type="CAUSAL_LM" if decoder else "SEQ_2_SEQ_LM",
    )
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    vocab = loaded.config.vocab_size
    if decoder:
        return CausalPrompt(loaded.model, soft, vocab_size=vocab, prompt_leads=leads)
    return Seq2SeqPrompt(loaded.model, soft, vocab_size=vocab, start=[1])


def check_same(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(objectives, "_ROWS", 10**9)
        whole, gradients = scored(model, 60)
    monkeypatch.setattr(objectives, "_PART_BYTES", 9 * model.bytes_of(10, 2))
    monkeypatch.setattr(model, "logits", None)
    found, others = scored(model, 60)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-4)
    assert gradients
    for gradient, other in zip(gradients, others, strict=True):
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(other, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["prompt-tuning", "behind text", "prefix-tuning", "infix"])
@pytest.mark.parametrize("family", decoder_models.CONFIGS)
def test_decoders_have_the_numbers_and_gradients_of_one_pass(
    family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leads = method in ("prompt-tuning", "prefix-tuning")
    method = {"behind text": "prompt-tuning", "infix": "prefix-tuning"}.get(method, method)
    check_same(prompted(decoder_models.loaded_decoder(family), method, leads=leads), monkeypatch)


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
@pytest.mark.parametrize("family", ["T5", "T5 v1.1, FLAN", "BART", "Marian"])
def test_encoder_decoders_have_the_numbers_and_gradients_of_one_pass(
    family: str, method: str, seq2seq_base: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_same(prompted(load_base(seq2seq_base(family)), method), monkeypatch)


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_a_thousand_labels_compute_a_text_once_and_hold_a_part(
    kind: str, tiny_llama_base: Path, seq2seq_base: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prompted(load_base(tiny_llama_base if kind == "decoder" else seq2seq_base("T5")), "prompt-tuning")
    monkeypatch.setattr(objectives, "_PART_BYTES", 64 * model.bytes_of(10, 2))
    begun: list[int] = []
    asked: list[int] = []
    begin, go_on = model.begin, model.go_on

    def counted_begin(texts: Any, shared: Any = None) -> Any:
        begun.append(len(texts))
        return begin(texts, shared)

    def counted(state: Any, answers: Any) -> torch.Tensor:
        asked.append(len(answers))
        logits: torch.Tensor = go_on(state, answers)
        return logits

    monkeypatch.setattr(model, "begin", counted_begin)
    monkeypatch.setattr(model, "go_on", counted)
    monkeypatch.setattr(model, "logits", None)
    scores, gradients = scored(model, 1000)
    assert scores.shape[1] > 500
    assert bool(torch.isfinite(scores).all())
    assert gradients
    assert begun == [len(TEXTS)]
    assert 1 < max(asked) <= 100


def test_an_evaluation_with_many_labels_is_heard_of(
    tiny_llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "FIRST_S", 0.0)
    monkeypatch.setattr(progress, "LONGEST_S", 0.0)
    names = [f"{one} or the other of {two}" for one in "abcdefghij" for two in "abcdefghij"]
    rows = [{"text": f"text {index}", "label": names[index % 100]} for index in range(300)]
    tune(tiny_llama_base, rows, output=tmp_path / "p.safetensors", options=TuneOptions(steps=1, num_virtual_tokens=2))
    told = capsys.readouterr().err
    for part in ("tuning: ", r"evaluation \d+%, 0:\d\d left", "calibrating: ", r"reading: \d+ rows"):
        assert re.search(part, told), (part, told)


def test_stems_of_like_length_are_computed_together() -> None:
    letters = torch.randint(10, 20, (500, 30), generator=torch.Generator().manual_seed(0)).tolist()
    words = tuple(tuple(word[: 2 + index % 29]) for index, word in enumerate(letters))
    found = LabelWords(Verbalizer(tuple(map(str, range(500))), words, tuple(range(500))))
    parts = found.parts(1 << 40, lambda length: length)
    assert [start for start, _ in parts[1:]] == [end for _, end in parts[:-1]]
    assert (parts[0][0], parts[-1][1]) == (0, len(found.stems))
    computed = sum((end - start) * len(found.stems[end - 1]) for start, end in parts)
    assert computed <= 1.3 * sum(map(len, found.stems))  # as one rectangle it is twice that
    assert [end - start for start, end in found.parts(300, lambda length: 100)][:2] == [3, 3]
    assert [end - start for start, end in found.parts(1, lambda length: 100)] == [1] * len(found.stems)
