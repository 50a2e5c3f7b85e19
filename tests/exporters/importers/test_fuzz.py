"""Random damage to files of every format: either it converts, or it is one clear error; nothing else, nothing left.

EDGEPROMPT_FUZZ is how many mutations of each file to try (default 25); the seed is fixed.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from edgeprompt import load_prompt
from edgeprompt.cli.inspect import describe
from edgeprompt.errors import EdgePromptError
from edgeprompt.package.manifest import Base, Geometry
from exporters import convert_prompt
from exporters.importers.base_facts import read_base_facts
from exporters.importers.foreign import BaseFacts

ROUNDS = int(os.environ.get("EDGEPROMPT_FUZZ", "25"))
GOLDEN = Path(__file__).resolve().parents[2] / "golden/foreign"
TINY = BaseFacts(Base("tiny", "sha256:1"), "decoder-only", "llama", Geometry(60, 16, 3, 4, 2, 4))
RNG = np.random.default_rng(0)


def array(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def peft(folder: Path, tensors: dict[str, Any], *, pickled: bool = False, **config: Any) -> Path:
    folder.mkdir()
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 4,
        "num_transformer_submodules": 1,
        "base_model_name_or_path": "base",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if pickled:
        torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def pickled(file: Path, state: Any) -> Path:
    file.parent.mkdir(exist_ok=True)
    torch.save(state, file)
    return file


def nemo(file: Path, mode: str) -> Path:
    data = io.BytesIO()
    torch.save({"prompt_table": {"prompt_table.a.prompt_embeddings.weight": torch.from_numpy(array(4, 16))}}, data)
    with tarfile.open(file, mode) as tar:
        info = tarfile.TarInfo("./model_weights.ckpt")
        info.size = data.tell()
        data.seek(0)
        tar.addfile(info, data)
    return file


def npy(file: Path, value: Any) -> Path:
    np.save(file, value)
    return file


def own(file: Path) -> Path:
    convert_prompt(npy(file.with_suffix(".npy"), array(4, 16)), file, base=TINY)
    file.with_suffix(".npy").unlink()
    return file


def copied(case: str, home: Path) -> Path:
    shutil.copytree(GOLDEN / case, home / case)
    (home / case / "expected.json").unlink()
    return home / case / "checkpoint.ckpt" if (home / case / "checkpoint.ckpt").exists() else home / case


MULTITASK = {"prompt_embeddings": (4, 16), "prefix_task_cols": (2, 4, 1), "prefix_task_rows": (2, 1, 16)}
PREFIX = {"peft_type": "PREFIX_TUNING", "num_layers": 3, "num_attention_heads": 2, "token_dim": 8}
DELTA = "base_model.model.model.x.trainable_tokens_delta"
SPECIMENS: dict[str, Callable[[Path], Path]] = {
    "peft": lambda d: peft(d / "a", {"prompt_embeddings": array(4, 16)}),
    "peft, .bin": lambda d: peft(d / "a", {"prompt_embeddings": array(4, 16)}, pickled=True),
    "peft, prefix": lambda d: peft(d / "a", {"prompt_embeddings": array(4, 48)}, **PREFIX),
    "peft, multitask": lambda d: peft(
        d / "a", {name: array(*shape) for name, shape in MULTITASK.items()}, peft_type="MULTITASK_PROMPT_TUNING"
    ),
    "peft, head": lambda d: peft(
        d / "a", {"prompt_embeddings": array(4, 16), "base_model.score.weight": array(2, 16)}, task_type="SEQ_CLS"
    ),
    "peft, trainable tokens": lambda d: peft(
        d / "a",
        {DELTA: array(2, 16)},
        peft_type="TRAINABLE_TOKENS",
        token_indices=[3, 7],
        target_modules=["x"],
    ),
    "tgis": lambda d: pickled(d / "id/decoder.pt", torch.from_numpy(array(4, 16))).parent,
    "nemo, tar": lambda d: nemo(d / "x.nemo", "w"),
    "nemo, gz": lambda d: nemo(d / "x.nemo", "w:gz"),
    "nemo, .ckpt": lambda d: pickled(d / "x.ckpt", {"a.inference_table": torch.from_numpy(array(4, 16))}),
    "trtllm": lambda d: npy(d / "x.npy", array(1, 4, 16)),
    "t5x": lambda d: npy(d / "x.npy", array(4, 16)),
    "vllm": lambda d: pickled(d / "x.pt", torch.from_numpy(array(4, 16))),
    "edgeprompt": lambda d: own(d / "x.safetensors"),
    **{
        case.name: (lambda d, case=case.name: copied(case, d))
        for case in sorted(GOLDEN.glob("*-*"))
        if case.name.rpartition("-")[2] in ("gpt2", "bert", "t5", "roberta")
    },
}
VALUES = (None, True, -1, 0, 1, 3, 1 << 63, 1.5, float("nan"), "", "x", "../../x", [], {}, [[]], "a\nb")


def damage(data: bytes, is_json: bool, chance: random.Random) -> bytes:
    """Cut, fill, flip, insert; in JSON also another value, or none, for a key."""
    kind = chance.randrange(6 if is_json else 5)
    at = chance.randrange(len(data))
    if chance.random() < 0.5:
        at = min(at, chance.randrange(512))  # headers are where it matters
    match kind:
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes(min(chance.choice((1, 8, 64, 512)), len(data) - at)) + data[at:][64:]
        case 2:
            changed = bytearray(data)
            for _ in range(chance.choice((1, 1, 4, 32))):
                place = min(len(data) - 1, at + chance.randrange(64))
                changed[place] ^= 1 << chance.randrange(8)
            return bytes(changed)
        case 3:
            return data[:at] + chance.randbytes(chance.choice((1, 8, 100))) + data[at:]
        case 4:
            return data[:at] + struct.pack("<f", chance.choice((float("nan"), float("inf"), 1e38))) + data[at + 4 :]
    config = json.loads(data)
    key = chance.choice(list(config))
    if chance.random() < 0.2:
        del config[key]
    else:
        config[key] = chance.choice(VALUES)
    return json.dumps(config).encode()


def attempt(action: Callable[[], Any]) -> str | None:
    """The message of a clean failure, None for success; any other exception is the test's failure."""
    try:
        action()
    except EdgePromptError as error:
        return str(error)
    return None


