"""Many labels of several tokens: scored in parts, with the numbers and gradients of one pass, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeprompt.base.geometry import geometry_of
from edgeprompt.base.load import load_base
from edgeprompt.prompts.verbalizer import Verbalizer
from edgeprompt.tuning import TuneOptions, objectives
from edgeprompt.tuning.causal import CausalPrompt
from edgeprompt.tuning.objectives import WordClassify
from edgeprompt.tuning.seq2seq import Seq2SeqPrompt
from edgeprompt.tuning.soft_prompt import SoftPrompt
from edgeprompt.tuning.verbalizer import LabelWords

TEXTS = [[3, 77, 200, 9], [5, 6, 7, 8, 400, 401], [11, 12]]


def labels(count: int) -> Verbalizer:
    words = [(10 + index % 90, 100 + index // 7, 200 + index % 300)[: 1 + index % 3] for index in range(count)]
    unique = list(dict.fromkeys(words))
    return Verbalizer(tuple(map(str, range(len(unique)))), tuple(unique), tuple(range(len(unique))))


def scored(model: Any, count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    objective = WordClassify.__new__(WordClassify)
    objective._model, objective.words = model, LabelWords(labels(count))
    virtual = [] if model.soft.is_prefix else list(range(512, 516))
    scores = objective.scores([[*virtual, *text] for text in TEXTS])
    model.zero_grad()
    torch.nn.functional.cross_entropy(scores, torch.tensor([0, 1, 2])).backward()
    return scores.detach(), [value.grad.clone() for value in model.soft.parameters() if value.grad is not None]


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_parts_have_the_numbers_and_gradients_of_one_pass(
    kind: str,
    method: str,
    tiny_llama_base: Path,
    seq2seq_base: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = load_base(tiny_llama_base if kind == "decoder" else seq2seq_base("T5"))
    torch.manual_seed(0)
    options = TuneOptions(num_virtual_tokens=4, method=method)
    task = "CAUSAL_LM" if kind == "decoder" else "SEQ_2_SEQ_LM"
    soft = SoftPrompt(geometry_of(loaded.config), options, task_type=task)
    model: Any = (
        CausalPrompt(loaded.model, soft, vocab_size=512, prompt_leads=True)
        if kind == "decoder"
        else Seq2SeqPrompt(loaded.model, soft, vocab_size=512, start=[1])
    )
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    with monkeypatch.context() as patch:
        patch.setattr(objectives, "_ROWS", 10**9)
        whole, gradients = scored(model, 60)
    found, others = scored(model, 60)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-4)
    assert gradients
    for gradient, other in zip(gradients, others, strict=True):
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(other, gradient, rtol=1e-3, atol=1e-5)


def test_a_thousand_labels_never_hold_the_logits_of_all(tiny_llama_base: Path) -> None:
    loaded = load_base(tiny_llama_base)
    soft = SoftPrompt(geometry_of(loaded.config), TuneOptions(num_virtual_tokens=4), task_type="CAUSAL_LM")
    model = CausalPrompt(loaded.model, soft, vocab_size=512, prompt_leads=True)
    asked: list[int] = []
    plain = model.logits

    def logits(texts: Any, answers: Any, shared: Any = None) -> torch.Tensor:
        asked.append(sum(map(len, answers)))
        return plain(texts, answers, shared)

    model.logits = logits  # type: ignore[method-assign]
    scores, gradients = scored(model, 1000)
    assert scores.shape[1] > 500
    assert bool(torch.isfinite(scores).all())
    assert gradients
    assert max(asked) <= 64
