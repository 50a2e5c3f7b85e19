"""Broken and hostile files of every format: one clear error, nothing run, nothing written."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from edgeprompt.errors import (
    BaseMismatchError,
    EdgePromptError,
    InputError,
    SourceError,
    TemplateError,
    UnsupportedError,
)
from edgeprompt.package.manifest import Base, Geometry
from exporters import convert_prompt
from exporters.importers.foreign import BaseFacts
from exporters.importers.openprompt_template import read_template
from tests.support.files import IRREGULAR, make_irregular

BASE = BaseFacts(Base("tiny", "sha256:1"), "decoder-only", "llama", Geometry(60, 16, 3, 4, 2, 4))
BERT = BaseFacts(Base("tiny", "sha256:1"), "encoder-only", "bert", Geometry(60, 16, 3, 4, 4, 4))
T5 = BaseFacts(Base("tiny", "sha256:1"), "encoder-decoder", "t5", Geometry(60, 16, 3, 4, 4, 4, 0, 3))
ROWS = np.ones((4, 16), np.float32)


class Evil:
    """A pickle that would leave a file behind if it were run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def adapter(folder: Path, config: Any = None, weights: bytes | dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    default = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    text = config if isinstance(config, str) else json.dumps({**default, **(config or {})})
    (folder / "adapter_config.json").write_text(text)
    file = folder / "adapter_model.safetensors"
    if isinstance(weights, bytes):
        file.write_bytes(weights)
    elif weights is None or weights:
        save_file(weights or {"prompt_embeddings": ROWS}, file)
    return folder


def npy(path: Path, array: Any, **options: Any) -> Path:
    np.save(path, array, **options)
    return path


def saved(path: Path, state: Any) -> Path:
    torch.save(state, path)
    return path


def tgis(folder: Path, tensor: Any, name: str = "decoder") -> Path:
    folder.mkdir()
    saved(folder / f"{name}.pt", tensor)
    return folder


def nemo(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


HUGE_HEADER = struct.pack("<Q", 1 << 40) + b"{}"
NAN = np.full((4, 16), np.nan, np.float32)
PREFIX = {"peft_type": "PREFIX_TUNING", "num_layers": 3, "num_attention_heads": 2, "token_dim": 8}
IRREGULAR_NAMES = (
    "x.safetensors",
    "x.bin",
    "x.npy",
    "x.nemo",
    "a/adapter_config.json",
    "a/adapter_model.safetensors",
    "a/decoder.pt",
    "a/pytorch_model.bin",
)
Make = Callable[[Path], Path]
CASES: dict[str, tuple[Make, type[EdgePromptError], str]] = {
    "nothing there": (lambda d: d / "no", SourceError, "nothing is at"),
    "unknown folder": (lambda d: d, SourceError, "no known prompt format"),
    "unknown file": (lambda d: written(d / "x.bin", b"abc"), SourceError, "no readable PyTorch file"),
    "empty pickle": (lambda d: written(d / "x.pt", b""), SourceError, "is empty"),
    "peft: config is no JSON": (lambda d: adapter(d / "a", "{"), SourceError, "is no JSON"),
    "peft: config is a list": (lambda d: adapter(d / "a", "[]"), SourceError, "JSON object"),
    "peft: no type": (lambda d: adapter(d / "a", {"peft_type": None}), SourceError, "names no peft_type"),
    "peft: LoRA": (lambda d: adapter(d / "a", {"peft_type": "LORA"}), UnsupportedError, "merge_and_unload"),
    "peft: IA3": (lambda d: adapter(d / "a", {"peft_type": "IA3"}), UnsupportedError, "merge_and_unload"),
    "peft: unknown task": (lambda d: adapter(d / "a", {"task_type": "X"}), SourceError, "task_type"),
    "peft: no weights": (lambda d: adapter(d / "a", None, {}), SourceError, "neither"),
    "peft: truncated": (
        lambda d: adapter(d / "a", None, struct.pack("<Q", 1 << 40) + b"{}"),
        SourceError,
        "safetensors",
    ),
    "peft: other tensor": (lambda d: adapter(d / "a", None, {"x": ROWS}), SourceError, "no prompt_embeddings"),
    "peft: name of two lines": (
        lambda d: adapter(d / "a", None, {"prompt_embeddings": ROWS, "a\nb": ROWS}),
        SourceError,
        "must be printable",
    ),
    "peft: type of two lines": (
        lambda d: adapter(d / "a", {"peft_type": "a\nb"}),
        UnsupportedError,
        "no method of PEFT that is known",
    ),
    "peft: task is a list": (lambda d: adapter(d / "a", {"task_type": [[]]}), SourceError, "task_type"),
    "peft: NaN": (lambda d: adapter(d / "a", None, {"prompt_embeddings": NAN}), SourceError, "NaN or infinity"),
    "peft: integers": (
        lambda d: adapter(d / "a", None, {"prompt_embeddings": ROWS.astype(np.int32)}),
        EdgePromptError,
        "int32",
    ),
    "peft: other width": (
        lambda d: adapter(d / "a", None, {"prompt_embeddings": ROWS[:, :8].copy()}),
        BaseMismatchError,
        "8 values a token, base tiny has 16",
    ),
    "peft: rank 1": (lambda d: adapter(d / "a", None, {"prompt_embeddings": ROWS[0]}), SourceError, "shape"),
    "peft: row count": (lambda d: adapter(d / "a", {"num_virtual_tokens": 7}), SourceError, "7 virtual tokens"),
    "peft: huge count": (lambda d: adapter(d / "a", {"num_virtual_tokens": 1 << 60}), SourceError, "positive number"),
    "peft: prefix does not divide": (
        lambda d: adapter(d / "a", PREFIX, {"prompt_embeddings": np.ones((4, 47), np.float32)}),
        SourceError,
        "token_dim 8, which are 48 values a token",
    ),
    "peft: prefix of other geometry": (
        lambda d: adapter(
            d / "a", {**PREFIX, "num_layers": 2, "token_dim": 12}, {"prompt_embeddings": np.ones((4, 48), np.float32)}
        ),
        BaseMismatchError,
        "2 layers",
    ),
    "peft: no head": (lambda d: adapter(d / "a", {"task_type": "SEQ_CLS"}), SourceError, "needs score.weight"),
    "peft: changed base": (
        lambda d: adapter(d / "a", None, {"prompt_embeddings": ROWS, "base_model.embed_tokens.weight": ROWS}),
        UnsupportedError,
        "as PEFT saves embeddings of a resized vocabulary",
    ),
    "peft: multitask lacks factors": (
        lambda d: adapter(d / "a", {"peft_type": "MULTITASK_PROMPT_TUNING"}),
        SourceError,
        "prefix_task_cols",
    ),
    "npy: pickled": (lambda d: npy(d / "x.npy", np.array([{}]), allow_pickle=True), SourceError, "no readable .npy"),
    "npy: truncated": (lambda d: written(d / "x.npy", b"\x93NUMPY\x01\x00\xff\xff"), SourceError, "no readable .npy"),
    "npy: NaN": (lambda d: npy(d / "x.npy", NAN), SourceError, "NaN or infinity"),
    "npy: complex": (lambda d: npy(d / "x.npy", ROWS.astype(np.complex64)), SourceError, "float tensor"),
    "npy: token ids": (lambda d: npy(d / "x.npy", np.ones((4, 16), int)), SourceError, "floats are needed"),
    "npy: flags": (lambda d: npy(d / "x.npy", ROWS > 0), SourceError, "holds bool"),
    "npy: two arrays": (
        lambda d: written(npy(d / "x.npy", ROWS), (d / "x.npy").read_bytes() * 2),
        SourceError,
        "behind its array",
    ),
    "npy: other width": (lambda d: npy(d / "x.npy", ROWS[:, :8]), BaseMismatchError, "8 values"),
    "npy: rank 4": (lambda d: npy(d / "x.npy", ROWS[None, None]), SourceError, "no known prompt format"),
    "t5x: token ids": (
        lambda d: npy(d / "x.npy", ROWS.astype(np.int64)),
        SourceError,
        "holds int64.*floats are needed",
    ),
    "t5x: no row": (lambda d: npy(d / "x.npy", ROWS[:0]), SourceError, "shape"),
    "t5x: other byte order": (lambda d: npy(d / "x.npy", ROWS.astype(">f4")), SourceError, "float tensor"),
    "tgis: encoder's": (lambda d: tgis(d / "a", torch.ones(4, 16), "encoder"), SourceError, "needs decoder.pt"),
    "tgis: several tensors": (lambda d: tgis(d / "a", {"x": torch.ones(4, 16)}), SourceError, "expected one tensor"),
    "tgis: integers": (lambda d: tgis(d / "a", torch.ones(4, 16, dtype=torch.int8)), SourceError, "holds int8"),
    "tgis: NaN": (lambda d: tgis(d / "a", torch.from_numpy(NAN)), SourceError, "NaN or infinity"),
    "tgis: rank 1": (lambda d: tgis(d / "a", torch.ones(16)), SourceError, "shape"),
    "tgis: other width": (lambda d: tgis(d / "a", torch.ones(4, 8)), BaseMismatchError, "8 values"),
    "tgis: truncated": (
        lambda d: written(tgis(d / "a", torch.ones(4, 16)) / "decoder.pt", b"PK\x03\x04" + bytes(50)).parent,
        SourceError,
        "no readable PyTorch file",
    ),
    "trtllm: integers": (lambda d: npy(d / "x.npy", np.ones((2, 4, 16), np.int8)), SourceError, "holds int8"),
    "vllm: integers": (lambda d: saved(d / "x.pt", torch.ones(4, 16, dtype=torch.int64)), SourceError, "holds int64"),
    "trtllm: empty task": (lambda d: npy(d / "x.npy", np.zeros((2, 4, 16), np.float32)), SourceError, "all zero"),
    "vllm: NaN": (lambda d: saved(d / "x.pt", torch.from_numpy(NAN)), SourceError, "NaN or infinity"),
    "vllm: sparse": (lambda d: saved(d / "x.pt", torch.eye(16).to_sparse()), SourceError, "dense float"),
    "nemo: no tar": (lambda d: written(d / "x.nemo", b"abc"), SourceError, "no readable .nemo"),
    "nemo: no weights": (lambda d: nemo(d / "x.nemo", {"a": b"b"}), SourceError, "has no model_weights"),
    "nemo: broken weights": (
        lambda d: nemo(d / "x.nemo", {"model_weights.ckpt": b"abc"}),
        SourceError,
        "no readable PyTorch file",
    ),
    "openprompt: short Mixed": (
        lambda d: saved(d / "x.ckpt", {"prompt_model.template.soft_embedding.weight": torch.ones(1, 16)}),
        SourceError,
        "no row",
    ),
    "openprompt: LSTM does not fit": (
        lambda d: saved(
            d / "x.ckpt",
            {
                "template.new_embedding.weight": torch.ones(2, 16),
                "template.soft_embedding.weight": torch.ones(3, 16),
                "template.new_lstm_head.weight_ih_l0": torch.ones(3, 3),
            },
        ),
        SourceError,
        "does not fit",
    ),
    "openprompt: prefix lacks its MLP": (
        lambda d: saved(d / "x.ckpt", {"prompt_model.template.decoder_wte.weight": torch.ones(2, 16)}),
        SourceError,
        "control_trans",
    ),
    "p-tuning v2: other geometry": (
        lambda d: saved(d / "x.bin", {"prefix_encoder.embedding.weight": torch.ones(2, 50)}),
        SourceError,
        "not divisible",
    ),
    "p-tuning v2: Prompt model": (
        lambda d: saved(d / "x.bin", {"prefix_encoder.weight": torch.ones(2, 16)}),
        UnsupportedError,
        "PromptFor",
    ),
    "p-tuning v2: MLP lacks a layer": (
        lambda d: saved(
            d / "x.bin",
            {"prefix_encoder.embedding.weight": torch.ones(2, 16), "prefix_encoder.trans.0.weight": torch.ones(2, 16)},
        ),
        SourceError,
        "lacks prefix_encoder.trans.0.bias",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_error(case: str, tmp_path: Path) -> None:
    make, kind, match = CASES[case]
    home = tmp_path / "in"
    home.mkdir()
    source = make(home)
    with pytest.raises(kind, match=match) as caught:
        convert_prompt(source, tmp_path / "out/prompt.safetensors", base=BASE)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", IRREGULAR)
@pytest.mark.parametrize("name", IRREGULAR_NAMES)
def test_only_regular_files_are_read(kind: str, name: str, tmp_path: Path) -> None:
    """In the place of every file that an importer opens; a pipe would be waited for, a device has no end."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if name == "a/adapter_model.safetensors":
        adapter(path.parent, None, {})
    make_irregular(kind, path)
    source = path.parent if name.startswith("a/") else path
    with pytest.raises(SourceError) as caught:
        convert_prompt(source, tmp_path / "out.safetensors", base=BASE)
    assert "\n" not in str(caught.value)
    if kind != "a folder":
        assert f"it is {kind}, and only regular files are read" in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "name", ["x.bin", "x.pt", "x.ckpt", "decoder.pt", "x.nemo", "adapter_model.bin", "pytorch_model.bin"]
)
def test_code_in_a_pickle_is_not_run(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "was-run"
    data = io.BytesIO()
    torch.save({"prompt_embeddings": Evil(mark)}, data)
    source = tmp_path / name
    if name.endswith(".nemo"):
        nemo(source, {"model_weights.ckpt": data.getvalue()})
    elif name.startswith("adapter"):
        source = adapter(tmp_path / "a", None, {})
        (source / name).write_bytes(data.getvalue())
    else:
        source.write_bytes(data.getvalue())
    with pytest.raises(UnsupportedError, match="would run its code"):
        convert_prompt(source, tmp_path / "out.safetensors", base=BASE)
    source = written(tmp_path / "plain.pt", pickle.dumps(Evil(mark)))
    with pytest.raises(EdgePromptError):
        convert_prompt(source, tmp_path / "out.safetensors", base=BASE)
    assert not mark.exists()
    assert not (tmp_path / "out.safetensors").exists()


def test_task_names_stay_inside_the_folder(tmp_path: Path) -> None:
    key = "prompt_table.../../../evil.prompt_embeddings.weight"
    torch.save(
        {key: torch.ones(2, 16), "prompt_table.a.prompt_embeddings.weight": torch.ones(2, 16)}, tmp_path / "x.ckpt"
    )
    convert_prompt(tmp_path / "x.ckpt", tmp_path / "out/tasks", base=BASE)
    made = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.safetensors")]
    assert len(made) == 2
    assert all(path.parent == Path("out/tasks") for path in made)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"template": "{text}"}, "no {prompt}"),
        ({"template": "{prompt}"}, "no slot"),
        ({"labels": ("a", "b")}, "has no head"),
        ({"source_format": "lora"}, "not one of"),
        ({"target": "gguf"}, "not one of"),
        ({"target": "npy"}, "does not fit"),
        ({"base": None}, "give --base"),
    ],
)
def test_options_that_contradict(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    source = adapter(tmp_path / "a")
    with pytest.raises((InputError, SourceError, TemplateError), match=match):
        convert_prompt(source, tmp_path / "out.safetensors", **{"base": BASE, **options})


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "QUESTION_ANS"])
def test_heads_on_an_encoder_decoders_decoder(task_type: str, tmp_path: Path) -> None:
    source = adapter(tmp_path / "a", {"task_type": task_type})
    with pytest.raises(UnsupportedError, match="label words instead"):
        convert_prompt(source, tmp_path / "out.safetensors", base=T5)


def test_head_labels_are_counted(tmp_path: Path) -> None:
    tensors = {"prompt_embeddings": ROWS, "base_model.classifier.weight": ROWS[:3].copy()}
    tensors["base_model.classifier.bias"] = ROWS[0, :3].copy()
    source = adapter(tmp_path / "a", {"task_type": "SEQ_CLS"}, tensors)
    with pytest.raises(InputError, match="2 labels given, the head of 'a' has 3 classes"):
        convert_prompt(source, tmp_path / "out.safetensors", base=BERT, labels=("x", "y"))


@pytest.mark.parametrize(
    "text",
    ['{"soft": __import__("os").getcwd()} {"mask"}', '{"placeholder": "text_a"', '{"special": "<eos>"} {"mask"}'],
)
def test_openprompt_templates_run_no_code(text: str) -> None:
    with pytest.raises(TemplateError):
        read_template(text, BASE)