@pytest.mark.parametrize("specimen", SPECIMENS)
@pytest.mark.filterwarnings("ignore")  # NumPy warns of overflow in what damage made
def test_damage_is_one_clear_error(specimen: str, tmp_path: Path) -> None:
    home = tmp_path / "in"
    home.mkdir()
    source = SPECIMENS[specimen](home)
    tail = specimen.rpartition("-")[2]
    base = read_base_facts(GOLDEN / tail) if tail in ("gpt2", "bert", "t5", "roberta") else TINY
    target, task = tmp_path / "out/prompt.safetensors", 0 if specimen == "peft, multitask" else None
    how: dict[str, Any] = {"base": base, "task_index": task}
    if specimen.startswith("openprompt") and tail == "bert":  # label words need the place of the mask
        how["template"] = json.loads((GOLDEN / specimen / "expected.json").read_text("utf-8"))["template"]
    if specimen != "openprompt-softverbalizer-gpt2":
        convert_prompt(source, target, **how)
    files = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    chance = random.Random(specimen)
    refused = 0
    for index in range(ROUNDS):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        file = chance.choice(list(files))
        file.write_bytes(damage(files[file], file.suffix == ".json", chance))
        message = attempt(lambda: (convert_prompt(source, target, **how), load_prompt(target)))
        file.write_bytes(files[file])
        if message is not None:
            refused += 1
            assert "\n" not in message, f"mutation {index}"
            assert not (tmp_path / "out").exists(), f"mutation {index}"
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path not in files and path != target]
    assert not left
    assert refused


def test_damaged_adapters_cannot_be_inspected(tmp_path: Path) -> None:
    file = tmp_path / "x.onnx_adapter"
    convert_prompt(npy(tmp_path / "x.npy", array(4, 16)), file)
    whole, chance = file.read_bytes(), random.Random(0)
    for _ in range(ROUNDS):
        file.write_bytes(damage(whole, False, chance))
        assert "\n" not in (attempt(lambda: describe(file)) or "")


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "bart"])
def test_damaged_graphs_are_one_clear_error(name: str, tmp_path: Path) -> None:
    from exporters import export_model

    home = tmp_path / "in"
    shutil.copytree(GOLDEN.parent / "onnx" / name, home)
    files = {path: path.read_bytes() for path in home.iterdir() if path.suffix in (".onnx", ".json")}
    chance, refused = random.Random(name), 0
    for index in range(max(1, ROUNDS // 5)):
        file = chance.choice(list(files))
        file.write_bytes(damage(files[file], file.suffix == ".json", chance))
        message = attempt(lambda: export_model(home, tmp_path / "out", route="onnx", force=True))
        file.write_bytes(files[file])
        if message is not None:
            refused += 1
            assert "\n" not in message, f"mutation {index}"
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert refused
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
