"""What PEFT itself does not run on encoder-decoders, and the importer therefore refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.exporters.importers.comparison import IDS
from tests.exporters.importers.peft_adapters import tuned


@pytest.mark.parametrize(
    ("base", "kind", "method"),
    [
        ("t5", "SEQ_CLS", "prompt tuning"),
        ("t5", "SEQ_CLS", "prefix tuning"),
        ("t5", "QUESTION_ANS", "prompt tuning"),
        ("t5", "TOKEN_CLS", "prefix tuning"),
    ],
)
def test_what_peft_cannot_run(base: str, kind: str, method: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Heads on encoder-decoders: why they are refused."""
    import torch

    autos = {
        "SEQ_CLS": "AutoModelForSequenceClassification",
        "QUESTION_ANS": "AutoModelForQuestionAnswering",
        "TOKEN_CLS": "AutoModelForTokenClassification",
    }
    text = torch.tensor([[*IDS[0], 1]])
    with pytest.raises((NotImplementedError, ValueError, TypeError, IndexError)):
        model = tuned(tmp_path / "adapter", bases[base], autos[kind], method, kind)
        model(input_ids=text, attention_mask=torch.ones_like(text))


def test_peft_ignores_a_prefix_for_questions_to_an_encoder_decoder(bases: dict[str, Path], tmp_path: Path) -> None:
    import torch

    model = tuned(tmp_path / "adapter", bases["t5"], "AutoModelForQuestionAnswering", "prefix tuning", "QUESTION_ANS")
    text = torch.tensor([[*IDS[0], 1]])
    scores = []
    with torch.no_grad():
        for _ in range(2):
            scores.append(model(input_ids=text, attention_mask=torch.ones_like(text)).start_logits)
            model.prompt_encoder["default"].embedding.weight.mul_(5)
    assert torch.equal(*scores)
