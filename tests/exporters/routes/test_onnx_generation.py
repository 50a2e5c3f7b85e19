"""generation_config through the onnx route: packages of other tools' graphs say what model.generate says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import edgeprompt
from edgeprompt import GenerationOptions, Request
from edgeprompt.engines.decoder.graph import GrowingGraph
from exporters import export_model
from tests.support.runtimes import QUIET

GOLDEN = Path(__file__).resolve().parents[2] / "golden/onnx"
RULES: dict[str, dict[str, Any]] = {
    "penalties": {"repetition_penalty": 1.6, "no_repeat_ngram_size": 2, "min_new_tokens": 6},
    "bans": {
        "suppress_tokens": list(range(100, 400)), "begin_suppress_tokens": list(range(60)), "min_length": 9,
        "bad_words_ids": [[70], [80, 81]],
    },
    "forced": {"forced_bos_token_id": 60, "forced_eos_token_id": 61, "min_new_tokens": 30},
}  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_answers_are_those_of_model_generate(name: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig

    folder = shutil.copytree(GOLDEN / name, tmp_path / "base")
    tiny_tokenizer.save_pretrained(folder)
    pairs = name in ("t5", "bart")
    model = (AutoModelForSeq2SeqLM if pairs else AutoModelForCausalLM).from_pretrained(GOLDEN / name).eval()
    start = model.generation_config.decoder_start_token_id
    ends = {"eos_token_id": 0, "pad_token_id": 1, **({"decoder_start_token_id": start} if pairs else {})}
    said = set()
    for rules, fields in {"none": {}, **RULES}.items():
        GenerationConfig(**ends, **fields).save_pretrained(folder)
        package = export_model(folder, tmp_path / rules, route="onnx").path
        for ids in ([60], [5, 9, 21, 7, 9, 21]):
            with edgeprompt.load(package, options=QUIET) as runtime:
                found = list(runtime.generate(input_ids=ids, max_new_tokens=16).token_ids)
            settings = GenerationConfig(**ends, **fields, max_new_tokens=16, do_sample=False)
            wanted = model.generate(torch.tensor([ids]), generation_config=settings)[0]
            expected = wanted[1 if pairs else len(ids) :].tolist()
            assert found == (expected[: expected.index(0)] if 0 in expected else expected), (rules, ids)
            said.add((len(ids), *found))
    assert len(said) > 4  # the rules change answers


def test_fields_that_are_not_carried_out_are_told(tiny_tokenizer: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "llama", tmp_path / "base")
    tiny_tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "sequence_bias": [[[5], 2.0]]}))
    manifest = export_model(folder, tmp_path / "package", route="onnx").manifest
    (line,) = manifest.extra["generation_notes"]
    assert line.startswith("sequence_bias=")


def test_longrope_graphs_serve_the_positions_of_their_short_factors(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """A graph has the factors that its exporter saw: those of short texts."""
    folder = shutil.copytree(GOLDEN / "llama", tmp_path / "base")
    tiny_tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    scaling = {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]}
    config["rope_parameters"] = {"rope_theta": 10000.0, "original_max_position_embeddings": 24, **scaling}
    (folder / "config.json").write_text(json.dumps(config))
    package = export_model(folder, tmp_path / "package", route="onnx")
    assert package.manifest.geometry.max_positions == 24
    with edgeprompt.load(package.path, options=QUIET) as runtime:
        assert runtime.logits(input_ids=list(range(2, 26))).shape == (512,)
        with pytest.raises(edgeprompt.EdgePromptError, match="24"):
            runtime.logits(input_ids=list(range(2, 27)))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_rows_of_any_length_decode_together(
    name: str, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These graphs take masks and positions, so shorter rows are padded in front."""
    folder = shutil.copytree(GOLDEN / name, tmp_path / "base")
    tiny_tokenizer.save_pretrained(folder)
    package = export_model(folder, tmp_path / "package", route="onnx").path
    real, runs = GrowingGraph._run, list[int]()

    def counted(self: GrowingGraph, rows: Any, ids: Any, *rest: Any) -> Any:
        runs.append(len(rows) if ids.shape[1] == 1 else 0)
        return real(self, rows, ids, *rest)

    monkeypatch.setattr(GrowingGraph, "_run", counted)
    options = [GenerationOptions(max_new_tokens=count, logprobs=True) for count in (12, 3, 9, 7)]
    texts = ([5, 9, 21, 7, 9, 21], [60, 61], list(range(30, 50)), [11, 12, 13])
    asked = [Request(input_ids=ids, task="generate", options=one) for ids, one in zip(texts, options, strict=True)]
    with edgeprompt.load(package, options=QUIET) as runtime:
        alone = [runtime.run([request])[0] for request in asked]
        runs.clear()
        together = runtime.run(asked)
    assert [found.token_ids for found in together] == [found.token_ids for found in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert max(runs) >= 3
    assert sum(runs) == sum(len(found.token_ids) - 1 for found in alone)
