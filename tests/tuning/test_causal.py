"""The frozen decoder with a prompt: the same numbers and gradients as PEFT, whatever the padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeprompt.base.geometry import geometry_of
from edgeprompt.base.load import load_base
from edgeprompt.errors import InputError
from edgeprompt.prompts.verbalizer import Verbalizer
from edgeprompt.tuning.causal import CausalPrompt
from edgeprompt.tuning.options import TuneOptions
from edgeprompt.tuning.soft_prompt import SoftPrompt
from edgeprompt.tuning.verbalizer import LabelWords
from tests.support import decoder_models

VOCABULARY = 512
COUNT = 5
VIRTUAL = list(range(VOCABULARY, VOCABULARY + COUNT))
ROWS = [[3, 77, 200, 9], [5, 6, 7, 8, 400, 401, 402], [11, 12]]
METHODS = [
    {"method": "prompt-tuning"},
    {"method": "p-tuning"},
    {"method": "p-tuning", "encoder": "lstm"},
    {"method": "prefix-tuning"},
    {"method": "prefix-tuning", "projection": True},
    {"method": "p-tuning-v2"},
]


@pytest.fixture(params=["tiny_llama_base", "tiny_gpt2_base"])
def loaded(request: pytest.FixtureRequest) -> Any:
    return load_base(request.getfixturevalue(request.param))


def prompted(loaded: Any, **options: Any) -> CausalPrompt:
    torch.manual_seed(1)
    options.setdefault("num_virtual_tokens", COUNT)
    soft = SoftPrompt(geometry_of(loaded.config), TuneOptions(**options), task_type="CAUSAL_LM")
    return CausalPrompt(loaded.model, soft, vocab_size=VOCABULARY, prompt_leads=True)


def with_virtual(model: CausalPrompt, rows: list[list[int]]) -> list[list[int]]:
    return rows if model.soft.is_prefix else [[*VIRTUAL, *row] for row in rows]


@pytest.mark.parametrize("options", METHODS, ids=lambda options: "-".join(map(str, options.values())))
def test_logits_and_gradients_equal_peft(loaded: Any, options: dict[str, Any]) -> None:
    model = prompted(loaded, **options)
    rows = with_virtual(model, ROWS)
    ours = model.logits(rows, [[[]]] * len(rows))
    ours.log_softmax(-1)[:, 7].sum().backward()
    gradients = {name: value.grad.clone() for name, value in model.soft.encoder.named_parameters()}
    model.soft.encoder.zero_grad()

    # PEFT row by row, so that none of its padding traps can matter.
    peft = model.soft.as_peft(loaded.model).eval()
    theirs = torch.cat([peft(input_ids=torch.tensor([row])).logits[:, -1] for row in ROWS])
    theirs.log_softmax(-1)[:, 7].sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.detach().abs().max()))
    for name, value in model.soft.encoder.named_parameters():
        scale = float(value.grad.abs().max())
        assert scale > 0
        torch.testing.assert_close(gradients[name], value.grad, rtol=0, atol=1e-4 * scale)


def test_padded_rows_equal_rows_alone(loaded: Any) -> None:
    model = prompted(loaded)
    rows = with_virtual(model, ROWS)
    answers = [[[7], [8, 9, 10]], [[]], [[4, 4, 4, 4, 4]]]
    together = model.logits(rows, answers)
    alone = torch.cat([model.logits([row], [several]) for row, several in zip(rows, answers, strict=True)])
    assert len(together) == 2 + 4 + 1 + 6
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5 * float(alone.detach().abs().max()))


def test_prompt_in_front_equals_the_same_prompt_as_ordinary_rows(loaded: Any) -> None:
    model = prompted(loaded)
    rows = with_virtual(model, ROWS)
    shared = model.logits(rows, [[[]]] * len(rows))
    model._leads = False
    unshared = model.logits(rows, [[[]]] * len(rows))
    torch.testing.assert_close(shared, unshared, rtol=0, atol=2e-5 * float(shared.detach().abs().max()))


def test_prompt_inside_the_text_sees_its_place(loaded: Any) -> None:
    model = prompted(loaded)
    model._leads = False
    row = [3, 77, *VIRTUAL, 200, 9]
    embedding = loaded.model.get_input_embeddings()
    embedded = torch.cat([embedding(torch.tensor([3, 77])), model.soft(), embedding(torch.tensor([200, 9]))])
    expected = loaded.model(inputs_embeds=embedded[None]).logits[0, -1]
    found = model.logits([row, [1, 2, 3]], [[[]], [[9, 9]]])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.detach().abs().max()))


@pytest.fixture(params=decoder_models.CONFIGS)
def family(request: pytest.FixtureRequest) -> Any:
    return decoder_models.loaded_decoder(request.param)


def infix_of(loaded: Any) -> CausalPrompt:
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    model = prompted(loaded, method="prefix-tuning")
    vocab = loaded.config.vocab_size
    return CausalPrompt(loaded.model, model.soft, vocab_size=vocab, prompt_leads=False)


def virtual(model: CausalPrompt) -> list[int]:
    return list(range(model.vocab_size, model.vocab_size + COUNT))


def test_an_infix_is_read_by_what_stands_behind_it(family: Any) -> None:
    from transformers import DynamicCache

    loaded, model = family, infix_of(family)
    rows = [[*row, *virtual(model), *[9, 10, 11][index % 3 :]] for index, row in enumerate([*ROWS, []])]
    answers = [[[7], [8, 9, 10]], [[]], [[4, 4, 4]], [[]]]
    found = model.logits(rows, answers)
    found.log_softmax(-1)[:, 7].sum().backward()
    assert all(float(value.grad.abs().max()) > 0 for value in model.soft.encoder.parameters())
    expected = []
    for row, several in zip(rows, answers, strict=True):
        start = row.index(model.vocab_size)
        for answer in several:
            cache, rest = DynamicCache(), [*row[start + COUNT :], *answer]
            with torch.no_grad():
                if start:
                    loaded.model(torch.tensor([row[:start]]), past_key_values=cache)
                for layer, (key, value) in enumerate(model.soft()):
                    cache.update(key[None], value[None], layer)
                logits = loaded.model(torch.tensor([rest]), past_key_values=cache).logits[0]
            expected.append(logits[-len(answer) - 1 :])
    whole = torch.cat(expected)
    torch.testing.assert_close(found, whole, rtol=0, atol=2e-5 * float(whole.abs().max()))


def test_an_infix_that_no_token_follows_is_refused(loaded: Any) -> None:
    model = infix_of(loaded)
    with pytest.raises(InputError, match=r"no token behind \{prompt\}"):
        model.logits([[3, *VIRTUAL, 9], [3, 4, *VIRTUAL]], [[[]], [[]]])


def test_an_infix_begins_texts_that_answers_go_on(loaded: Any) -> None:
    model = infix_of(loaded)
    rows = [[*row, *VIRTUAL, 9, 10, 11] for row in ROWS]
    with torch.no_grad():
        whole = model.logits(rows, [[[7, 8]]] * 3).view(3, 3, -1)
        first, states = model.begin(rows)
        torch.testing.assert_close(first, whole[:, 0], rtol=0, atol=1e-4)
        for state, expected in zip(states, whole, strict=True):
            torch.testing.assert_close(model.go_on(state, [[7, 8]]), expected[1:], rtol=0, atol=1e-4)
        alike = [rows[0], [3, 4, *VIRTUAL, 1, 2, 9, 10, 11]]  # of one length, the infix in other places
        logits, state = model.open(alike)
        following = model.step(state, torch.tensor([7, 7]))
        expected = model.logits(alike, [[[7]]] * 2).view(2, 2, -1)
        torch.testing.assert_close(torch.stack([logits, following], 1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", METHODS, ids=lambda options: "-".join(map(str, options.values())))
def test_every_encoder_can_start_from_given_vectors(loaded: Any, options: dict[str, Any]) -> None:
    model = prompted(loaded, **options)
    target = torch.randn(model.soft().shape)
    model.soft.start_from(target)
    np.testing.assert_allclose(model.soft.array(), target.numpy(), atol=2e-4)


def test_a_prefix_from_text_is_the_text(loaded: Any) -> None:
    model = prompted(loaded, method="prefix-tuning")
    text = torch.tensor([21, 22, 23, 24, 25])
    model.soft.start_from(model.start_prefix(text.tolist()))
    expected = loaded.model(input_ids=torch.tensor([[*text.tolist(), *ROWS[0]]])).logits[0, -1]
    found = model.logits([ROWS[0]], [[[]]])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.detach().abs().max()))


def test_base_has_no_gradient_and_no_dropout(loaded: Any) -> None:
    model = prompted(loaded)
    model.train()
    assert not any(module.training for module in model.base.modules())
    rows = with_virtual(model, ROWS)
    model.logits(rows, [[[]]] * len(rows)).sum().backward()
    assert all(parameter.grad is None for parameter in model.base.parameters())


LABELS = [[[5], [6, 7]], [[6, 8, 9]], [[10, 11], [5, 4]]]
VERBALIZER = Verbalizer(
    labels=("a", "b", "c"),
    words=tuple(tuple(word) for words in LABELS for word in words),
    owner=(0, 0, 1, 2, 2),
)


def test_label_scores_equal_the_definition(tiny_llama_base: Path) -> None:
    model = prompted(load_base(tiny_llama_base))
    words = LabelWords(VERBALIZER)
    assert words.stems == [(5,), (10,), (6, 8)]
    rows = with_virtual(model, ROWS)
    found = words.scores(model.logits(rows, [words.stems] * len(rows)).view(len(rows), words.num_positions, -1))
    peft = model.soft.as_peft(model.base).eval()
    for index, row in enumerate(ROWS):
        for label, choices in enumerate(LABELS):
            total = 0.0
            for word in choices:
                probability = 1.0
                for place, token in enumerate(word):
                    logits = peft(input_ids=torch.tensor([[*row, *word[:place]]])).logits[0, -1]
                    probability *= float(logits.detach().double().softmax(-1)[token])
                total += probability
            assert float(found[index, label].detach()) == pytest.approx(np.log(total), rel=1e-4)


def test_label_scores_have_finite_gradients() -> None:
    words = LabelWords(VERBALIZER)
    logits = torch.randn(2, words.num_positions, 20, requires_grad=True)
    torch.nn.functional.cross_entropy(words.scores(logits), torch.tensor([0, 2])).backward()
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())
    assert float(logits.grad.abs().max()) > 0
