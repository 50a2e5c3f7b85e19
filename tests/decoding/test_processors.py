"""generation_config's rules against transformers: processed scores, and whole answers of small random models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeprompt
from edgeprompt.decoding.processors import Processors, generation_fields
from edgeprompt.errors import InputError
from tests.support.runtimes import QUIET

RULES: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "no_repeat_token": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[5], [7, 9], [3, 4, 11], [0]]},
    "min_length": {"min_length": 9},
    "min_new_tokens": {"min_new_tokens": 5},
    "forced_bos_token_id": {"forced_bos_token_id": 4},
    "forced_eos_token_id": {"forced_eos_token_id": [0]},
    "suppress_tokens": {"suppress_tokens": [2, 6, 8]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [1, 2, 3, 12]},
}
RULES["all"] = {name: value for rule in RULES.values() for name, value in rule.items()}


@pytest.mark.parametrize("rule", RULES)
def test_processed_scores_are_those_of_transformers(rule: str) -> None:
    import torch
    from transformers import GenerationConfig, GenerationMixin

    class Stub(GenerationMixin):
        class config:  # noqa: N801
            is_encoder_decoder = False

    rng = np.random.default_rng(3)
    for length in (1, 4):
        history = rng.integers(1, 13, length).tolist()
        config = GenerationConfig(**RULES[rule], eos_token_id=[0], pad_token_id=0, max_length=length + 8)
        config._eos_token_tensor = torch.tensor([0])
        theirs = Stub()._get_logits_processor(config, input_ids_seq_length=length)
        ours = Processors(generation_fields(RULES[rule]), history, [0], 8)
        answer: list[int] = []
        for _ in range(8):
            scores = rng.normal(size=13).astype(np.float32)
            expected = theirs(torch.tensor([[*history, *answer]]), torch.from_numpy(scores.copy())[None])[0].numpy()
            found = ours(scores, answer, penalise=True)
            np.testing.assert_allclose(found, expected, rtol=1e-6)
            answer.append(int(rng.integers(1, 13)))


def with_generation(package: Path, folder: Path, generation: dict[str, Any]) -> Path:
    target = folder / "package"
    shutil.copytree(package, target)
    manifest = json.loads((target / "edgeprompt.json").read_text(encoding="utf-8"))
    manifest["generation"] = generation
    (target / "edgeprompt.json").write_text(json.dumps(manifest), encoding="utf-8")
    return target


END_TO_END = {
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3, "min_new_tokens": 6},
    "bans": {"suppress_tokens": list(range(100, 300)), "begin_suppress_tokens": list(range(50)), "min_length": 9},
}


@pytest.mark.parametrize("rules", END_TO_END)
def test_a_decoder_says_what_model_generate_says(
    rules: str, tiny_llama_package: Path, tiny_llama_base: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_base).eval()
    fields = END_TO_END[rules]
    package = with_generation(tiny_llama_package, tmp_path, fields)
    with edgeprompt.load(package, options=QUIET) as runtime:
        ids = runtime._package.tokenizer.encode("the film was the film")
        found = runtime.generate(input_ids=ids, max_new_tokens=24)
        expected = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=1, **fields)
        tokens = expected[0, len(ids) :].tolist()
        assert list(found.token_ids) == (tokens[: tokens.index(0)] if 0 in tokens else tokens)
        plain = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=1)
        assert plain[0, len(ids) :].tolist() != tokens
        choice = runtime.generate(input_ids=ids, choices=[" good", " bad"])
        with edgeprompt.load(tiny_llama_package, options=QUIET) as bare:
            assert choice.token_ids == bare.generate(input_ids=ids, choices=[" good", " bad"]).token_ids


FORCED = {"forced_bos_token_id": 60, "min_new_tokens": 30, "suppress_tokens": [61, 62]}
"""The end (added by the test) is forced though `min_new_tokens` forbids ends: tokens are forced behind the bans."""


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("rules", [*END_TO_END, "forced"])
def test_an_encoder_decoder_says_what_model_generate_says(
    rules: str,
    beams: int,
    seq2seq_package: Callable[..., Path],
    seq2seq_base: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    import torch
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(seq2seq_base("T5")).eval()
    eos = model.generation_config.eos_token_id
    fields = {**FORCED, "forced_eos_token_id": [eos]} if rules == "forced" else END_TO_END[rules]
    with edgeprompt.load(with_generation(seq2seq_package("T5"), tmp_path, fields), options=QUIET) as runtime:
        ids = runtime._package.tokenizer.encode("the film was the film")
        found = runtime.generate(input_ids=ids, max_new_tokens=20, num_beams=beams)
        expected = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, num_beams=beams, **fields)[
            0, 1:
        ].tolist()
        while expected and expected[-1] in (*runtime.manifest.tokens.eos, runtime.manifest.tokens.pad):
            expected.pop()
        assert list(found.token_ids) == expected


def test_a_prompts_fields_come_before_the_bases_and_are_checked() -> None:
    merged = generation_fields({"min_length": 4, "suppress_tokens": [1]}, {"min_length": 2, "temperature": 0.5})
    assert merged == {"min_length": 2, "suppress_tokens": [1]}
    with pytest.raises(InputError, match=r"generation.min_length has -1"):
        generation_fields({"min_length": -1})


def test_a_forced_token_that_does_not_exist_is_told() -> None:
    with pytest.raises(InputError, match="forced token 13 is none of the base's 13"):
        Processors({"forced_bos_token_id": 13}, [0], [0], 8)(np.zeros(13, np.float32), [])
