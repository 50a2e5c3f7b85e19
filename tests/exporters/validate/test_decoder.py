"""Every decoder family: the exported graph computes what PyTorch (and PEFT) compute, and a broken one is refused.

`EDGEPROMPT_WRITE_DOCS=1 pytest tests/exporters/validate/test_decoder.py` writes the table in docs/.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgeprompt import names
from edgeprompt.base.decoder_graph import DecoderGraph, reference_logits
from edgeprompt.base.families import find_family, known_families
from edgeprompt.base.geometry import geometry_of
from edgeprompt.errors import BaseMismatchError, ExportError, InputError, UnsupportedError, ValidationError
from edgeprompt.package.folder import open_package
from edgeprompt.tuning.options import TuneOptions
from edgeprompt.tuning.soft_prompt import SoftPrompt
from exporters import ExportReport, export_model, validate_package
from tests.support.decoder_models import CONFIGS, WINDOWED, loaded_decoder

TABLE = Path(__file__).parents[3] / "docs/parity-decoder-families.md"
METHODS: Mapping[str, Mapping[str, Any]] = {
    "prompt tuning": {},
    "P-tuning, MLP": {"method": "p-tuning"},
    "P-tuning, LSTM": {"method": "p-tuning", "encoder": "lstm"},
    "prefix tuning": {"method": "prefix-tuning"},
    "prefix, projected": {"method": "prefix-tuning", "projection": True},
}
GENAI = ("llama", "qwen2", "qwen3")
TOKENS, NEW_TOKENS = (5, 77, 200, 9, 31), 6

Export = Callable[..., tuple[Any, ExportReport]]
Cell = Callable[[str, str], str]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """`exported(model_type, route)`: a tiny model and the report of its fp32 export, made once."""

    def export(model_type: str, route: str = "torch") -> tuple[Any, ExportReport]:
        loaded = loaded_decoder(model_type)
        folder = tmp_path_factory.mktemp(f"{model_type}-{route}") / "package"
        return loaded, export_model(loaded, folder, route=route)

    return cache(export)


@pytest.fixture(scope="module")
def cell(exported: Export) -> Cell:
    """What the table says of a family and a check, found out once."""
    return cache(lambda model_type, check: find(exported, model_type, check))


def find(exported: Export, model_type: str, check: str) -> str:
    """One cell of the table; raises where the package and PyTorch differ."""
    if check == "genai route" and model_type not in GENAI:
        return "rejected: sliding window" if find_family(model_type).genai else "not used"
    loaded, report = exported(model_type, "genai" if check == "genai route" else "torch")
    if check in METHODS:
        return compare_with_peft(loaded, report, METHODS[check])
    measured = report.validation
    assert measured["max_difference"] < 1e-4 * measured["logit_scale"]
    assert measured["greedy_agreement"] == 1
    if check == "sliding window" and model_type not in WINDOWED:
        return "none"
    return "exact"


def compare_with_peft(loaded: Any, report: ExportReport, method: Mapping[str, Any]) -> str:
    """Greedy tokens and every step's logits behind PEFT's own prompt, fed to the graph as its prompt rows or cache."""
    torch.manual_seed(1)
    soft = SoftPrompt(geometry_of(loaded.config), TuneOptions(num_virtual_tokens=4, **method), task_type="CAUSAL_LM")
    soft.start_from(torch.randn(soft().shape) * (1 if soft.is_prefix else 0.3))
    try:
        peft = soft.as_peft(loaded.model).eval()
    except UnsupportedError:
        return "not in PEFT"
    graph = DecoderGraph(report.path, report.manifest)
    array, past = soft.array(), graph.empty_past()
    vocab, rows = report.manifest.geometry.vocab_size, np.zeros((1, report.manifest.geometry.hidden_size), np.float32)
    ids = np.array([TOKENS])
    fed = ids
    if soft.is_prefix:
        past = {
            names.past(layer, part): array[layer, at][None]
            for layer in range(len(array))
            for at, part in enumerate(("key", "value"))
        }
    else:
        rows, fed = array, np.concatenate([vocab + np.arange(len(array))[None], ids], axis=1)
    length = soft.num_virtual_tokens if soft.is_prefix else 0
    for _ in range(NEW_TOKENS):
        length += fed.shape[1]
        logits, past = graph.run(fed, np.ones((1, length), np.int64), past, rows)
        with torch.no_grad():
            want = peft(input_ids=torch.from_numpy(ids)).logits[0, -1, :vocab].numpy()
        assert np.abs(logits[0] - want).max() <= 1e-3 * np.abs(want).max()
        assert logits[0].argmax() == want.argmax()
        fed = want.argmax()[None, None]
        ids = np.concatenate([ids, fed], axis=1)
    return "exact"


def test_every_decoder_family_has_a_tiny_model() -> None:
    decoders = {name for name in known_families() if find_family(name).architecture == names.DECODER_ONLY}
    assert decoders == set(CONFIGS)


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_torch_route_is_exact(exported: Export, cell: Cell, model_type: str) -> None:
    assert cell(model_type, "torch route") == "exact"
    loaded, report = exported(model_type)
    # One pass, pieces on top of a past, a ragged batch; virtual rows in front and inside; a window exceeded.
    assert report.validation["comparisons"] == (13 if model_type in WINDOWED else 10)
    operators = [node.op_type for node in ir.load(report.path / "model.onnx").graph]
    assert operators.count("GroupQueryAttention") == report.manifest.geometry.num_layers
    # What stood in for attention, norms and positions is gone again.
    again = loaded_decoder(model_type).model
    ids = np.arange(5, 15, dtype=np.int64)
    rows = np.zeros((1, report.manifest.geometry.hidden_size), np.float32)
    assert np.array_equal(reference_logits(loaded.model, ids, rows), reference_logits(again, ids, rows))


@pytest.mark.parametrize("model_type", GENAI)
def test_genai_route_is_exact(exported: Export, cell: Cell, model_type: str) -> None:
    assert cell(model_type, "genai route") == "exact"
    _, report = exported(model_type, "genai")
    assert report.manifest.route == "genai"
    assert (report.path / "genai_config.json").exists()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_prompts_compute_what_peft_computes(cell: Cell, model_type: str, method: str) -> None:
    assert cell(model_type, method) == "exact"


def test_the_committed_table_is_what_was_found(cell: Cell) -> None:
    checks = ("torch route", "genai route", "sliding window", *METHODS)
    lines = [
        "# Decoders: which families compute what PyTorch and PEFT compute",
        "",
        "Written by `tests/exporters/validate/test_decoder.py`, on small random models at fp32.",
        "",
        "- *exact* for a route: the logits are within 1e-4 of their scale of PyTorch's, and greedy tokens are",
        "  equal. This holds in one pass, in pieces on top of a past, and in a batch of sequences of different",
        "  length, padded on the right, with virtual tokens in front and inside.",
        "- *exact* for a sliding window: the same for a text that exceeds the window. *none*: the family has no",
        "  window.",
        "- *exact* for a method: the logits of every greedy step are within 1e-3 of their scale of the PEFT",
        "  model's, and the tokens are equal.",
        "- *rejected*: the genai route writes full attention, so a base with a window goes through the torch route.",
        "",
        "| family | " + " | ".join(checks) + " |",
        "| --- |" + " --- |" * len(checks),
        *(f"| {name} | " + " | ".join(cell(name, check) for check in checks) + " |" for name in sorted(CONFIGS)),
        "",
    ]
    text = "\n".join(lines)
    if os.environ.get("EDGEPROMPT_WRITE_DOCS"):
        TABLE.write_text(text, encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("model_type", WINDOWED)
def test_genai_route_refuses_what_it_would_write_wrong(model_type: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--route torch"):
        export_model(loaded_decoder(model_type), tmp_path / "package", route="genai")
    assert list(tmp_path.iterdir()) == []


# Each precision and each of the families at once; the other pairs take as many traces again.
QUICK = (("gpt2", "fp16"), ("llama", "int8"), ("bloom", "int4"))


@pytest.mark.parametrize(
    ("model_type", "precision"),
    [
        pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow)
        for pair in itertools.product(("gpt2", "llama", "bloom"), ("fp16", "int8", "int4"))
    ],
)
def test_precisions(model_type: str, precision: str, tmp_path: Path) -> None:
    report = export_model(loaded_decoder(model_type), tmp_path / "package", route="torch", precision=precision)
    assert report.validation["mean_correlation"] > {"fp16": 0.9999, "int8": 0.99, "int4": 0.9}[precision]
    open_package(tmp_path / "package").verify()


@pytest.mark.parametrize("block_size", [64, 128])
def test_larger_blocks(block_size: int, tmp_path: Path) -> None:
    report = export_model(loaded_decoder("llama"), tmp_path / "package", precision="int4", block_size=block_size)
    assert report.validation["mean_correlation"] > 0.9
    assert report.manifest.extra["block_size"] == block_size
    blocks = {record["block"] for record in report.manifest.extra["weights"] if record["bits"] == 4}
    assert blocks
    assert max(blocks) <= block_size
    assert not any(record["offsets"] for record in report.manifest.extra["weights"])


def test_blocks_are_for_int4(tmp_path: Path) -> None:
    for options in ({"precision": "int8"}, {"precision": "int4", "route": "onnx"}, {"precision": "int4", "block": 48}):
        with pytest.raises(InputError, match="block"):
            size = options.pop("block", 64)
            export_model(loaded_decoder("llama"), tmp_path / "package", block_size=size, **options)
    assert list(tmp_path.iterdir()) == []


def test_adapter_door_needs_no_prompt(tmp_path: Path) -> None:
    loaded = loaded_decoder("llama")
    package = export_model(loaded, tmp_path / "package", prompt_input="optional").path
    graph = DecoderGraph(package, open_package(package).manifest)
    ids = np.arange(5, 12, dtype=np.int64)
    feeds = {names.INPUT_IDS: ids[None], names.ATTENTION_MASK: np.ones((1, 7), np.int64), **graph.empty_past()}
    logits = graph.session.run([names.LOGITS], feeds)[0][0, -1]
    want = reference_logits(loaded.model, ids, np.zeros((1, 64), np.float32))
    np.testing.assert_allclose(logits, want, atol=1e-4)


def test_a_wrong_package_is_refused(tmp_path: Path) -> None:
    loaded = loaded_decoder("gpt2")
    package = export_model(loaded, tmp_path / "package").path
    assert validate_package(package, against=loaded)["greedy_agreement"] == 1
    other = loaded_decoder("gpt2")
    other.model.transformer.h[1].mlp.c_fc.weight.data *= 1.5
    with pytest.raises(BaseMismatchError, match="was exported from"):
        validate_package(package, against=other)
    manifest = package / names.MANIFEST  # now the fingerprint says nothing: only the values can tell
    manifest.write_text(manifest.read_text().replace(loaded.base.fingerprint, other.base.fingerprint))
    with pytest.raises(ValidationError, match="differ from PyTorch's"):
        validate_package(package, against=other)
